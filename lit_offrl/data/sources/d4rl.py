"""Original D4RL files, by their D4RL name, e.g. `hopper-medium-v2`.

The facts are those of d4rl/infos.py and of the `__init__` of d4rl/gym_mujoco, hand_manipulation_suite, locomotion,
pointmaze and kitchen. Left out are minigrid, flow, carla and bullet (there is no current environment) and antmaze-ultra
(hosted elsewhere).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_offrl.data.info import DatasetInfo, EnvironmentInfo
from lit_offrl.data.sources.base import DataSource, Listing, Reference

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

            download(_url(dataset), _path(dataset))

    def load(self, dataset: str, d4rl_compat: bool = True) -> tuple[Transitions, DatasetInfo]:
        """Read a file; download it first if it is not here."""
        from lit_offrl.data.formats.cache import cached
        from lit_offrl.data.formats.d4rl import read_d4rl

        self.prepare(dataset)
        path, limit = _path(dataset), d4rl_time_limit(dataset)
        is_maze = dataset.startswith(("antmaze", "maze2d"))
        options = {"d4rl_compat": d4rl_compat, "dataset": dataset}
        transitions, _, digest = cached(path, options, lambda: read_d4rl(path, limit, d4rl_compat, is_maze))
        environment, note = d4rl_environment(dataset)
        return transitions, DatasetInfo(
            id=dataset,
            source="d4rl",
            path=path,
            sha256=digest,
            observation_keys=ANT_MAZE_KEYS if dataset.startswith("antmaze") else None,
            environment=environment,
            environment_note=note,
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

    def environment(self, info: DatasetInfo) -> EnvironmentInfo | None:
        """Return the current environment that is closest to D4RL's, with D4RL's goals and time limit."""
        return None if info.environment is None else apply_d4rl_rules(info.id, info.environment)

    def reference(self, info: DatasetInfo) -> Reference | None:
        """Return D4RL's reference."""
        bounds = _REFERENCES.get(info.id)
        return None if bounds is None else ("d4rl", *bounds)


def d4rl_folder() -> Path:
    """Return where D4RL's files are kept: D4RL_DATASET_DIR, or .d4rl/datasets in the home folder, as D4RL does."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets")


def _path(dataset: str) -> Path:
    return d4rl_folder() / Path(D4RL_FILES[dataset]).name


def _url(dataset: str) -> str:
    """Return the address of a file; the environment variable LIT_OFFRL_D4RL_URL names a mirror."""
    return (os.environ.get("LIT_OFFRL_D4RL_URL") or _BASE_URL).rstrip("/") + "/" + D4RL_FILES[dataset]


# ------------------------------------------------------------------------------------------------ names and files

_LOCOMOTION = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}
_HANDS = {name: f"AdroitHand{name.capitalize()}-v1" for name in ("pen", "hammer", "door", "relocate")}
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

# The mazes that D4RL evaluates in (those of d4rl/locomotion/maze_env.py that end in _TEST): one start, one goal.
_MAZE_MAPS = {
    "umaze": ("11111", "1r001", "11101", "1g001", "11111"),
    "medium": ("11111111", "1r011001", "10010001", "11000111", "10010001", "10100101", "100010g1", "11111111"),
    "large": (
        "111111111111",
        "1r0001000001",
        "101101010101",
        "100000010001",
        "101111011101",
        "100101000001",
        "110101010111",
        "100100010g01",
        "111111111111",
    ),
    "eval-umaze": ("11111", "100r1", "10111", "100g1", "11111"),
    "eval-medium": ("11111111", "1r0000g1", "10101101", "10000101", "11100111", "10000001", "10011001", "11111111"),
    "eval-large": (
        "111111111111",
        "1r0100010g01",
        "110111010101",
        "100101000001",
        "101101001101",
        "100000010001",
        "101101010111",
        "100001000001",
        "111111111111",
    ),
}
_CELL = 4.0  # meters

ANT_MAZE_KEYS = ("achieved_goal", "observation")
"""Position, then the body without it: the order of D4RL's 29 numbers."""


def d4rl_environment(dataset: str) -> tuple[EnvironmentInfo | None, str]:
    """Return the environment of today that a D4RL dataset is evaluated in, and how it differs from D4RL's own."""
    family = dataset.partition("-")[0]
    limit = d4rl_time_limit(dataset)
    if family in _LOCOMOTION:
        kwargs = {"use_contact_forces": True} if family == "ant" else {}
        name = _LOCOMOTION[family]
        note = f"{name} is D4RL's {name[:-1]}2 on current MuJoCo instead of mujoco-py"
        if kwargs:
            note += ", where contact forces can be zero"
        return EnvironmentInfo(name, kwargs, limit), note
    if family in _HANDS:
        return (
            EnvironmentInfo(_HANDS[family], {}, 200),
            f"{_HANDS[family]} is D4RL's {family}-v0 on current MuJoCo instead of mujoco-py; its limit is 200 steps",
        )
    if family == "antmaze":
        return _ant_maze(dataset), (
            "gymnasium-robotics' ant in D4RL's maze: starts vary by 1 m instead of 0.1 m, goals lie within 1 m around "
            "their cell's center instead of up to 1.5 m beyond it, and count as reached at 0.45 m instead of 0.5 m"
        )
    if family == "maze2d":
        return None, (
            "gymnasium-robotics' PointMaze has other physics than D4RL's maze2d, and D4RL's reference returns do not "
            "apply to it"
        )
    return None, ("D4RL's kitchen has 60 observations, the goal among them; FrankaKitchen-v1 has 59, in another order")


def _ant_maze(dataset: str) -> EnvironmentInfo:
    maze = re.sub(r"^antmaze-|-(play|diverse)|-v\d+$", "", dataset)
    rows = _MAZE_MAPS[maze]
    start_row = next(row for row, cells in enumerate(rows) if "r" in cells)
    start_column = rows[start_row].index("r")
    size = maze.removeprefix("eval-")
    return EnvironmentInfo(
        f"AntMaze_{'UMaze' if size == 'umaze' else size.capitalize()}-v4",
        {
            # In D4RL y grows with the row, in gymnasium-robotics it falls.
            "maze_map": [[int(cell) if cell.isdigit() else cell for cell in row] for row in reversed(rows)],
            "continuing_task": False,
            "reset_target": False,
        },
        d4rl_time_limit(dataset),
        # D4RL's origin is the center of the start's cell, gymnasium-robotics' that of the maze.
        ((len(rows[0]) / 2 - start_column - 0.5) * _CELL, (len(rows) / 2 - start_row - 0.5) * _CELL),
    )


# -------------------------------------------------------------------------------------------------- D4RL's protocol

_FIXED_GOAL = {"continuing_task": True, "reset_target": False}
_EPISODIC = {"continuing_task": False, "reset_target": False}
_RULES: tuple[tuple[str, dict[str, Any], int | None], ...] = (
    # dataset, keyword arguments of the environment, time limit (None: as the dataset says). The environments stored
    # with Minari's D4RL datasets are those that recorded the data: goals move, episodes go on at the goal, and
    # PointMaze's last a million steps. The limits are those that D4RL registers its own environments with.
    # A dense reward is positive everywhere, so that ending at the goal would punish reaching it: D4RL does not.
    (r"pointmaze-(open|umaze)-dense", _FIXED_GOAL, 300),
    (r"pointmaze-medium-dense", _FIXED_GOAL, 600),
    (r"pointmaze-large-dense", _FIXED_GOAL, 800),
    (r"pointmaze-(open|umaze)", _EPISODIC, 300),
    (r"pointmaze-medium", _EPISODIC, 600),
    (r"pointmaze-large", _EPISODIC, 800),
    (r"antmaze-umaze", _EPISODIC, 700),
    (r"antmaze-(medium|large)", _EPISODIC, 1000),
    (r"pen-", {}, 100),  # D4RL's reference returns are of 100 steps; AdroitHandPen-v1 allows 200
    (r"kitchen-", {"remove_task_when_completed": True}, None),  # else a task pays in every step after its completion
)


def apply_d4rl_rules(name: str, environment: EnvironmentInfo) -> EnvironmentInfo:
    """Return the environment with the goals and the time limit of D4RL's evaluation, see `_RULES`.

    Args:
        name: Name of the dataset as D4RL writes it, e.g. `antmaze-umaze-v1`.
        environment: The environment as the dataset names it.
    """
    for pattern, kwargs, limit in _RULES:
        if re.match(pattern, name):
            limit = limit or environment.max_episode_steps
            return replace(environment, kwargs={**environment.kwargs, **kwargs}, max_episode_steps=limit)
    return environment


# ----------------------------------------------- reference returns (d4rl/infos.py; maze2d v0 and eval: d4rl/pointmaze)


def _names(kinds: str, versions: str) -> list[str]:
    return [f"{kind}-{version}" for version in versions.split() for kind in kinds.split()]


_LOCOMOTION_NAMES = [
    *_names("random medium expert medium-replay medium-expert", "v0 v1 v2"),
    *_names("full-replay", "v1 v2"),
]
_HAND_NAMES = _names("human cloned expert", "v0 v1")
_FAMILY_REFERENCES: tuple[tuple[str, list[str], float, float], ...] = (
    ("halfcheetah", _LOCOMOTION_NAMES, -280.178953, 12135.0),
    ("walker2d", _LOCOMOTION_NAMES, 1.629008, 4592.3),
    ("hopper", _LOCOMOTION_NAMES, -20.272305, 3234.3),
    ("ant", _LOCOMOTION_NAMES, -325.6, 3879.7),
    ("pen", _HAND_NAMES, 96.262799, 3076.8331017826877),
    ("hammer", _HAND_NAMES, -274.856578, 12794.134825156867),
    ("relocate", _HAND_NAMES, -6.425911, 4233.877797728884),
    ("door", _HAND_NAMES, -56.512833, 2880.5693087298737),
    ("antmaze", _names("umaze umaze-diverse medium-play medium-diverse large-play large-diverse", "v0 v2"), 0.0, 1.0),
    ("kitchen", _names("complete partial mixed", "v0"), 0.0, 4.0),
    ("minigrid", _names("fourrooms fourrooms-random", "v0"), 0.01442, 2.89685),
    ("maze2d", ["open-v0"], 0.01, 20.66),
    ("maze2d", ["umaze-v1"], 23.85, 161.86),
    ("maze2d", ["medium-v1"], 13.13, 277.39),
    ("maze2d", ["large-v1"], 6.7, 273.99),
    ("maze2d", ["open-dense-v0"], 11.17817, 27.166538620695782),
    ("maze2d", ["umaze-dense-v1"], 68.537689, 193.66285642381482),
    ("maze2d", ["medium-dense-v1"], 44.264742, 297.4552547777125),
    ("maze2d", ["large-dense-v1"], 30.569041, 303.4857382709002),
    ("maze2d", ["umaze-v0"], 0.94, 62.6),
    ("maze2d", ["medium-v0"], 5.77, 85.14),
    ("maze2d", ["large-v0"], 4.83, 191.99),
    ("maze2d", ["umaze-dense-v0"], 23.249793, 81.78995240126592),
    ("maze2d", ["medium-dense-v0"], 19.47762, 96.03474232952358),
    ("maze2d", ["large-dense-v0"], 27.38831, 215.09965671563742),
    ("maze2d", ["eval-umaze-v1"], 36.63, 141.4),
    ("maze2d", ["eval-medium-v1"], 13.07, 204.93),
    ("maze2d", ["eval-large-v1"], 16.4, 302.22),
)
_REFERENCES = {f"{family}-{name}": (low, high) for family, names, low, high in _FAMILY_REFERENCES for name in names}
