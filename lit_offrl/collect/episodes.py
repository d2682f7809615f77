"""One episode of a collected dataset: a pure function of the dataset's id, the seed and the episode's number."""

from __future__ import annotations

import contextlib
import io
import warnings
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_offrl.collect.behaviors import AntWalker, Behavior, PointController, ant_is_down
from lit_offrl.collect.catalog import CollectedDataset
from lit_offrl.collect.mazes import Cell, MazeRoutes, Route

if TYPE_CHECKING:
    import gymnasium

_ARRIVAL = 0.25  # of a cell: an intermediate point counts as visited from here
_JITTER = 0.25  # of a cell: how far intermediate points lie off the centers of their cells


@dataclass(frozen=True)
class Episode:
    """What happened in one episode of T steps.

    Attributes:
        observations: Each part of the dictionary observation, `[T + 1, dim]`.
        actions: `[T, action_dim]`.
        rewards: `[T]`.
        terminations: `[T]`, true at the goal.
        truncations: `[T]`, true where the episode was cut off.
        kind: `direct`, `detour` or `wander`, see `catalog.BehaviorMix`.
        fell: Whether the body fell over, which ends the episode.
    """

    observations: dict[str, NDArray[np.float64]]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    kind: str
    fell: bool

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def success(self) -> bool:
        """Whether the goal was reached."""
        return bool(self.terminations[-1])

    def cut(self, steps: int) -> Episode:
        """Return the first `steps` steps, cut off there unless the episode is no longer than that."""
        if steps >= len(self):
            return self
        truncations = self.truncations[:steps].copy()
        truncations[-1] = True
        return Episode(
            observations={key: part[: steps + 1] for key, part in self.observations.items()},
            actions=self.actions[:steps],
            rewards=self.rewards[:steps],
            terminations=self.terminations[:steps],
            truncations=truncations,
            kind=self.kind,
            fell=False,
        )


def make_environment(dataset: CollectedDataset) -> gymnasium.Env[Any, Any]:
    """Return the environment that the dataset is collected and its policies are evaluated in."""
    # gymnasium warns that the environments are old, gymnasium-robotics announces unrelated changes when imported.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import gymnasium
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)
        return gymnasium.make(
            dataset.env_id,
            max_episode_steps=dataset.max_episode_steps,
            disable_env_checker=True,
            **dataset.env_kwargs,
        )


def make_behavior(dataset: CollectedDataset) -> Behavior:
    """Return the policy that drives the dataset's body."""
    return AntWalker() if dataset.body == "ant" else PointController()


def goal_point(dataset: CollectedDataset, routes: MazeRoutes, observation: dict[str, Any]) -> tuple[float, float]:
    """Return where the behavior takes the goal to be, in meters: no more than a learner can know."""
    x, y = observation["desired_goal"].tolist()
    return (x, y) if "desired_goal" in dataset.observation_keys else routes.center(routes.cell(x, y))


class EpisodeRecorder:
    """Plays the episodes of a dataset, in any order, one at a time.

    Args:
        dataset: What to collect.
        seed: Seed of the whole dataset.
    """

    def __init__(self, dataset: CollectedDataset, seed: int) -> None:
        self._dataset = dataset
        self._entropy = (zlib.crc32(dataset.id.encode()), seed)
        self._env = make_environment(dataset)
        self._routes = MazeRoutes(dataset.maze_map, dataset.cell_size)
        self._behavior = make_behavior(dataset)

    def record(self, index: int) -> Episode:
        """Return episode number `index`; what was recorded before makes no difference.

        Args:
            index: From 0.
        """
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
        """Return an episode that starts as evaluations do and heads straight for the goal.

        Args:
            seed: Of the environment and of the noise.
            noise: Standard deviation of the noise added to the actions.
        """
        observation, _ = self._env.reset(seed=seed)
        goal = goal_point(self._dataset, self._routes, observation)
        return self._play(np.random.default_rng(seed), observation, [goal], "direct", noise)

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()

    def _cells(self) -> list[Cell]:
        """Return the free cells but the goal's, which is left to the episodes that mean to go there."""
        return [(row, column) for row, column in self._routes.free if self._dataset.maze[row][column] != "g"]

    def _waypoints(
        self, rng: np.random.Generator, cells: list[Cell], here: Cell, count: int
    ) -> list[tuple[float, float]]:
        """Return points in `count` random cells, each another one than the cell before."""
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
            # A fallen ant never gets up, and a wanderer that has arrived has nothing left to do.
            fell = self._dataset.body == "ant" and ant_is_down(observation["observation"])
            truncated = truncated or fell or (kind == "wander" and route.finished)
        ends = np.zeros((2, len(rewards)), dtype=bool)
        ends[:, -1] = terminated, truncated and not terminated
        return Episode(
            observations={
                key: np.stack([observation[key] for observation in observations]) for key in sorted(observation)
            },
            actions=np.stack(actions),
            rewards=np.array(rewards),
            terminations=ends[0],
            truncations=ends[1],
            kind=kind,
            fell=bool(fell),
        )
