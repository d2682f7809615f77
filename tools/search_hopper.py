"""Search the linear policies that collect the hopper data, by augmented random search.

    python tools/search_hopper.py --steps 600000 --output ladder
    python tools/train_locomotion.py --evaluate ladder/Hopper-v5_*.npz

The search takes five minutes on one core, and a policy has 33 weights. (Soft actor-critic with the settings of
`train_locomotion.py` reaches a return of only 530 in 100,000 steps of Hopper-v5.) Every rollout has the action noise of
the later collection, so that the policies are robust against it. The script writes a checkpoint every 25,000 steps,
which `lit_offrl.collect.behaviors.LinearActor` reads. The checkpoints of Hopper-v5 in lit_offrl/collect/artifacts were
made with the defaults.

Source: Mania, Guy and Recht, "Simple random search of static linear policies" (2018), algorithm 2, ARS V2-t.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

ENVIRONMENT = "Hopper-v5"
ALIVE_BONUS = 1.0  # reward per step that the search subtracts; with it, standing still would be a good policy
DIRECTIONS, BEST_DIRECTIONS = 8, 4
STEP_SIZE, EXPLORATION = 0.02, 0.03
NOISE = 0.1  # standard deviation of the action noise
EVALUATIONS = 5


class Statistics:
    """Running mean and standard deviation of observations."""

    def __init__(self, size: int) -> None:
        self._count, self._sum, self._squares = 1e-4, np.zeros(size), np.zeros(size)

    def add(self, observation: NDArray[np.float64]) -> None:
        """Add an observation."""
        self._count += 1
        self._sum += observation
        self._squares += observation**2

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of each dimension."""
        return self._sum / self._count

    @property
    def scale(self) -> NDArray[np.float64]:
        """Standard deviation of each dimension, at least 0.01."""
        return np.sqrt(np.maximum(self._squares / self._count - self.mean**2, 1e-4))


def rollout(
    env: gymnasium.Env[Any, Any],
    weight: NDArray[np.float64],
    bias: NDArray[np.float64],
    rng: np.random.Generator,
    statistics: Statistics | None = None,
) -> tuple[float, int]:
    """Play an episode with actions `weight @ observation + bias`; return its return and length.

    Observations are added to `statistics`, where these are given.
    """
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    total, length, ended = 0.0, 0, False
    while not ended:
        if statistics is not None:
            statistics.add(observation)
        action = np.clip(weight @ observation + bias + NOISE * rng.standard_normal(len(bias)), -1, 1)
        observation, reward, terminated, truncated, _ = env.step(action)
        total, length, ended = total + float(reward), length + 1, terminated or truncated
    return total, length


def search(steps: int, every: int, seed: int, output: Path) -> None:
    """Search a policy, and write a checkpoint every `every` environment steps."""
    output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    env = gymnasium.make(ENVIRONMENT)
    (observation_dim,), (action_dim,) = env.observation_space.shape or (), env.action_space.shape or ()
    statistics = Statistics(observation_dim)
    weight = np.zeros((action_dim, observation_dim))
    done, next_save, begin = 0, every, time.monotonic()
    while done < steps:
        mean, scale = statistics.mean, statistics.scale  # constant during an iteration
        directions = rng.standard_normal((DIRECTIONS, *weight.shape))
        rewards = np.empty((DIRECTIONS, 2))
        for index, direction in enumerate(directions):
            for side, sign in enumerate((1, -1)):
                scaled = (weight + sign * EXPLORATION * direction) / scale
                total, length = rollout(env, scaled, -scaled @ mean, rng, statistics)
                rewards[index, side] = total - ALIVE_BONUS * length
                done += length
        best = np.argsort(-rewards.max(axis=1))[:BEST_DIRECTIONS]
        gains = rewards[best, 0] - rewards[best, 1]
        weight += (
            STEP_SIZE / (BEST_DIRECTIONS * (rewards[best].std() + 1e-6)) * np.tensordot(gains, directions[best], 1)
        )
        if done >= next_save:
            scaled = weight / scale
            scores = np.array([rollout(env, scaled, -scaled @ mean, rng)[0] for _ in range(EVALUATIONS)])
            np.savez_compressed(
                output / f"{ENVIRONMENT}_{next_save // 1000}k.npz",
                weight=weight.astype(np.float16),
                mean=mean.astype(np.float16),
                scale=scale.astype(np.float16),
                noise=np.float16(NOISE),
                ret=scores.mean(),
            )
            print(f"{done}: {scores.mean():.0f} +- {scores.std():.0f}, {time.monotonic() - begin:.0f} s", flush=True)
            next_save = (done // every + 1) * every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600_000)
    parser.add_argument("--every", type=int, default=25_000, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("ladder"), help="folder of the checkpoints")
    arguments = parser.parse_args()
    search(arguments.steps, arguments.every, arguments.seed, arguments.output)


if __name__ == "__main__":
    main()
