"""Episodes of bodies that run or hop, by policies from the ladder of a training."""

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
        env: With a plain vector for an observation; where it terminates, the body fell.
        actor: The policy.
        rng: Of the policy's noise; None for none.
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
    """Plays the episodes of a locomotion dataset, in any order, one at a time.

    Args:
        dataset: What to collect.
        seed: Seed of the whole dataset.
    """

    def __init__(self, dataset: LocomotionDataset, seed: int) -> None:
        self._entropy = episode_entropy(dataset, seed)
        self._env = make_environment(dataset)
        self._levels = dataset.levels
        self._actors = [self._actor(dataset.env_id, level) for level in dataset.levels]
        # Levels with short episodes play more of them, for equal shares of the transitions.
        frequencies = [1 / level.mean_length for level in dataset.levels]
        self._bounds = [bound / sum(frequencies) for bound in accumulate(frequencies[:-1])]

    def record(self, index: int) -> Episode:
        """Return episode number `index`; what was recorded before makes no difference.

        Args:
            index: From 0.
        """
        # Multiples of the golden ratio spread evenly: any stretch of episodes has the levels in the right proportions.
        level = bisect(self._bounds, index * _GOLDEN_RATIO % 1.0)
        rng = np.random.default_rng([*self._entropy, index])
        return self._play(level, rng, int(rng.integers(2**31)))

    def attempt(self, seed: int, level: int) -> Episode:
        """Return an episode of one of the dataset's levels, with the policy's own noise.

        Args:
            seed: Of the environment and of the noise.
            level: Its place in `dataset.levels`.
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
