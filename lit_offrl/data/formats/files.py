"""Files of one's own: flat arrays, Minari's HDF5 layout, or a folder with a file per episode.

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
successor of the last step, and nothing is dropped.
"""

from __future__ import annotations

from pathlib import Path

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
from lit_offrl.data.sources.files import FILE_SUFFIXES
from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import UserError


def read_file(path: Path) -> Table:
    """Read a file of flat arrays, or an HDF5 file in Minari's layout.

    Raises:
        UserError: The file is broken; the message names the file and the key.
    """
    with open_arrays(path) as arrays:
        if "observations" in arrays or not any(is_episode(name) for name in arrays):
            return Transitions(**flat_fields(read_columns(arrays))), None
    return read_minari(path)


def episode_files(folder: Path) -> list[Path]:
    """Return the files of a folder with a file per episode, in their order.

    Raises:
        UserError: There are none.
    """
    with reading(folder):
        names = [
            path.name for path in folder.iterdir() if path.suffix in FILE_SUFFIXES and not path.name.endswith(SUFFIX)
        ]
    if not names:
        raise UserError(f"{folder}: the folder holds no episodes, i.e. no {', '.join(FILE_SUFFIXES)} files")
    return [folder / name for name in natural_order(names)]


def read_folder(folder: Path) -> Transitions:
    """Read a folder with a file per episode.

    Raises:
        UserError: The folder holds no episodes, or a file is broken; the message names the file and the key.
    """
    paths = episode_files(folder)
    steps = 0
    for path in paths:
        with open_arrays(path) as arrays:
            steps += len(stored_array(arrays, "rewards"))
    table = TableBuilder(steps)
    for path in paths:
        with open_arrays(path) as arrays:
            table.append(episode_fields(read_columns(arrays, episode=True)))
    return table.finish()
