"""The environment in which policies trained on a dataset are evaluated."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import TransformObservation
from numpy.typing import NDArray

from lit_offrl.data.info import DatasetInfo, EnvironmentInfo
from lit_offrl.data.sources import source_of
from lit_offrl.data.sources.d4rl import D4RL_NAMESPACE
from lit_offrl.data.sources.ogbench import OGBENCH_NAMESPACE
from lit_offrl.envs.protocol import with_contacts
from lit_offrl.errors import UserError, did_you_mean, one_line
from lit_offrl.system.files import no_files_left

FlatEnv = gym.Env[NDArray[np.float32], NDArray[np.float32]]
"""An environment whose observations and actions are flat float32 vectors."""


def environment_for(info: DatasetInfo, mujoco2_contacts: bool = True) -> EnvironmentInfo:
    """Return the environment for evaluating policies trained on a dataset.

    The dataset names the environment: D4RL's own for original files, that of the data for Minari's D4RL datasets, with
    the goals and time limits of D4RL's evaluation.

    Args:
        info: The dataset.
        mujoco2_contacts: Whether D4RL's own environments compute contacts as MuJoCo 2 did.

    Raises:
        UserError: The dataset names no environment.
    """
    environment = source_of(info).environment(info)
    if environment is None:
        note = f" ({info.environment_note})" if info.environment_note else ""
        raise UserError(
            f"{info.id}: no environment is known for this dataset{note}, so policies cannot be evaluated on it: "
            "name one with --data.environment, e.g. Hopper-v5, or train with --evaluation.enabled false"
        )
    return replace(environment, kwargs=with_contacts(environment, mujoco2_contacts))


def make_env(environment: EnvironmentInfo, observation_keys: tuple[str, ...] | None = None) -> FlatEnv:
    """Build an environment with flat float32 observations `[observation_dim]`.

    Args:
        environment: Id, keyword arguments and time limit.
        observation_keys: Keys of a dictionary observation whose values are concatenated in this order; None if
            observations are plain vectors. `a/b` is the key `b` of the dictionary at key `a`.

    Raises:
        UserError: See `build_env`; or the observations do not have these keys.
    """
    env = build_env(environment)
    try:
        return _flatten(env, observation_keys)
    except UserError as error:
        env.close()
        raise UserError(f"environment '{environment.env_id}': {error}") from None


def build_env(environment: EnvironmentInfo) -> gym.Env[Any, Any]:
    """Build an environment without the messages and warnings of simulators.

    Raises:
        UserError: The environment is unknown, its package is missing, or it cannot be built.
    """
    with _silence(), no_files_left():
        if environment.env_id not in gym.registry:
            with contextlib.suppress(ImportError):
                import gymnasium_robotics

                gym.register_envs(gymnasium_robotics)
            if environment.env_id.startswith(D4RL_NAMESPACE):
                from lit_offrl.envs.d4rl import register_d4rl

                register_d4rl()
        make: Callable[..., gym.Env[Any, Any]] = gym.make
        if environment.env_id.startswith(OGBENCH_NAMESPACE):
            from lit_offrl.envs.ogbench import make_ogbench as make
        try:
            env = make(
                environment.env_id,
                max_episode_steps=environment.max_episode_steps,
                disable_env_checker=True,
                **environment.kwargs,
            )
        except UserError:
            raise
        except (gym.error.UnregisteredEnv, ModuleNotFoundError) as error:
            raise UserError(
                f"environment '{environment.env_id}' is not known"
                f"{did_you_mean(environment.env_id, gym.registry) or ': is its package installed?'} "
                f"({one_line(error)[:200]}); one that a module of your own registers is named my_module:Id"
            ) from error
        except Exception as error:  # whatever a simulator raises
            raise UserError(f"environment '{environment.env_id}' cannot be built: {one_line(error)[:200]}") from error
    return env


def _flatten(env: gym.Env[Any, Any], keys: tuple[str, ...] | None) -> FlatEnv:
    # gymnasium's FlattenObservation concatenates in alphabetical order only.
    space = env.observation_space
    parts: list[gym.Space[Any]]
    if isinstance(space, Dict):
        leaves = dict(_leaves(space))
        if keys is None or not set(keys) <= set(leaves):
            raise UserError(f"its observation has the keys {', '.join(leaves)}; the dataset uses {keys}")
        parts = [leaves[key] for key in keys]
    elif keys is not None:
        raise UserError(f"its observation is no dictionary; the dataset uses the keys {', '.join(keys)}")
    else:
        parts = [space]
    shapes = [part.shape for part in parts if isinstance(part, Box) and len(part.shape) == 1]
    if len(shapes) != len(parts):
        kinds = ", ".join(sorted({type(part).__name__ for part in parts if not isinstance(part, Box)})) or "not flat"
        raise UserError(f"only observations made of vectors of numbers can be used, not {kinds}")
    width = sum(size for (size,) in shapes)

    def vector(observation: Any) -> NDArray[np.float32]:
        flat = observation if keys is None else np.concatenate([_at(observation, key) for key in keys])
        return np.asarray(flat, dtype=np.float32)

    return TransformObservation(env, vector, Box(-np.inf, np.inf, (width,), np.float32))


def _leaves(space: Dict, prefix: str = "") -> Iterator[tuple[str, gym.Space[Any]]]:
    for key, part in space.items():
        if isinstance(part, Dict):
            yield from _leaves(part, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", part


def _at(observation: Any, key: str) -> NDArray[np.floating]:
    for step in key.split("/"):
        observation = observation[step]
    part: NDArray[np.floating] = observation
    return part


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    # gymnasium warns that v3 and v4 environments are old, but data were recorded in them. gymnasium-robotics prints to
    # standard error, in every program that imports it, that rewards of its hands have changed; lit_offrl.envs.protocol
    # says so where such a hand is played.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
