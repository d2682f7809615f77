"""Episodes in mazes: a planner leads the body to the goal, directly or by detours, or to other cells."""

from __future__ import annotations

from typing import Any

import numpy as np

from lit_offrl.collect.behaviors import AntWalker, Behavior, PointController, ant_is_down
from lit_offrl.collect.catalog import MazeDataset
from lit_offrl.collect.episodes import Episode, episode_entropy, make_environment
from lit_offrl.collect.mazes import Cell, MazeRoutes, Route

_ARRIVAL = 0.25  # in cells: distance at which a waypoint counts as visited
_JITTER = 0.25  # in cells: largest distance of a waypoint from the center of its cell, per axis


def make_behavior(dataset: MazeDataset) -> Behavior:
    """Return the behavior policy of the dataset's body."""
    return AntWalker() if dataset.body == "ant" else PointController()


def goal_point(dataset: MazeDataset, routes: MazeRoutes, observation: dict[str, Any]) -> tuple[float, float]:
    """Return the goal of the behavior in meters; if policies do not observe it, the center of its cell."""
    x, y = observation["desired_goal"].tolist()
    return (x, y) if "desired_goal" in dataset.observation_keys else routes.center(routes.cell(x, y))


class MazeRecorder:
    """Records the episodes of a maze dataset, one at a time and in any order.

    Args:
        dataset: The dataset.
        seed: Seed of the whole dataset.
    """

    def __init__(self, dataset: MazeDataset, seed: int) -> None:
        self._dataset = dataset
        self._entropy = episode_entropy(dataset, seed)
        self._env = make_environment(dataset)
        self._routes = MazeRoutes(dataset.maze_map, dataset.cell_size)
        self._behavior = make_behavior(dataset)

    def record(self, index: int) -> Episode:
        """Return episode number `index`, from 0; it does not depend on the episodes recorded before."""
        rng = np.random.default_rng([*self._entropy, index])
        mix = self._dataset.mix
        kind = str(rng.choice(["direct", "detour", "wander"], p=[mix.direct, mix.detour, mix.wander]))
        noise = rng.uniform(*mix.noise)
        reset_seed = int(rng.integers(2**31))
        cells = self._cells()
        options = None
        if rng.random() < mix.random_start:
            options = {"reset_cell": np.array(cells[rng.integers(len(cells))])}
        observation, _ = self._env.reset(seed=reset_seed, options=options)

        waypoints = []
        if kind != "direct":
            low, high = mix.detour_cells if kind == "detour" else mix.wander_cells
            here = self._routes.cell(*observation["achieved_goal"].tolist())
            waypoints = self._waypoints(rng, cells, here, int(rng.integers(low, high + 1)))
        if kind != "wander":
            waypoints.append(goal_point(self._dataset, self._routes, observation))
        return self._play(rng, observation, waypoints, kind, noise)

    def attempt(self, seed: int, noise: float) -> Episode:
        """Return an episode that starts like an evaluation and goes directly to the goal.

        Args:
            seed: Seed of the environment and of the noise.
            noise: Standard deviation of the noise added to the actions.
        """
        observation, _ = self._env.reset(seed=seed)
        goal = goal_point(self._dataset, self._routes, observation)
        return self._play(np.random.default_rng(seed), observation, [goal], "direct", noise)

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()

    def _cells(self) -> list[Cell]:
        """Return the cells of `BehaviorMix.places`, without the goal's cell."""
        marks = "p" if self._dataset.mix.places == "picked" else "0rp"
        return [(row, column) for row, column in self._routes.free if self._dataset.maze[row][column] in marks]

    def _waypoints(
        self, rng: np.random.Generator, cells: list[Cell], here: Cell, count: int
    ) -> list[tuple[float, float]]:
        """Return points in `count` random cells; consecutive cells differ."""
        points = []
        for _ in range(count):
            others = [cell for cell in cells if cell != here]
            here = others[rng.integers(len(others))]
            x, y = self._routes.center(here)
            dx, dy = rng.uniform(-_JITTER, _JITTER, 2) * self._dataset.cell_size
            points.append((x + dx, y + dy))
        return points

    def _play(
        self,
        rng: np.random.Generator,
        observation: Any,
        waypoints: list[tuple[float, float]],
        kind: str,
        noise: float,
    ) -> Episode:
        route = Route(self._routes, waypoints, _ARRIVAL * self._dataset.cell_size)
        observations, actions, rewards = [observation], [], []
        terminated = truncated = fell = False
        while not (terminated or truncated):
            x, y = observation["achieved_goal"].tolist()
            body = observation["observation"]
            clean = self._behavior.act(body, x, y, route.target(x, y))
            action = np.clip(clean + noise * rng.standard_normal(len(clean)), -1.0, 1.0).astype(np.float32)
            observation, reward, terminated, truncated, _ = self._env.step(action)
            observations.append(observation)
            actions.append(action)
            rewards.append(float(reward))
            # A fallen ant cannot get up, and a `wander` episode ends at its last waypoint.
            fell = self._dataset.body == "ant" and ant_is_down(observation["observation"])
            truncated = truncated or fell or (kind == "wander" and route.finished)
        return Episode.of_steps(
            observations, actions, rewards, terminated=terminated, truncated=truncated, kind=kind, fell=bool(fell)
        )
