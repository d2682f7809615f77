"""The datasets that this package can collect: tables with one row per maze or body, in plain values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

# Mazes, one string per row of cells: `1` wall, `0` free, `r` start and `g` goal of the evaluation, `p` a free cell
# picked by hand (see `BehaviorMix.places`). Without an `r`, episodes start in any free cell. Walls are those of
# gymnasium-robotics' mazes of the same names, starts and goals those of D4RL.
_UMAZE = ("11111", "1r001", "11101", "1g001", "11111")
_MEDIUM = (
    "11111111",
    "1r0110p1",
    "10010001",
    "110p0111",
    "100100p1",
    "10100101",
    "1p0010g1",
    "11111111",
)
_LARGE = (
    "111111111111",
    "1r00010000p1",
    "101101010101",
    "1000p0010001",
    "101111011101",
    "10010100p001",
    "110101010111",
    "1p01p0010g01",
    "111111111111",
)


def _any_start(maze: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(row.replace("r", "0").replace("p", "0") for row in maze)


@dataclass(frozen=True)
class BehaviorMix:
    """Shares and parameters of the behaviors in a maze dataset; each episode draws them anew.

    Attributes:
        direct: Share of episodes that head for the goal on the shortest route.
        detour: Share of episodes that visit other cells first and turn around in the corridors on the way.
        wander: Share of episodes that visit cells other than the goal's and are then truncated, unless they pass the
            goal on the way.
        random_start: Share of episodes, of every kind, that start in a random cell of `places`; the others start where
            evaluations start.
        noise: Smallest and largest standard deviation of the Gaussian noise added to all actions of an episode. It is
            small for bodies that noise would make fall; the data are suboptimal because of where the body goes.
        detour_cells: Fewest and most cells visited by a detour.
        wander_cells: Fewest and most cells visited by a wanderer.
        places: Cells of random starts, detours and wanderers: all `free` cells except the goal's, or the cells
            `picked` by hand, `p` in the maze.

    Raises:
        ValueError: The three shares do not sum to 1.
    """

    direct: float
    detour: float
    wander: float
    random_start: float
    noise: tuple[float, float]
    detour_cells: tuple[int, int] = (1, 2)
    wander_cells: tuple[int, int] = (1, 3)
    places: Literal["free", "picked"] = "free"

    def __post_init__(self) -> None:
        if abs(self.direct + self.detour + self.wander - 1) > 1e-9:
            raise ValueError(f"the shares of direct, detour and wander do not sum to 1: {self}")


@dataclass(frozen=True)
class CollectedDataset:
    """One dataset that can be collected.

    Attributes:
        id: Minari id.
        description: One line for listings.
        env_id: Gymnasium id of the environment of collection and evaluation.
        max_episode_steps: Time limit of an episode in environment steps.
        observation_keys: Keys of the dictionary observation that form the observation vector, in order; None if
            observations are plain vectors.
        steps: Default number of transitions.
        reference: Returns of a random policy (score 0) and of the expert (score 100) in the evaluation; None where the
            score is the success rate.
        license: License and origin of the behavior policies.
    """

    id: str
    description: str
    env_id: str
    max_episode_steps: int
    observation_keys: tuple[str, ...] | None
    steps: int
    reference: tuple[float, float] | None
    license: str

    algorithm: ClassVar[str]
    """The behavior policies, in a few words."""
    reference_note: ClassVar[str]
    """How the reference was measured."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Packages on which the episodes depend, besides those of all datasets."""

    @property
    def env_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `gymnasium.make` besides id and time limit."""
        return {}

    @property
    def behavior(self) -> dict[str, Any]:
        """Facts about the behavior, for the metadata."""
        raise NotImplementedError

    def recorded_steps(self, steps: int) -> int:
        """Return the number of steps to record for a dataset of `steps` transitions."""
        return steps


_MEASURED = "mean return of 100 episodes in the evaluation environment, seeds 0 to 99: uniformly random actions, and "
_TOOL = "(tools/measure_references.py)"


# ----------------------------------------------------------------------------------------------------------- mazes


@dataclass(frozen=True)
class MazeDataset(CollectedDataset):
    """A dataset of a body in a maze. The goal gives the only reward and ends the episode.

    Attributes:
        body: The body, which determines the behavior policy.
        maze: Rows of cells, see the mazes of this module.
        cell_size: Edge length of a cell in meters.
        observation_keys: Also the inputs of the behavior: without `desired_goal` it goes to the center of the goal's
            cell.
        mix: The behaviors.
    """

    body: Literal["point", "ant"]
    maze: tuple[str, ...]
    cell_size: float
    observation_keys: tuple[str, ...]
    mix: BehaviorMix

    algorithm = "planner with a low-level controller"
    reference_note = f"{_MEASURED}the behavior policy heading for the goal at collection noise {_TOOL}"

    @property
    def maze_map(self) -> list[list[int | str]]:
        """The maze in gymnasium-robotics' form: numbers and letters, row by row."""
        return [[cell if cell in "rg" else int(cell == "1") for cell in row] for row in self.maze]

    @property
    def env_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `gymnasium.make` besides id and time limit; an episode ends at the goal."""
        return {"maze_map": self.maze_map, "continuing_task": False}

    @property
    def behavior(self) -> dict[str, Any]:
        """The behaviors and their noise."""
        mix = asdict(self.mix)
        return {"action_noise": mix.pop("noise"), "behavior_mix": mix}


def _pointmaze(name: str, env_id: str, maze: tuple[str, ...], limit: int, low: float, high: float) -> MazeDataset:
    return MazeDataset(
        id=f"offrl/pointmaze/{name}-v0",
        description=f"a ball in {_TITLES[name]}, half of the episodes reach the goal (sparse reward)",
        env_id=env_id,
        max_episode_steps=limit,
        # The goal moves by at most 0.35 m about its cell's center and counts as reached from 0.45 m, so policies need
        # not observe it.
        observation_keys=("observation",),
        steps=50_000,
        reference=(low, high),
        license="MIT, scripted controller (lit_offrl/collect/behaviors.py)",
        body="point",
        maze=maze,
        cell_size=1.0,
        mix=BehaviorMix(direct=0.3, detour=0.2, wander=0.5, random_start=1.0, noise=(0.5, 0.5)),
    )


def _antmaze(
    name: str, env_id: str, maze: tuple[str, ...], limit: int, steps: int, mix: BehaviorMix, low: float, high: float
) -> MazeDataset:
    title, _, variant = name.partition("-")
    return MazeDataset(
        id=f"offrl/antmaze/{name}-v0",
        description=f"a four-legged ant in {_TITLES[title]}{_VARIANTS[variant]}, half of the episodes reach the goal "
        "(sparse reward)",
        env_id=env_id,
        max_episode_steps=limit,
        # The goal moves by up to 1.4 m about its cell's center and counts as reached from 0.45 m, so policies must
        # observe it.
        observation_keys=("achieved_goal", "observation", "desired_goal"),
        steps=steps,
        reference=(low, high),
        license="MIT, trained by tools/distill_ant_student.py",
        body="ant",
        maze=maze,
        cell_size=4.0,
        mix=mix,
    )


_TITLES = {"umaze": "the U-shaped maze", "medium": "the medium maze", "large": "the large maze"}
_VARIANTS = {"": "", "play": " from and to picked places", "diverse": " from and to all places"}


def _ant_mix(random_start: float, places: Literal["free", "picked"]) -> BehaviorMix:
    # Walking is precise: behavior cloning needs few updates if the noise is small and the ant seldom turns around. So
    # half of the episodes fail because they stop elsewhere, not because the ant falls.
    return BehaviorMix(
        direct=0.3,
        detour=0.2,
        wander=0.5,
        random_start=random_start,
        noise=(0.0, 0.06),
        detour_cells=(1, 1),
        wander_cells=(1, 1),
        places=places,
    )


# D4RL's names. `play`: starts and waypoints in cells picked by hand. `diverse`: starts and waypoints in any cell. All
# rewards are for the goal of the evaluation, as in D4RL's files (relabel_antmaze_rewards.py), and evaluations start in
# one corner. An episode with another goal is a `wander` episode here.
_NEAR_START = _ant_mix(random_start=0.25, places="free")
_PLAY = _ant_mix(random_start=0.75, places="picked")
_DIVERSE = _ant_mix(random_start=1.0, places="free")


# ------------------------------------------------------------------------------------------------------ locomotion


@dataclass(frozen=True)
class Level:
    """A snapshot of the training of a policy.

    Attributes:
        name: Environment steps it was trained for, e.g. `25k`, or `random` for uniformly random actions.
        mean_return: Undiscounted, of 100 episodes in the evaluation environment, seeds 0 to 99, with the policy's own
            noise (tools/measure_references.py).
        mean_length: Steps of these episodes.
    """

    name: str
    mean_return: float
    mean_length: float


@dataclass(frozen=True)
class LocomotionDataset(CollectedDataset):
    """A dataset of a running or hopping body, by snapshots of a training with their own noise.

    Attributes:
        levels: The policies; all have the same share of the transitions.
    """

    levels: tuple[Level, ...]

    algorithm = "policies from the course of a training (soft actor-critic; of hopper, augmented random search)"
    reference_note = f"{_MEASURED}the expert with its own noise {_TOOL}"

    @property
    def behavior(self) -> dict[str, Any]:
        """The policies."""
        return {"levels": [asdict(level) for level in self.levels]}


def _locomotion(
    name: str, body: str, env_id: str, tool: str, replay: tuple[Level, ...], expert: Level
) -> Iterator[LocomotionDataset]:
    """Yield the five datasets of a body.

    Args:
        name: Name of the body in ids.
        body: Name of the body in descriptions.
        env_id: Gymnasium id.
        tool: Script that trained the policies.
        replay: Snapshots from random actions to the medium policy.
        expert: The best policy.
    """
    medium = replay[-1]
    for kind, levels, text in (
        ("random", replay[:1], "uniformly random actions"),
        ("medium", (medium,), "a policy from early in its training"),
        ("medium-replay", replay, "the policies on the way to the medium one, the first random, in equal shares"),
        ("medium-expert", (medium, expert), "half of the transitions by the medium policy, half by the expert"),
        ("expert", (expert,), "the policy at the end of its training"),
    ):
        yield LocomotionDataset(
            id=f"offrl/{name}/{kind}-v0",
            description=f"{body}: {text}",
            env_id=env_id,
            max_episode_steps=1000,
            observation_keys=None,
            steps=100_000,
            reference=(replay[0].mean_return, expert.mean_return),
            license="MIT" if kind == "random" else f"MIT, trained by {tool}",
            levels=levels,
        )


# ---------------------------------------------------------------------------------------------------- manipulation


@dataclass(frozen=True)
class ManipulationDataset(CollectedDataset):
    """A dataset of OGBench's robot arm, recorded without a task.

    One file serves all five tasks of its environment. The id of the file, `offrl/ogbench/cube-single-play-v0`, means
    the default task when a policy is trained; `...-play-singletask-task1-v0` to `task5` name one. So these ids are
    OGBench's own with `offrl/` before them, and a command works on the collected file and on the original one.

    Attributes:
        name: OGBench's name of the environment, e.g. `cube-single`.
        p_stack: Smallest and largest probability that a cube is to be put on another one; drawn for each episode.
        episode_steps: Steps of an episode of the data; `max_episode_steps` is the limit of the evaluation.
    """

    name: str
    p_stack: tuple[float, float]
    episode_steps: int = 1000

    algorithm = "scripted planners of the package ogbench"
    reference_note = "the score is OGBench's: the share of successful episodes, in percent"
    packages = ("ogbench", "dm_control", "scipy")

    @property
    def behavior(self) -> dict[str, Any]:
        """The kind of the planners, and how often they stack cubes."""
        return {"planners": "play", "p_stack": self.p_stack, "validation_episodes_per_episode": VALIDATION_FRACTION}

    def training_episodes(self, steps: int) -> int:
        """Return the number of episodes of `steps` transitions; the last one may be cut."""
        return -(-steps // self.episode_steps)

    def recorded_steps(self, steps: int) -> int:
        """Return the number of steps to record: OGBench's datasets have more episodes for validation."""
        episodes = self.training_episodes(steps)
        return (episodes + max(round(VALIDATION_FRACTION * episodes), 1)) * self.episode_steps


VALIDATION_FRACTION = 0.1  # OGBench's: as many episodes more, in a file of their own


def _ogbench(name: str, text: str, limit: int, p_stack: tuple[float, float] = (0.5, 0.5)) -> ManipulationDataset:
    return ManipulationDataset(
        id=f"offrl/ogbench/{name}-play-v0",
        description=f"OGBench's robot arm {text}, also -singletask-task1 to -task5",
        env_id=f"ogbench/{name}-singletask-v0",
        max_episode_steps=limit,
        observation_keys=None,
        steps=100_000,
        reference=None,
        license="MIT, scripted planners of the package ogbench",
        name=name,
        p_stack=p_stack,
    )


# ---------------------------------------------------------------------------------------------------- the datasets


def _table(datasets: Iterable[CollectedDataset]) -> dict[str, CollectedDataset]:
    return {dataset.id: dataset for dataset in datasets}


# Random and planner returns, the last two columns of mazes, and the numbers of levels: tools/measure_references.py
CATALOG: dict[str, CollectedDataset] = _table(
    [
        _pointmaze("umaze", "PointMaze_UMaze-v3", _any_start(_UMAZE), 300, 0.12, 1.0),
        _pointmaze("medium", "PointMaze_Medium-v3", _any_start(_MEDIUM), 600, 0.11, 1.0),
        _pointmaze("large", "PointMaze_Large-v3", _any_start(_LARGE), 800, 0.07, 1.0),
        _antmaze("umaze", "AntMaze_UMaze-v4", _UMAZE, 700, 100_000, _NEAR_START, 0.0, 1.0),
        _antmaze("umaze-diverse", "AntMaze_UMaze-v4", _UMAZE, 700, 100_000, _DIVERSE, 0.0, 1.0),
        _antmaze("medium-play", "AntMaze_Medium-v4", _MEDIUM, 1000, 200_000, _PLAY, 0.0, 1.0),
        _antmaze("medium-diverse", "AntMaze_Medium-v4", _MEDIUM, 1000, 200_000, _DIVERSE, 0.0, 1.0),
        _antmaze("large-play", "AntMaze_Large-v4", _LARGE, 1000, 200_000, _PLAY, 0.0, 1.0),
        _antmaze("large-diverse", "AntMaze_Large-v4", _LARGE, 1000, 200_000, _DIVERSE, 0.0, 1.0),
        *_locomotion(
            "hopper",
            "a hopper on one leg",
            "Hopper-v5",
            "tools/search_hopper.py",
            (Level("random", 17.04, 22.7), Level("25k", 234.21, 120.1), Level("50k", 945.22, 383.8)),
            Level("600k", 3134.34, 1000.0),
        ),
        *_locomotion(
            "halfcheetah",
            "a running half cheetah",
            "HalfCheetah-v5",
            "tools/train_locomotion.py",
            (Level("random", -282.44, 1000.0), Level("25k", 1955.57, 1000.0)),
            Level("200k", 7840.97, 1000.0),
        ),
        *_locomotion(
            "walker2d",
            "a walker on two legs",
            "Walker2d-v5",
            "tools/train_locomotion.py",
            (
                Level("random", 1.93, 21.5),
                Level("25k", 251.77, 172.3),
                Level("50k", 473.73, 262.0),
                Level("75k", 387.39, 157.7),
                Level("100k", 830.23, 320.6),
                Level("125k", 1211.34, 535.4),
            ),
            Level("200k", 3753.59, 1000.0),
        ),
        # Limits of episodes are OGBench's, probabilities of stacking those of its authors' script.
        _ogbench("cube-single", "moves a cube", 200, (0.0, 0.0)),
        _ogbench("cube-double", "moves and stacks two cubes", 500, (0.0, 0.25)),
        _ogbench("scene", "moves a cube, presses buttons, and opens and closes a drawer and a window", 750),
        _ogbench("puzzle-3x3", "presses nine buttons, each of which switches its neighbors, too", 500),
    ]
)
"""Datasets by id."""
