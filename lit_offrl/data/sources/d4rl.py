"""Original D4RL files, by their D4RL name, e.g. `hopper-medium-v2`.

The facts are those of d4rl/infos.py and of the `__init__` of d4rl/gym_mujoco, hand_manipulation_suite, locomotion,
pointmaze and kitchen. Left out are minigrid, flow, carla and bullet (there is no current environment) and antmaze-ultra
(hosted elsewhere).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lit_offrl.data.columns import USUAL_NAMES, LogColumns
from lit_offrl.data.info import DatasetInfo, EnvironmentInfo, ScoreReference
from lit_offrl.data.sources.base import DataSource, Listing
from lit_offrl.data.sources.d4rl_references import REFERENCES
from lit_offrl.system.files import home_folder

if TYPE_CHECKING:
    from lit_offrl.data.transitions import Transitions

_BASE_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"


class OriginalD4RL(DataSource):
    """D4RL's own HDF5 files: found in D4RL's folder or downloaded there.

    With `d4rl_compat` the table holds what D4RL's `qlearning_dataset` keeps, else the true ends of episodes; see
    `lit_offrl.data.formats.d4rl`.
    """

    names = ("d4rl",)

    def help(self) -> str:
        """Return the families of datasets."""
        families = sorted({dataset.partition("-")[0] for dataset in D4RL_FILES})
        return (
            f"original D4RL files, by name (hopper-medium-v2): {len(D4RL_FILES)} of {', '.join(families)}; "
            f"in {d4rl_folder()} (D4RL_DATASET_DIR), else downloaded there"
        )

    def matches(self, dataset: str) -> bool:
        """Return whether D4RL has a dataset of this name."""
        return dataset in D4RL_FILES

    def is_here(self, dataset: str) -> bool:
        """Return whether the file is in D4RL's folder."""
        return _path(dataset).is_file()

    def prepare(self, dataset: str) -> None:
        """Download the file; a broken download is continued by the next call."""
        if not self.is_here(dataset):
            from lit_offrl.data.download import download

            download(_url(dataset), _path(dataset), *known_digests().get(D4RL_FILES[dataset], (None, None)))

    def load(
        self, dataset: str, d4rl_compat: bool = True, columns: LogColumns = USUAL_NAMES
    ) -> tuple[Transitions, DatasetInfo]:
        """Read a file; download it first if it is not here."""
        from lit_offrl.data.formats.cache import cached
        from lit_offrl.data.formats.d4rl import read_d4rl

        self.prepare(dataset)
        path, limit = _path(dataset), d4rl_time_limit(dataset)
        is_maze = dataset.startswith(("antmaze", "maze2d"))
        options = {"d4rl_compat": d4rl_compat, "dataset": dataset}
        table, digest = cached(path, options, lambda: read_d4rl(path, limit, d4rl_compat, is_maze))
        return table.transitions, DatasetInfo(
            id=dataset,
            source="d4rl",
            path=path,
            sha256=digest,
            environment=EnvironmentInfo(D4RL_NAMESPACE + environment_name(dataset), {}, d4rl_time_limit(dataset)),
            metadata={"url": _url(dataset)},
        )

    def listing(self) -> Iterable[Listing]:
        """Return the files that are here."""
        for dataset in D4RL_FILES:
            if self.is_here(dataset):
                yield Listing(dataset, "original D4RL file", _path(dataset).stat().st_size / 1e6)

    def ids(self) -> Iterable[str]:
        """Return all names."""
        return D4RL_FILES

    def reference(self, info: DatasetInfo) -> ScoreReference | None:
        """Return D4RL's reference."""
        bounds = REFERENCES.get(info.id)
        return None if bounds is None else ScoreReference("d4rl", *bounds)


@functools.cache
def known_digests() -> dict[str, tuple[int, str]]:
    """Return size in bytes and SHA-256 digest of files by their path, of those that are published.

    They are the ones that TensorFlow Datasets checks its downloads of D4RL with.
    """
    text = Path(__file__).with_name("d4rl_digests.txt").read_text()
    return {path: (int(size), digest) for path, size, digest in map(str.split, text.splitlines())}


def d4rl_folder() -> Path:
    """Return where D4RL's files are kept: D4RL_DATASET_DIR, or .d4rl/datasets in the home folder, as D4RL does."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or home_folder("D4RL_DATASET_DIR") / ".d4rl" / "datasets")


def _path(dataset: str) -> Path:
    return d4rl_folder() / Path(D4RL_FILES[dataset]).name


def _url(dataset: str) -> str:
    """Return the address of a file; the environment variable LIT_OFFRL_D4RL_URL names a mirror."""
    return (os.environ.get("LIT_OFFRL_D4RL_URL") or _BASE_URL).rstrip("/") + "/" + D4RL_FILES[dataset]


# ------------------------------------------------------------------------------------------------ names and files

_LOCOMOTION = ("hopper", "halfcheetah", "walker2d", "ant")
_HANDS = ("pen", "hammer", "door", "relocate")
_HAND_KINDS = {"human": "v0_demos_clipped", "cloned": "demos-v0-bc-combined", "expert": "v0_expert_clipped"}
_KITCHEN = {
    "complete": "mini_kitchen_microwave_kettle_light_slider",
    "partial": "kitchen_microwave_kettle_light_slider",
    "mixed": "kitchen_microwave_kettle_bottomburner_light",
}
# What ant mazes are called in the files of v0 and v2; those of v1 and of eval mazes use the names of the ids.
_ANT_MAZES = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}
_ANT_MAZE_KINDS = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")


def _files() -> Iterator[tuple[str, str]]:
    """Yield every dataset id with the path of its file below the base address."""
    kinds = ("random", "medium", "expert", "medium-replay", "medium-expert")
    for robot in _LOCOMOTION:
        for kind in kinds:
            stem = f"{robot}_{kind.replace('medium-replay', 'mixed').replace('-', '_')}"
            yield f"{robot}-{kind}-v0", f"gym_mujoco/{stem.replace('walker2d_mixed', 'walker_mixed')}.hdf5"
        for version in ("v1", "v2"):
            for kind in (*kinds, "full-replay"):
                yield (
                    f"{robot}-{kind}-{version}",
                    f"gym_mujoco_{version}/{robot}_{kind.replace('-', '_')}-{version}.hdf5",
                )
    yield "ant-random-expert-v0", "gym_mujoco/ant_random_expert.hdf5"

    for hand in _HANDS:
        for kind, stem in _HAND_KINDS.items():
            yield f"{hand}-{kind}-v0", f"hand_dapg/{hand}-{stem}.hdf5"
            yield f"{hand}-{kind}-v1", f"hand_dapg_v1/{hand}-{kind}-v1.hdf5"

    for kind in _ANT_MAZE_KINDS:
        maze, _, variety = kind.partition("-")
        starts, goals = bool(variety), variety == "diverse"
        yield f"antmaze-{kind}-v0", _ant_maze_file("ant_maze_new", _ANT_MAZES[maze], starts, goals, "sparse")
        yield f"antmaze-{kind}-v1", _ant_maze_file("ant_maze_v1", maze, starts, goals, "sparse")
        yield f"antmaze-{kind}-v2", _ant_maze_file("ant_maze_v2", _ANT_MAZES[maze], starts, goals, "sparse_fixed")
        # D4RL gives the larger eval mazes' play sets the files of several goals, their diverse sets those of one goal.
        goals = goals if maze == "umaze" else not goals
        yield f"antmaze-eval-{kind}-v0", _ant_maze_file("ant_maze_new", f"{maze}_eval", True, goals, "sparse")

    for dense, reward in (("", "sparse"), ("-dense", "dense")):
        yield f"maze2d-open{dense}-v0", f"maze2d/maze2d-open-{reward}.hdf5"
        for maze in ("umaze", "medium", "large"):
            yield f"maze2d-{maze}{dense}-v0", f"maze2d/maze2d-{maze}-{reward}.hdf5"
            yield f"maze2d-{maze}{dense}-v1", f"maze2d/maze2d-{maze}-{reward}-v1.hdf5"
            yield f"maze2d-eval-{maze}{dense}-v1", f"maze2d/maze2d-eval-{maze}-{reward}-v1.hdf5"

    for kind, stem in _KITCHEN.items():
        yield f"kitchen-{kind}-v0", f"kitchen/{stem}-v0.hdf5"


def _ant_maze_file(folder: str, maze: str, starts: bool, goals: bool, end: str) -> str:
    return f"{folder}/Ant_maze_{maze}_noisy_multistart_{starts}_multigoal_{goals}_{end}.hdf5"


D4RL_FILES: dict[str, str] = dict(_files())
"""Path of every dataset's file below the base address."""

_TIME_LIMITS = (
    (r"pen-", 100),
    (r"(hammer|door|relocate)-", 200),
    (r"kitchen-", 280),
    (r"antmaze-(eval-)?umaze-", 700),
    (r"maze2d-(open|umaze).*-v0", 150),
    (r"maze2d-medium.*-v0", 250),
    (r"maze2d-large.*-v0", 600),
    (r"maze2d-(eval-)?umaze-", 300),
    (r"maze2d-(eval-)?medium-", 600),
    (r"maze2d-(eval-)?large-", 800),
    (r"", 1000),
)


def d4rl_time_limit(dataset: str) -> int:
    """Return the steps after which D4RL's own environment of this name ends an episode."""
    return next(limit for pattern, limit in _TIME_LIMITS if re.match(pattern, dataset))


# ---------------------------------------------------------------------------------------------------- environments

D4RL_NAMESPACE = "D4RL/"
"""Namespace of D4RL's own environments, see `lit_offrl.envs.d4rl`."""


def environment_name(dataset: str) -> str:
    """Return the name of the environment of a dataset: `hopper-v2` of hopper-medium-v2, `antmaze-large-v0` ...

    Datasets that differ only in their data share an environment.
    """
    family = dataset.partition("-")[0]
    if family in (*_LOCOMOTION, *_HANDS):
        return f"{family}{dataset[dataset.rindex('-v') :]}"
    return re.sub(r"-(play|diverse)(?=-)", "", dataset) if family == "antmaze" else dataset


def d4rl_environment_names() -> list[str]:
    """Return the names of all environments."""
    return sorted({environment_name(dataset) for dataset in D4RL_FILES})
