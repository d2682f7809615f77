"""Files of one's own: flat arrays, a table, Minari's or robomimic's HDF5 layout, or a folder with a file per episode.

Arrays of n transitions, one episode after another:

- `observations` `[n, observation_dim]`, `actions` `[n, action_dim]`, `rewards` `[n]`; any numbers, made float32.
- `terminals` (or `terminations`) `[n]`: the step led to a terminal state.
- `timeouts` (or `truncations`) `[n]`: the episode was cut after this step. One of these two must be there.
- `next_observations` `[n, observation_dim]`, optional.
- `ends` `[n]`, optional beside `next_observations`: the last step of each episode, where episodes go on after terminal
  steps.

With `next_observations` every transition is kept, and an episode also ends where the next row's observation is not the
successor. Without them, the next row's observation is the successor, which the last step of an episode does not have: a
terminal last step is kept (its successor is not used and is set to its own observation), any other last step is dropped
and the step before it ends the episode.

A folder holds one `.npz` or `.hdf5` file per episode, in the natural order of their names. There `terminals` and
`timeouts` are optional (the file's last step ends the episode), and observations may be n + 1: the last one is then the
successor of the last step, and nothing is dropped. A folder of `.csv` or `.parquet` files is one table.
"""

from __future__ import annotations

from pathlib import Path

from lit_offrl.data.columns import USUAL_NAMES, LogColumns
from lit_offrl.data.formats.arrays import (
    TableBuilder,
    episode_fields,
    flat_fields,
    natural_order,
    open_arrays,
    read_columns,
    reading,
    stored_array,
)
from lit_offrl.data.formats.cache import SUFFIX, Table
from lit_offrl.data.formats.minari import is_episode, read_minari
from lit_offrl.data.formats.robomimic import is_robomimic, read_robomimic
from lit_offrl.data.formats.tables import read_table, read_tables
from lit_offrl.data.sources.files import ARRAY_SUFFIXES, FILE_SUFFIXES, TABLE_SUFFIXES
from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import UserError


def read_file(path: Path, columns: LogColumns = USUAL_NAMES) -> Table:
    """Read a table, a file of flat arrays, or an HDF5 file in Minari's or robomimic's layout.

    Args:
        path: The file.
        columns: Which columns of a table, or observation keys of robomimic, hold what.

    Raises:
        UserError: The file is broken; the message names the file and the key.
    """
    if path.suffix in TABLE_SUFFIXES:
        return read_table(path, columns)
    with open_arrays(path) as arrays:
        holds_demonstrations = is_robomimic(arrays)
        if not holds_demonstrations:
            _refuse_columns(path, columns)
            if "observations" in arrays or not any(is_episode(name) for name in arrays):
                return Table(Transitions(**flat_fields(read_columns(arrays))))
    return read_robomimic(path, columns) if holds_demonstrations else read_minari(path)


def _refuse_columns(path: Path, columns: LogColumns) -> None:
    if columns != USUAL_NAMES:
        raise UserError(f"data.columns: {path} has no columns, its arrays are named: leave it out")


def episode_files(folder: Path) -> list[Path]:
    """Return the files of a folder with a file per episode, in their order; tables beside files of arrays are left out.

    Raises:
        UserError: There are none.
    """
    with reading(folder):
        there = [path.name for path in folder.iterdir() if not path.name.endswith(SUFFIX)]
    arrays, tables = (
        [name for name in there if name.endswith(suffixes)] for suffixes in (ARRAY_SUFFIXES, TABLE_SUFFIXES)
    )
    names = arrays or tables
    if not names:
        raise UserError(f"{folder}: the folder holds no episodes, i.e. no {', '.join(FILE_SUFFIXES)} files")
    return [folder / name for name in natural_order(names)]


def read_folder(folder: Path, columns: LogColumns = USUAL_NAMES) -> Table:
    """Read a folder with a file per episode.

    Raises:
        UserError: The folder holds no episodes, or a file is broken; the message names the file and the key.
    """
    paths = episode_files(folder)
    if paths[0].suffix in TABLE_SUFFIXES:
        return read_tables(paths, columns)
    _refuse_columns(folder, columns)
    steps = 0
    for path in paths:
        with open_arrays(path) as arrays:
            steps += len(stored_array(arrays, "rewards"))
    table = TableBuilder(steps)
    for path in paths:
        with open_arrays(path) as arrays:
            table.append(episode_fields(read_columns(arrays, episode=True)))
    return Table(table.finish())
