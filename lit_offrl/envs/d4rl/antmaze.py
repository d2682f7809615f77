"""antmaze: Gymnasium-Robotics' ant maze with D4RL's ant, starts and goals (d4rl/locomotion)."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from lit_offrl.envs.d4rl.contacts import restore_margins, unit_quaternion

# The mazes that D4RL evaluates in (those of d4rl/locomotion/maze_env.py that end in _TEST): one start r, one goal g.
MAPS = {
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
CELL = 4.0  # meters
RADIUS = 0.5  # meters around the goal that count as success
ROOT_QUATERNION = 3


class AntMaze(gym.Wrapper[NDArray[np.float64], NDArray[np.float32], Any, Any]):
    """D4RL's ant maze: observations are the ant's 15 positions and 14 velocities.

    The origin is the center of the start's cell, x grows with the column and y with the row. The reward is 1 at the
    step that reaches the goal, which ends the episode, and 0 otherwise. The ant's own test for a fall ends nothing.

    Args:
        maze: A key of `MAPS`.
        fixed_goal: Draw the goal once, when the environment is built, as v0 and v1 do; else at every reset.
        mujoco2_contacts: See `lit_offrl.envs.d4rl.contacts`.
        goal_seed: Seed of a goal that is drawn once; D4RL takes it from numpy's global generator.
        **options: Of the simulator.
    """

    def __init__(self, maze: str, fixed_goal: bool, mujoco2_contacts: bool, goal_seed: int = 0, **options: Any) -> None:
        rows = MAPS[maze]
        # In D4RL y grows with the row, in Gymnasium-Robotics it falls.
        cells = [[int(cell) if cell.isdigit() else cell for cell in row] for row in reversed(rows)]
        fixed = {"continuing_task": False, "reset_target": False, "disable_env_checker": True}
        super().__init__(gym.make("AntMaze_UMaze-v4", maze_map=cells, **fixed, **options).unwrapped)
        start, goal = (np.array(_find(rows, letter)) for letter in "rg")
        middle = np.array([len(rows[0]), len(rows)]) / 2 - 0.5
        self.offset = (middle - start) * CELL  # from the maze's middle, Gymnasium-Robotics' origin, to D4RL's
        self.goal_cell = (goal - start) * CELL
        self.unit_start = mujoco2_contacts
        self.observation_space = Box(-np.inf, np.inf, (29,), np.float64)

        robots: Any = self.unwrapped
        robots.position_noise_range = 0.0
        self.ant = robots.ant_env
        self.ant._reset_noise_scale = 0.1  # on all positions and velocities
        self.ant.model.opt.timestep = 0.02
        self.ant.model.actuator_gear[:, 0] = 30
        self.ant.model.geom_solimp[:, :3] = (0.8, 0.8, 0.01)
        if mujoco2_contacts:
            restore_margins(self.ant.model)
        self.goal = self._draw_goal(np.random.default_rng(goal_seed)) if fixed_goal else None

    def reset(self, **options: Any) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Start an episode."""
        _, info = super().reset(**options)
        robots: Any = self.unwrapped
        # Not from the maze's generator: it has the ant's seed, so that the goal would follow from the start's noise.
        goal = self._draw_goal(self.ant.np_random) if self.goal is None else self.goal
        robots.goal = goal - self.offset
        robots.update_target_site_pos()
        if self.unit_start:
            self.ant.set_state(unit_quaternion(self.ant.data.qpos, ROOT_QUATERNION), self.ant.data.qvel)
        return self.observation(), {**info, "success": False}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        """Perform a step of 0.1 s."""
        robots: Any = self.unwrapped
        self.ant.step(np.clip(action, -1, 1))
        observation = self.observation()
        success = bool(np.linalg.norm(observation[:2] - self.offset - robots.goal) <= RADIUS)
        return observation, float(success), success, False, {"success": success}

    def observation(self) -> NDArray[np.float64]:
        """Return positions and velocities, in D4RL's coordinates."""
        observation = np.concatenate([self.ant.data.qpos, self.ant.data.qvel])
        observation[:2] += self.offset
        return observation

    def _draw_goal(self, generator: np.random.Generator) -> NDArray[np.float64]:
        """Return a goal up to 1.5 m beyond the center of its cell, and never before the origin."""
        drawn: NDArray[np.float64] = self.goal_cell + generator.uniform(0, 1, 2) + generator.uniform(0, 0.5, 2)
        return np.maximum(drawn, 0)


def _find(rows: tuple[str, ...], letter: str) -> tuple[int, int]:
    """Return column and row of a letter."""
    row = next(row for row, cells in enumerate(rows) if letter in cells)
    return rows[row].index(letter), row


def make(name: str, mujoco2_contacts: bool, **options: Any) -> gym.Env[Any, Any]:
    """Build the environment of `antmaze-umaze-v2` and the like."""
    maze, version = name.removeprefix("antmaze-").rsplit("-v", 1)
    return AntMaze(maze, int(version) < 2, mujoco2_contacts, **options)
