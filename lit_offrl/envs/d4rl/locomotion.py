"""halfcheetah, hopper, walker2d and ant: Gymnasium's v4 environments are gym's v2 environments, which D4RL uses."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from lit_offrl.envs.d4rl.contacts import restore_margins, unit_quaternion

IDS = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}
ANT_CONTACT_FORCES = 84  # 14 bodies x 6 numbers, which MuJoCo 2 never computed: zeros
ROOT_QUATERNION = 3  # its place among the ant's positions


class Locomotion(gym.Wrapper[NDArray[np.float64], NDArray[np.float32], Any, Any]):
    """A robot whose actions are clipped before the step, so that the control cost is that of what the motors do."""

    def step(self, action: NDArray[np.float32]) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Perform a step."""
        return super().step(np.clip(action, -1, 1))


class Ant(Locomotion):
    """The ant, whose observation has 111 numbers: 27 and the zeros that stand for contact forces."""

    def __init__(self, env: gym.Env[Any, Any], unit_start: bool) -> None:
        super().__init__(env)
        self.unit_start = unit_start
        self.observation_space = Box(-np.inf, np.inf, (27 + ANT_CONTACT_FORCES,), np.float64)

    def reset(self, **options: Any) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Start an episode; with MuJoCo 2's contacts the noisy quaternion of the start has length 1."""
        observation, info = super().reset(**options)
        if self.unit_start:
            robot: Any = self.unwrapped
            robot.set_state(unit_quaternion(robot.data.qpos, ROOT_QUATERNION), robot.data.qvel)
            observation = robot._get_obs()
        return self._padded(observation), info

    def step(self, action: NDArray[np.float32]) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Perform a step."""
        observation, *rest = super().step(action)
        return self._padded(observation), *rest

    def _padded(self, observation: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([observation, np.zeros(ANT_CONTACT_FORCES)])


def make(name: str, mujoco2_contacts: bool, **options: Any) -> gym.Env[Any, Any]:
    """Build the environment of `hopper-v2` and the like; v0, v1 and v2 are the same."""
    robot = name.partition("-")[0]
    env = gym.make(IDS[robot], disable_env_checker=True, **options).unwrapped
    if mujoco2_contacts:
        restore_margins(env.model)  # type: ignore[attr-defined]
    return Ant(env, unit_start=mujoco2_contacts) if robot == "ant" else Locomotion(env)
