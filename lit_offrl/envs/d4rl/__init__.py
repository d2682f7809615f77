"""D4RL's own environments, one family in one file, on the models of Gymnasium and Gymnasium-Robotics.

`D4RL/<name>` is the environment that D4RL plays a dataset in, e.g. `D4RL/antmaze-umaze-v2`, `D4RL/hopper-v2` or
`D4RL/maze2d-umaze-dense-v1`: its physics, observations, rewards, starts, goals and ends. Observations are float64
vectors. tests/test_d4rl_environments.py replays states and actions whose outcome was computed with D4RL's own models.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import gymnasium as gym

from lit_offrl.data.sources.d4rl import D4RL_NAMESPACE, d4rl_environment_names, d4rl_time_limit

FAMILIES: dict[str, str] = {  # the first word of a name -> the module whose `make` builds it
    **dict.fromkeys(("halfcheetah", "hopper", "walker2d", "ant"), "locomotion"),
    **dict.fromkeys(("pen", "door", "hammer", "relocate"), "adroit"),
    "antmaze": "antmaze",
    "maze2d": "maze2d",
    "kitchen": "kitchen",
}


def make_d4rl(name: str, mujoco2_contacts: bool = True, **options: Any) -> gym.Env[Any, Any]:
    """Build the environment of a D4RL name.

    Args:
        name: Name without the namespace, e.g. `antmaze-umaze-v2`.
        mujoco2_contacts: Compute contacts as MuJoCo 2 did, with which the published scores were made; see
            `lit_offrl.envs.d4rl.contacts`.
        **options: Of the simulator, e.g. `render_mode`.
    """
    module = import_module(f"lit_offrl.envs.d4rl.{FAMILIES[name.partition('-')[0]]}")
    make: Callable[..., gym.Env[Any, Any]] = module.make
    return make(name, mujoco2_contacts, **options)


def register_d4rl() -> None:
    """Register all names with Gymnasium."""
    for name in d4rl_environment_names():
        gym.register(
            f"{D4RL_NAMESPACE}{name}",
            entry_point="lit_offrl.envs.d4rl:make_d4rl",
            kwargs={"name": name},
            max_episode_steps=d4rl_time_limit(name),
        )
