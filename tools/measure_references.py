"""Measure the reference returns of the collectable datasets: random actions (score 0) and the planner (score 100).

    python tools/measure_references.py [--datasets offrl/antmaze/umaze-v0 ...] [--episodes 100] [--seed 0]

Both play the evaluation environment from its own starts, episode i with seed `seed + i`. The planner heads straight for
the goal at the action noise of the collection.
"""

from __future__ import annotations

import argparse

import numpy as np

from lit_offrl.collect.catalog import CATALOG, CollectedDataset
from lit_offrl.collect.episodes import EpisodeRecorder, make_environment

Row = tuple[float, bool, int]  # return, success, length


def random_actions(dataset: CollectedDataset, seeds: range) -> list[Row]:
    """Play uniformly random actions."""
    env = make_environment(dataset)
    rows = []
    for seed in seeds:
        env.reset(seed=seed)
        env.action_space.seed(seed)
        total, length, terminated, truncated = 0.0, 0, False, False
        while not (terminated or truncated):
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, length = total + float(reward), length + 1
        rows.append((total, bool(terminated), length))
    env.close()
    return rows


def planner(dataset: CollectedDataset, seeds: range) -> list[Row]:
    """Play the behavior straight to the goal."""
    recorder = EpisodeRecorder(dataset, seed=0)
    rows = []
    for seed in seeds:
        noise = np.random.default_rng(seed).uniform(*dataset.mix.noise)
        episode = recorder.attempt(seed, noise)
        rows.append((float(episode.rewards.sum()), episode.success, len(episode)))
    recorder.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(CATALOG), choices=list(CATALOG))
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.episodes)
    for name in arguments.datasets:
        for player, play in (("random", random_actions), ("planner", planner)):
            rows = play(CATALOG[name], seeds)
            returns, successes, lengths = (np.array(column) for column in zip(*rows, strict=True))
            reached = f"{lengths[successes].mean():.1f}" if successes.any() else "none"
            print(
                f"{name} {player}: return {returns.mean():.4f} +- {returns.std():.4f}, success {successes.mean():.3f}, "
                f"length {lengths.mean():.1f} (of successes {reached}, longest {lengths.max()})",
                flush=True,
            )


if __name__ == "__main__":
    main()
