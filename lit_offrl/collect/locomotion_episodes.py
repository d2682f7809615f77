"""Episodes of running and hopping bodies, by snapshots of a training."""

from __future__ import annotations

from bisect import bisect
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_offrl.collect.behaviors import ARTIFACTS, Actor, UniformActor, load_actor
from lit_offrl.collect.catalog import Level, LocomotionDataset
from lit_offrl.collect.episodes import Episode, episode_entropy, make_environment

if TYPE_CHECKING:
    import gymnasium

_GOLDEN_RATIO = (5**0.5 - 1) / 2


def play(
    env: gymnasium.Env[Any, Any], actor: Actor, rng: np.random.Generator | None, reset_seed: int, kind: str = ""
) -> Episode:
    """Return one episode of a policy.

    Args:
        env: An environment with vector observations that terminates when the body falls.
        actor: The policy.
        rng: Generator of the policy's noise; None for no noise.
        reset_seed: Seed of the environment.
        kind: Name of the policy.
    """
    observation, _ = env.reset(seed=reset_seed)
    observations, actions, rewards = [observation], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        action = actor.act(observation, rng).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(float(reward))
    return Episode.of_steps(
        [{"observation": each} for each in observations],
        actions,
        rewards,
        terminated=terminated,
        truncated=truncated,
        kind=kind,
        fell=bool(terminated),
    )


class LocomotionRecorder:
    """Records the episodes of a locomotion dataset, one at a time and in any order.

    Args:
        dataset: The dataset.
        seed: Seed of the whole dataset.
    """

    def __init__(self, dataset: LocomotionDataset, seed: int) -> None:
        self._entropy = episode_entropy(dataset, seed)
        self._env = make_environment(dataset)
        self._levels = dataset.levels
        self._actors = [self._actor(dataset.env_id, level) for level in dataset.levels]
        # Policies with short episodes have more of them, so that all have equal shares of the transitions.
        frequencies = [1 / level.mean_length for level in dataset.levels]
        self._bounds = [bound / sum(frequencies) for bound in accumulate(frequencies[:-1])]

    def record(self, index: int) -> Episode:
        """Return episode number `index`, from 0; it does not depend on the episodes recorded before."""
        # Multiples of the golden ratio modulo 1 spread evenly, so that any range of episodes has the right shares.
        level = bisect(self._bounds, index * _GOLDEN_RATIO % 1.0)
        rng = np.random.default_rng([*self._entropy, index])
        return self._play(level, rng, int(rng.integers(2**31)))

    def attempt(self, seed: int, level: int) -> Episode:
        """Return an episode of one of the policies, with its own noise.

        Args:
            seed: Seed of the environment and of the noise.
            level: Index of the policy in `dataset.levels`.
        """
        return self._play(level, np.random.default_rng(seed), seed)

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()

    def _actor(self, env_id: str, level: Level) -> Actor:
        if level.name == "random":
            (action_dim,) = self._env.action_space.shape or ()
            return UniformActor(action_dim)
        return load_actor(ARTIFACTS / f"{env_id}_{level.name}.npz")

    def _play(self, level: int, rng: np.random.Generator, reset_seed: int) -> Episode:
        return play(self._env, self._actors[level], rng, reset_seed, self._levels[level].name)
