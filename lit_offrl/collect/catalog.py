"""The datasets this package can collect: a table in which a further maze is one more row.

Everything is plain values; importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

# Mazes, one string per row of cells: `1` wall, `0` free, `r` the start and `g` the goal of the evaluation. Without an
# `r` episodes start in any free cell. The walls are those of gymnasium-robotics' mazes of the same names.
_UMAZE = ("11111", "1r001", "11101", "1g001", "11111")
_UMAZE_ANY_START = ("11111", "10001", "11101", "1g001", "11111")
_MEDIUM_ANY_START = (
    "11111111",
    "10011001",
    "10010001",
    "11000111",
    "10010001",
    "10100101",
    "100010g1",
    "11111111",
)


@dataclass(frozen=True)
class BehaviorMix:
    """How the episodes of a dataset come about; all draws are made anew for every episode.

    Attributes:
        direct: Share of episodes that head for the goal on the shortest route.
        detour: Share of episodes that visit other cells first and turn around in the corridors on the way.
        wander: Share of episodes that travel among cells other than the goal's and are then cut off (truncated), unless
            the way leads through the goal.
        random_start: Share of episodes, of every kind, that start in a random free cell; the others start where
            evaluations do.
        noise: Smallest and largest standard deviation of the Gaussian noise added to all actions of an episode. Kept
            small where noise would make the body fall: what is suboptimal here is where the walker goes.
        detour_cells: Fewest and most cells visited by a detour.
        wander_cells: Fewest and most cells visited by a wanderer.

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

    def __post_init__(self) -> None:
        if abs(self.direct + self.detour + self.wander - 1) > 1e-9:
            raise ValueError(f"the shares of direct, detour and wander do not sum to 1: {self}")


@dataclass(frozen=True)
class CollectedDataset:
    """One dataset that can be collected.

    Attributes:
        id: Its Minari id.
        description: One line for listings.
        body: What moves through the maze; decides on the behavior policy.
        env_id: Gymnasium id of the environment, in which policies are evaluated, too.
        maze: Rows of cells, see the mazes of this module.
        cell_size: Edge length of a cell in meters.
        max_episode_steps: Time limit of an episode in environment steps.
        observation_keys: Parts of the dictionary observation that make up a learner's observation vector, in order.
            The behavior sees no more than these: without `desired_goal` it heads for the center of the goal's cell.
        mix: How the episodes come about.
        steps: Number of transitions unless the user asks for another.
        reference: (random, expert) return in the evaluation, the scores 0 and 100.
        reference_note: How the reference was measured.
    """

    id: str
    description: str
    body: Literal["point", "ant"]
    env_id: str
    maze: tuple[str, ...]
    cell_size: float
    max_episode_steps: int
    observation_keys: tuple[str, ...]
    mix: BehaviorMix
    steps: int
    reference: tuple[float, float]
    reference_note: str

    @property
    def maze_map(self) -> list[list[int | str]]:
        """The maze as gymnasium-robotics wants it: numbers and letters, row by row."""
        return [[int(cell) if cell.isdigit() else cell for cell in row] for row in self.maze]

    @property
    def env_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `gymnasium.make` besides id and time limit; an episode ends at the goal."""
        return {"maze_map": self.maze_map, "continuing_task": False}


_TITLES = {"umaze": "the U-shaped maze", "medium": "the medium maze"}
_REFERENCE_NOTE = (
    "mean return of 100 episodes in the evaluation environment, seeds 0 to 99: uniformly random actions, and the "
    "behavior policy heading for the goal at collection noise (tools/measure_references.py)"
)


def _pointmaze(name: str, env_id: str, maze: tuple[str, ...], limit: int, low: float, high: float) -> CollectedDataset:
    return CollectedDataset(
        id=f"offrl/pointmaze/{name}-v0",
        description=f"a ball in {_TITLES[name]}, half of the episodes reach the goal (sparse reward)",
        body="point",
        env_id=env_id,
        maze=maze,
        cell_size=1.0,
        max_episode_steps=limit,
        # The goal moves by at most 0.35 m about its cell's center and counts as reached from 0.45 m: no need to see it.
        observation_keys=("observation",),
        mix=BehaviorMix(direct=0.3, detour=0.2, wander=0.5, random_start=1.0, noise=(0.5, 0.5)),
        steps=50_000,
        reference=(low, high),
        reference_note=_REFERENCE_NOTE,
    )


def _antmaze(name: str, env_id: str, maze: tuple[str, ...], limit: int, low: float, high: float) -> CollectedDataset:
    return CollectedDataset(
        id=f"offrl/antmaze/{name}-v0",
        description=f"a four-legged ant in {_TITLES[name]}, half of the episodes reach the goal (sparse reward)",
        body="ant",
        env_id=env_id,
        maze=maze,
        cell_size=4.0,
        max_episode_steps=limit,
        # The goal moves by up to 1.4 m about its cell's center and counts as reached from 0.45 m: it must be seen.
        observation_keys=("achieved_goal", "observation", "desired_goal"),
        # The walk is precise work: a clone needs few updates where the noise is small and the walker seldom turns
        # around, so half of the episodes fail by stopping elsewhere, not by stumbling.
        mix=BehaviorMix(
            direct=0.3,
            detour=0.2,
            wander=0.5,
            random_start=0.25,
            noise=(0.0, 0.06),
            detour_cells=(1, 1),
            wander_cells=(1, 1),
        ),
        steps=100_000,
        reference=(low, high),
        reference_note=_REFERENCE_NOTE,
    )


def _table(datasets: Iterable[CollectedDataset]) -> dict[str, CollectedDataset]:
    return {dataset.id: dataset for dataset in datasets}


# The last two columns, random and planner returns: python tools/measure_references.py
CATALOG: dict[str, CollectedDataset] = _table(
    [
        _pointmaze("umaze", "PointMaze_UMaze-v3", _UMAZE_ANY_START, 300, 0.12, 1.0),
        _pointmaze("medium", "PointMaze_Medium-v3", _MEDIUM_ANY_START, 600, 0.11, 1.0),
        _antmaze("umaze", "AntMaze_UMaze-v4", _UMAZE, 700, 0.0, 1.0),
    ]
)
"""Collectable datasets by id."""
