"""maze2d: Gymnasium-Robotics' point mass in D4RL's mazes (d4rl/pointmaze)."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from lit_offrl.envs.d4rl.contacts import restore_margins, restore_slide_weights

MAPS = {  # rows from the top; # wall, . free, G goal
    "open": "#######/#.....#/#..G..#/#.....#/#######",
    "umaze": "#####/#G..#/###.#/#...#/#####",
    "medium": "########/#..##..#/#..#...#/##...###/#..#...#/#.#..#.#/#...#.G#/########",
    "large": (
        "############/#....#.....#/#.##.#.#.#.#/#......#...#/#.####.###.#/#..#.#.....#/##.#.#.#.###/#..#...#.G.#/"
        "############"
    ),
    "eval-umaze": "#####/#..G#/#.###/#...#/#####",
    "eval-medium": "########/#.....G#/#.#.##.#/#....#.#/###..###/#......#/#..##..#/########",
    "eval-large": (
        "############/#..#...#.G.#/##.###.#.#.#/#..#.#.....#/#.##.#..##.#/#......#...#/#.##.#.#.###/#....#.....#/"
        "############"
    ),
}
RADIUS = 0.5  # around the target
# D4RL's ball has its origin 0.2 beside the cells' centers.
BESIDE_CENTER = 0.7


class Maze2D(gym.Wrapper[NDArray[np.float64], NDArray[np.float32], Any, Any]):
    """D4RL's point mass: observations are position and velocity, x grows with the row and y with the column.

    The reward is that of the state after the step: 1 within 0.5 of the target, or exp(-distance) in dense mazes. Only
    the time limit ends an episode.

    Args:
        maze: A key of `MAPS`.
        dense: Whether the reward is dense.
        mujoco2_contacts: See `lit_offrl.envs.d4rl.contacts`.
        **options: Of the simulator.
    """

    def __init__(self, maze: str, dense: bool, mujoco2_contacts: bool, **options: Any) -> None:
        rows = MAPS[maze].split("/")
        height, width = len(rows), len(rows[0])
        # Gymnasium-Robotics' y falls with the row and its x grows with the column: D4RL's map is turned by a quarter.
        turned = [[rows[row][width - 1 - i] for row in range(height)] for i in range(width)]
        cells = [[{"#": 1, ".": 0, "G": "g"}[cell] for cell in row] for row in turned]
        fixed = {"continuing_task": True, "reset_target": False, "disable_env_checker": True}
        super().__init__(gym.make("PointMaze_UMaze-v3", maze_map=cells, **fixed, **options).unwrapped)
        self.offset = np.array([height / 2, width / 2]) - BESIDE_CENTER
        self.starts = np.argwhere(np.array([[*row] for row in rows]) != "#")  # the goal's cell is one of them
        self.target = np.argwhere(np.array([[*row] for row in rows]) == "G")[0].astype(np.float64)
        self.dense = dense
        self.observation_space = Box(-np.inf, np.inf, (4,), np.float64)
        self.point: Any = self.unwrapped.point_env  # type: ignore[attr-defined]
        if mujoco2_contacts:
            restore_margins(self.point.model)
            restore_slide_weights(self.point.model)

    def reset(self, **options: Any) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Start in any cell."""
        _, info = super().reset(**options)
        robots: Any = self.unwrapped
        robots.goal = self.target - self.offset
        robots.update_target_site_pos()
        generator: np.random.Generator = robots.np_random
        position = generator.choice(self.starts) + generator.uniform(-0.1, 0.1, 2)
        self.point.set_state(position - self.offset, 0.1 * generator.standard_normal(2))
        return self.observation(), {**info, "success": False}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        """Perform a step of 0.01 s."""
        self.point.step(np.clip(action, -1, 1))
        observation = self.observation()
        distance = float(np.linalg.norm(observation[:2] - self.target))
        success = distance <= RADIUS
        return observation, np.exp(-distance) if self.dense else float(success), False, False, {"success": success}

    def observation(self) -> NDArray[np.float64]:
        """Return position and velocity, in D4RL's coordinates."""
        return np.concatenate([self.point.data.qpos + self.offset, self.point.data.qvel])


def make(name: str, mujoco2_contacts: bool, **options: Any) -> gym.Env[Any, Any]:
    """Build the environment of `maze2d-umaze-v1`, `maze2d-umaze-dense-v1` and the like."""
    maze = name.removeprefix("maze2d-").rsplit("-v", 1)[0]
    return Maze2D(maze.removesuffix("-dense"), maze.endswith("-dense"), mujoco2_contacts, **options)
