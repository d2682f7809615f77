"""pen, door, hammer, relocate: Gymnasium-Robotics' hands with D4RL's rewards and ends (d4rl/hand_manipulation_suite).

The simulations are the same. `AdroitHandDoor-v1`, `AdroitHandHammer-v1` and `AdroitHandRelocate-v1` pay for a distance
between hand and object that D4RL charges for, so the rewards are computed here, from the state, as D4RL computes them.
`AdroitHandPen-v1` goes on when the pen has been dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from lit_offrl.envs.d4rl.contacts import restore_convex_collisions, restore_margins

HALF_MARGIN = 0.00025  # meters
PEN_HEIGHT, DROPPED = 26, 0.075  # place of the pen's height in the observation, and below what the pen is dropped


class Hand(gym.Wrapper[NDArray[np.float64], NDArray[np.float32], Any, Any]):
    """A hand whose reward is a function of the state after the step.

    Args:
        env: The environment of Gymnasium-Robotics.
        reward: Computes D4RL's reward from it; None where its own is D4RL's.
    """

    def __init__(self, env: gym.Env[Any, Any], reward: Callable[[Any], float] | None) -> None:
        super().__init__(env)
        self.reward = reward

    def step(self, action: NDArray[np.float32]) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Perform a step of 0.01 s."""
        observation, reward, terminated, truncated, info = super().step(action)
        if self.reward is not None:
            reward = self.reward(self.unwrapped)
        return observation, float(reward), terminated, truncated, info


class Pen(Hand):
    """The pen, whose episode ends when it is dropped."""

    def step(self, action: NDArray[np.float32]) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Perform a step of 0.01 s."""
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or bool(observation[PEN_HEIGHT] < DROPPED), truncated, info


def door_reward(env: Any) -> float:
    """D4RL's reward of door."""
    data, hinge = env.data, float(np.squeeze(env.data.qpos[env.door_hinge_addrs]))
    distance = np.linalg.norm(data.site_xpos[env.grasp_site_id] - data.site_xpos[env.handle_site_id])
    reward = -0.1 * distance - 0.1 * (hinge - 1.57) ** 2 - 1e-5 * np.sum(data.qvel**2)
    return float(reward + 2 * (hinge > 0.2) + 8 * (hinge > 1.0) + 10 * (hinge > 1.35))


def hammer_reward(env: Any) -> float:
    """D4RL's reward of hammer."""
    data = env.data
    hammer, palm = data.xpos[env.obj_body_id], data.site_xpos[env.S_grasp_site_id]
    head, nail = data.site_xpos[env.tool_site_id], data.site_xpos[env.target_obj_site_id]
    depth = np.linalg.norm(nail - data.site_xpos[env.goal_site_id])
    reward = -0.1 * np.linalg.norm(palm - hammer) - np.linalg.norm(head - nail) - 10 * depth
    reward -= 0.01 * np.linalg.norm(data.qvel)
    lifted = hammer[2] > 0.04 and head[2] > 0.04
    return float(reward + 2 * lifted + 25 * (depth < 0.02) + 75 * (depth < 0.01))


def relocate_reward(env: Any) -> float:
    """D4RL's reward of relocate."""
    data = env.data
    ball, palm = data.xpos[env.obj_body_id], data.site_xpos[env.S_grasp_site_id]
    target = data.site_xpos[env.target_obj_site_id]
    distance = np.linalg.norm(ball - target)
    reward = -0.1 * np.linalg.norm(palm - ball)
    if ball[2] > 0.04:
        reward += 1 - 0.5 * np.linalg.norm(palm - target) - 0.5 * distance
    return float(reward + 10 * (distance < 0.1) + 20 * (distance < 0.05))


REWARDS: dict[str, Callable[[Any], float] | None] = {
    "pen": None,
    "door": door_reward,
    "hammer": hammer_reward,
    "relocate": relocate_reward,
}


def make(name: str, mujoco2_contacts: bool, **options: Any) -> gym.Env[Any, Any]:
    """Build the environment of `pen-v0` and the like; v0 and v1 are the same."""
    task = name.partition("-")[0]
    env: Any = gym.make(f"AdroitHand{task.capitalize()}-v1", disable_env_checker=True, **options).unwrapped
    if mujoco2_contacts:
        restore_margins(env.model, HALF_MARGIN)
        restore_convex_collisions(env.model)
    return (Pen if task == "pen" else Hand)(env, REWARDS[task])
