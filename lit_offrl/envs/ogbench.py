"""OGBench's single-task environments, whose episodes repeat from their seeds.

`ogbench/<name>` is the package's own environment, e.g. `ogbench/cube-single-singletask-task2-v0`. Since version 1.2 of
the package, reward, success and the end of an episode belong to the state before the action, as in the data.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from lit_offrl.data.formats.ogbench import build_task
from lit_offrl.data.sources.ogbench import OGBENCH_NAMESPACE
from lit_offrl.errors import UserError
from lit_offrl.system.global_state import as_a_guest


class RepeatableTask(gym.Wrapper[NDArray[np.float64], NDArray[np.float32], Any, Any]):
    """A task whose episodes are functions of their seeds and actions.

    OGBench's mazes draw the start of an episode from numpy's global generator, their first random steps from the action
    space, and the exit of a teleport from the global generator again. Here each maze has a generator of its own.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        # Manipulation makes new spaces whenever it is asked for them.
        self.action_space, self.observation_space = env.action_space, env.observation_space
        self.has_teleports = getattr(env.unwrapped, "_teleport_info", None) is not None
        self.draws = np.random.RandomState()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        if seed is not None:
            self.action_space.seed(seed)
            self.draws.seed(seed % 2**32)
        with as_a_guest(self.draws):
            return super().reset(seed=seed, options=options)

    def step(self, action: NDArray[np.float32]) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Perform a step."""
        if not self.has_teleports:  # an exchange of generators takes as long as a step of the point
            return super().step(action)
        with as_a_guest(self.draws):
            return super().step(action)


def make_ogbench(env_id: str, **options: Any) -> gym.Env[Any, Any]:
    """Build an environment.

    Args:
        env_id: Id with the namespace, e.g. `ogbench/antmaze-large-singletask-task1-v0`.
        **options: Of the package's environment, e.g. `max_episode_steps` or `render_mode`.

    Raises:
        UserError: The package is missing, or the environment is goal-conditioned.
    """
    name = env_id.removeprefix(OGBENCH_NAMESPACE)
    if "-singletask" not in name:
        raise UserError(f"environment '{env_id}' has no task: single tasks are named like {env_id[:-3]}-singletask-v0")
    return RepeatableTask(build_task(name, **options))
