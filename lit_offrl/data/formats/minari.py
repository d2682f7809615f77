"""Minari's file formats, HDF5 and Arrow: one group, or one folder, per episode.

An episode of T steps holds T + 1 observations: the successor of every transition is the true one, and none is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lit_offrl.data.formats.arrays import (
    TableBuilder,
    episode_fields,
    floats,
    natural_order,
    open_hdf5,
    read_columns,
    reading,
    stored_array,
)
from lit_offrl.data.formats.cache import Table
from lit_offrl.errors import UserError


def read_minari(path: Path, keys: tuple[str, ...] | None = None, repair_goals: bool = False) -> Table:
    """Read an HDF5 file in Minari's layout, or a folder in its Arrow layout.

    Args:
        path: The file, or the folder of numbered folders.
        keys: Observation keys; None for `observation_keys`.
        repair_goals: Replace the first goal of an episode by the second where they differ.

    Raises:
        UserError: The file is broken, or its observations are not vectors.
    """
    with reading(path), (_hdf5_episodes if path.is_file() else _arrow_episodes)(path) as episodes:
        if not episodes.names:
            raise UserError("holds no episodes")
        keys = (keys or observation_keys(episodes)) if episodes.leaves() else None
        steps = 0
        for name in episodes.names:
            with reading(name):
                steps += len(stored_array(episodes.open(name), "rewards"))
        table = TableBuilder(steps)
        for name in episodes.names:
            with reading(name):
                episode = episodes.open(name)
                observations = _vectors(episode, keys, repair_goals)
                steps = len(episode["rewards"])
                if len(observations) != steps + 1:
                    raise UserError(f"has {len(observations)} observations for {steps} rewards; one more is needed")
                table.append(episode_fields(read_columns(episode, observations, episode=True)))
        return Table(table.finish(), keys)


def _vectors(episode: Mapping[str, Any], keys: tuple[str, ...] | None, repair_goals: bool) -> NDArray[np.float32]:
    if keys is None:
        return floats(episode, "observations")
    parts = []
    for key in keys:
        part = floats(episode, f"observations/{key}")
        if part.ndim != 2:
            raise UserError(f"'observations/{key}' has shape {part.shape}; only vectors, (steps + 1, width), are read")
        if repair_goals and key == "desired_goal" and len(part) > 1:
            part[0] = part[1]
        parts.append(part)
    return np.concatenate(parts, axis=1)


def observation_keys(episodes: Episodes) -> tuple[str, ...]:
    """Return the keys of a dictionary observation that make up the vector; `a/b` is key `b` of the dictionary at `a`.

    Goal environments: `achieved_goal` unless `observation` begins with it, `observation`, and `desired_goal` unless it
    is constant (D4RL's conventions: 29 numbers in AntMaze, 4 in PointMaze). If goals are dictionaries with an entry per
    task: `observation`, and `desired_goal/<task>` in alphabetical order unless all are constant; the entries of
    `achieved_goal` repeat parts of the observation.

    Other dictionaries: every key, in alphabetical order.
    """
    leaves = sorted(episodes.leaves())
    groups = {leaf.partition("/")[0] for leaf in leaves}
    if groups != {"observation", "achieved_goal", "desired_goal"} or "observation" not in leaves:
        return tuple(leaves)
    goals = [leaf for leaf in leaves if leaf.startswith("desired_goal")]
    keys = ["observation"]
    if "achieved_goal" in leaves:
        first = episodes.open(episodes.names[0])
        achieved, observation = floats(first, "observations/achieved_goal"), floats(first, "observations/observation")
        if not np.array_equal(observation[:, : achieved.shape[1]], achieved):
            keys.insert(0, "achieved_goal")
    if any(_varies(episodes, goal) for goal in goals):
        keys.extend(goals)
    return tuple(keys)


def _varies(episodes: Episodes, leaf: str) -> bool:
    constant = floats(episodes.open(episodes.names[0]), f"observations/{leaf}")[0]
    return any((floats(episodes.open(name), f"observations/{leaf}") != constant).any() for name in episodes.names)


# --------------------------------------------------------------------------------------------------------- formats


class Episodes(Protocol):
    """Episodes of a file or folder, read one at a time."""

    names: list[str]

    def open(self, name: str) -> Mapping[str, Any]:
        """Return the arrays of an episode under paths such as `rewards` or `observations/desired_goal`."""

    def leaves(self) -> list[str]:
        """Return the paths below `observations`; an empty list if observations are plain arrays."""


class _Hdf5Episode(Mapping[str, Any]):
    # h5py's high-level objects take twice the time that HDF5 needs to read one of these small arrays.
    def __init__(self, group: Any) -> None:
        self._group = group

    def __getitem__(self, name: str) -> NDArray[Any]:
        from h5py import h5d, h5s

        dataset = h5d.open(self._group, name.encode())
        array = np.empty(dataset.shape, dataset.dtype)
        if array.size and array.dtype.kind != "O":  # `stored_array` refuses objects
            dataset.read(h5s.ALL, h5s.ALL, array)
        return array

    def __contains__(self, name: object) -> bool:
        return bool(self._group.links.exists(str(name).encode()))

    def __iter__(self) -> Iterator[str]:
        return (name.decode() for name in self._group)

    def __len__(self) -> int:
        return len(self._group)


class _Hdf5Episodes:
    def __init__(self, file: Any) -> None:
        self._file = file
        self.names = natural_order([name for name in file if is_episode(name)])

    def open(self, name: str) -> Mapping[str, Any]:
        from h5py import h5g

        return _Hdf5Episode(h5g.open(self._file.id, name.encode()))

    def leaves(self) -> list[str]:
        import h5py

        observations = self._file[self.names[0]].get("observations")
        found: list[str] = []
        if isinstance(observations, h5py.Group):
            observations.visititems(lambda path, item: found.append(path) if isinstance(item, h5py.Dataset) else None)
        return found


@contextmanager
def _hdf5_episodes(path: Path) -> Iterator[_Hdf5Episodes]:
    with open_hdf5(path) as file:
        yield _Hdf5Episodes(file)


def is_episode(name: str) -> bool:
    """Whether a group of an HDF5 file is named as Minari names its episodes."""
    return name.startswith("episode_") and name.removeprefix("episode_").isdigit()


class _ArrowEpisode(Mapping[str, Any]):
    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __getitem__(self, name: str) -> NDArray[Any]:
        column, *fields = name.split("/")
        array = np.concatenate([_numpy(batch.column(column), fields) for batch in self._batches])
        # All columns have the length of the observations: the others end in one row of padding.
        return array if column == "observations" else array[:-1]

    def __contains__(self, name: object) -> bool:
        return name in self._batches[0].schema.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._batches[0].schema.names)

    def __len__(self) -> int:
        return len(self._batches[0].schema.names)


def _numpy(array: Any, fields: list[str]) -> NDArray[Any]:
    for field in fields:
        array = array.field(field)
    if hasattr(array.type, "list_size"):
        width = array.type.list_size
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), width)  # type: ignore[no-any-return]
    return array.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


class _ArrowEpisodes:
    def __init__(self, folder: Path, ipc: Any, parquet: Any) -> None:
        self._folder = folder
        self._ipc, self._parquet = ipc, parquet
        self.names = natural_order([entry.name for entry in folder.iterdir() if entry.name.isdigit()])

    def open(self, name: str) -> Mapping[str, Any]:
        batches: list[Any] = []
        for path in sorted((self._folder / name).glob("*.*")):
            with reading(f"{name}/{path.name}"):
                if path.suffix == ".arrow":
                    with self._ipc.open_file(str(path)) as file:
                        batches.extend(file.get_batch(i) for i in range(file.num_record_batches))
                elif path.suffix == ".parquet":
                    with self._parquet.ParquetFile(path) as file:
                        batches.extend(file.read().combine_chunks().to_batches())
        if not batches:
            raise UserError(f"episode {name} has no arrow or parquet file with rows")
        return _ArrowEpisode(batches)

    def leaves(self) -> list[str]:
        episode = self.open(self.names[0])
        return list(_struct_leaves(episode._batches[0].schema.field("observations").type))  # type: ignore[attr-defined]


def _struct_leaves(struct: Any, prefix: str = "") -> Iterator[str]:
    for index in range(struct.num_fields if str(struct).startswith("struct") else 0):
        field = struct.field(index)
        inner = list(_struct_leaves(field.type, f"{prefix}{field.name}/"))
        yield from inner or [f"{prefix}{field.name}"]


@contextmanager
def _arrow_episodes(folder: Path) -> Iterator[_ArrowEpisodes]:
    try:
        ipc, parquet = import_module("pyarrow.ipc"), import_module("pyarrow.parquet")
    except ImportError:
        raise UserError("is in Minari's arrow or parquet format, which needs pyarrow: pip install pyarrow") from None
    yield _ArrowEpisodes(folder, ipc, parquet)
