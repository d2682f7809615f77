"""The original D4RL datasets: names, files, time limits and environments of evaluation. Plain values, nothing heavy.

Facts of d4rl/infos.py and the `__init__` of d4rl/gym_mujoco, hand_manipulation_suite, locomotion, pointmaze and
kitchen. Left out: minigrid, flow, carla and bullet (no environment of today), antmaze-ultra (hosted elsewhere).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lit_offrl.data.info import EnvironmentInfo

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
