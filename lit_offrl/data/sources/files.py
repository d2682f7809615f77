"""Files of one's own: flat arrays, Minari's HDF5 layout, or a folder with a file per episode.

Arrays of n transitions, one episode after another:

- `observations` `[n, observation_dim]`, `actions` `[n, action_dim]`, `rewards` `[n]`; any numbers, made float32.
- `terminals` (or `terminations`) `[n]`: the step led to a terminal state.
- `timeouts` (or `truncations`) `[n]`: the episode was cut after this step. One of these two must be there.
- `next_observations` `[n, observation_dim]`, optional.

With `next_observations` every transition is kept, and an episode also ends where the next row does not start from the
observation that the last one led to. Without, the next row's observation is the successor. After the last step of an
episode that is no longer so: a terminal step is kept (its successor does not matter and is its own observation), any
other is dropped and the step before it ends the episode.

A folder holds one `.npz` or `.hdf5` file per episode, in the natural order of their names. There `terminals` and
`timeouts` are optional (the file's last step ends the episode), and observations may be n + 1: the last one is then the
successor of the last step, and nothing is dropped.
"""

from __future__ import annotations

from pathlib import Path

from lit_offrl.data.info import DatasetInfo
from lit_offrl.data.local import FILE_SUFFIXES
from lit_offrl.data.sources.arrays import (
    TableBuilder,
    episode_fields,
    flat_fields,
    natural_order,
    open_arrays,
    read_columns,
    stored_array,
)
from lit_offrl.data.sources.cache import SUFFIX, Table, cached, source_sha256
from lit_offrl.data.sources.minari import is_episode, read_minari
from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import UserError


def load_path(path: Path) -> tuple[Transitions, DatasetInfo]:
    """Read a file or folder of one's own; see the module for what it may hold.

    Raises:
        UserError: Nothing lies there, or what lies there is broken; names the file and the key.
    """
    if path.is_dir():
        transitions, keys, digest = cached(path, {}, lambda: (_read_folder(path), None))
    elif not path.is_file():
        raise UserError(f"data.dataset: no file {path}")
    elif path.suffix not in FILE_SUFFIXES:
        raise UserError(f"{path}: files of your own end in {', '.join(FILE_SUFFIXES)}")
    elif path.suffix == ".npz":  # is as fast as the cache would be
        transitions, keys, digest = *_read_file(path), source_sha256(path)
    else:
        transitions, keys, digest = cached(path, {}, lambda: _read_file(path))
    return transitions, DatasetInfo(
        str(path),
        "file",
        path,
        digest,
        observation_keys=keys,
        environment_note="files of one's own name no environment",
    )


def _read_file(path: Path) -> Table:
    with open_arrays(path) as arrays:
        if "observations" in arrays or not any(is_episode(name) for name in arrays):
            return Transitions(**flat_fields(read_columns(arrays))), None
    return read_minari(path)


def _read_folder(folder: Path) -> Transitions:
    names = [
        entry.name for entry in folder.iterdir() if entry.suffix in FILE_SUFFIXES and not entry.name.endswith(SUFFIX)
    ]
    paths = [folder / name for name in natural_order(names)]
    if not paths:
        raise UserError(f"{folder}: the folder holds no episodes, i.e. no {', '.join(FILE_SUFFIXES)} files")
    steps = 0
    for path in paths:
        with open_arrays(path) as arrays:
            steps += len(stored_array(arrays, "rewards"))
    table = TableBuilder(steps)
    for path in paths:
        with open_arrays(path) as arrays:
            table.append(episode_fields(read_columns(arrays, episode=True)))
    return table.finish()
