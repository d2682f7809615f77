"""kitchen: Gymnasium-Robotics' Franka kitchen with D4RL's observations, noise and rewards (d4rl/kitchen)."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from lit_offrl.envs.d4rl.contacts import restore_convex_collisions, restore_margins, unit_quaternion

# Of the 30 positions (9 of the robot, then the objects): where an object's are, and its goal.
GOALS: dict[str, tuple[slice, tuple[float, ...]]] = {
    "bottom burner": (slice(11, 13), (-0.88, -0.01)),
    "light switch": (slice(17, 19), (-0.69, -0.05)),
    "slide cabinet": (slice(19, 20), (0.37,)),
    "microwave": (slice(22, 23), (-0.75,)),
    "kettle": (slice(23, 30), (-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06)),
}
TASKS = {
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}
NEAR = 0.3  # an object is where it should be within this Euclidean distance
# Half width of the uniform noise on each of the 30 positions.
NOISE = np.repeat([0.01, 0.0005, 0.00005, 0.0005, 0.01, 0.0005, 0.01, 0.0005], [9, 2, 6, 3, 3, 3, 3, 1])
PEDESTAL_RADIUS = 0.12  # of the cylinder below the robot
POSITIONS = np.r_[0:9, 18:39]  # among the 59 numbers of FrankaKitchen-v1
KETTLE_QUATERNION = 26  # its place among the 30 positions


class Kitchen(gym.Wrapper[Any, Any, Any, Any]):
    """D4RL's kitchen: observations are 30 noisy positions and the 30 numbers of the goal, which is constant.

    A task pays 1 when its object is seen near its goal for the first time; all tasks done end the episode. The robot's
    next position is commanded relative to the last noisy one.

    Args:
        tasks: Names of `GOALS`.
        mujoco2_contacts: See `lit_offrl.envs.d4rl.contacts`.
        **options: Of the simulator.
    """

    def __init__(self, tasks: tuple[str, ...], mujoco2_contacts: bool, **options: Any) -> None:
        noiseless: dict[str, Any] = {"object_noise_ratio": 0.0, "robot_noise_ratio": 0.0, "disable_env_checker": True}
        super().__init__(gym.make("FrankaKitchen-v1", **noiseless, **options).unwrapped)
        self.tasks = self.remaining = tasks
        self.goal = np.zeros(30)
        for task in tasks:
            place, goal = GOALS[task]
            self.goal[place] = goal
        self.observation_space = Box(-np.inf, np.inf, (60,), np.float64)
        self.robot: Any = self.unwrapped.robot_env  # type: ignore[attr-defined]
        _leave_out_pedestal(self.robot.model)
        if mujoco2_contacts:
            restore_margins(self.robot.model)
            restore_convex_collisions(self.robot.model)
            self.robot.init_qpos = unit_quaternion(self.robot.init_qpos, KETTLE_QUATERNION)

    def reset(self, **options: Any) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Start an episode: always the same state, with other noise."""
        observation, _ = super().reset(**options)
        self.remaining = self.tasks
        return self.seen(observation["observation"]), {"success": False}

    def step(self, action: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        """Perform a step of 0.08 s."""
        result, *_ = super().step(np.clip(action, -1, 1))
        observation = self.seen(result["observation"])
        done = [task for task in self.remaining if self._is_done(task, observation)]
        self.remaining = tuple(task for task in self.remaining if task not in done)
        success = not self.remaining
        return observation, float(len(done)), success, False, {"success": success}

    def seen(self, noiseless: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return D4RL's 60 numbers for the 59 of FrankaKitchen-v1, with noise on the positions."""
        positions = noiseless[POSITIONS] + NOISE * self.draw_noise()
        self.robot._last_robot_qpos = positions[:9].copy()  # what the next action is relative to
        return np.concatenate([positions, self.goal])

    def draw_noise(self) -> NDArray[np.float64]:
        """Return 30 numbers between -1 and 1."""
        return self.robot.np_random.uniform(-1, 1, 30)  # type: ignore[no-any-return]

    def _is_done(self, task: str, observation: NDArray[np.float64]) -> bool:
        place, goal = GOALS[task]
        return bool(np.linalg.norm(observation[place] - np.array(goal)) < NEAR)


def _leave_out_pedestal(model: Any) -> None:
    """Let nothing collide with the cylinder below the robot, as in D4RL."""
    cylinders = model.geom_type == mujoco.mjtGeom.mjGEOM_CYLINDER
    pedestal = cylinders & np.isclose(model.geom_size[:, 0], PEDESTAL_RADIUS)
    model.geom_contype[pedestal] = model.geom_conaffinity[pedestal] = 0


def make(name: str, mujoco2_contacts: bool, **options: Any) -> gym.Env[Any, Any]:
    """Build the environment of `kitchen-complete-v0` and the like."""
    return Kitchen(TASKS[name.split("-")[1]], mujoco2_contacts, **options)
