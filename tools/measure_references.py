"""Measure the reference returns of the collectable datasets: random actions (score 0) and the planner (score 100).

    python tools/measure_references.py [--datasets offrl/antmaze/umaze-v0 ...] [--episodes 100] [--seed 0]

Both play the evaluation environment from its own starts, episode i with seed `seed + i`.
"""

from __future__ import annotations

import argparse

import numpy as np

from lit_offrl.collect.catalog import CATALOG, Recipe, recipe_for
from lit_offrl.collect.recorder import EpisodePlayer
from lit_offrl.envs.make import make_env

Row = tuple[float, bool, int]  # return, success, length


def random_actions(recipe: Recipe, episodes: int, seed: int) -> list[Row]:
    """Play uniformly random actions."""
    env = make_env(recipe.environment, recipe.observation_keys)
    rows = []
    for number in range(seed, seed + episodes):
        env.reset(seed=number)
        env.action_space.seed(number)
        total, length, done = 0.0, 0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, length, done = total + float(reward), length + 1, terminated or truncated
        rows.append((total, bool(terminated), length))
    env.close()
    return rows


def planner(recipe: Recipe, episodes: int, seed: int) -> list[Row]:
    """Play the behavior straight to the goal, at the noise of the collection."""
    player = EpisodePlayer(recipe, seed)
    rows = []
    for number in range(seed, seed + episodes):
        rng = np.random.default_rng(number)
        noise = float(rng.uniform(*recipe.action_noise))
        episode = player.walk("direct", number, None, 0, noise, rng)
        rows.append((float(episode.rewards.sum()), episode.terminated, len(episode)))
    player.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(CATALOG))
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for dataset in arguments.datasets:
        for name, play in (("random", random_actions), ("planner", planner)):
            rows = play(recipe_for(dataset), arguments.episodes, arguments.seed)
            returns, successes, lengths = (np.array(column) for column in zip(*rows, strict=True))
            reached = f"{lengths[successes].mean():.1f}" if successes.any() else "none"
            print(
                f"{dataset} {name}: return {returns.mean():.4f} +- {returns.std():.4f}, "
                f"success {successes.mean():.3f}, length {lengths.mean():.1f} (of successes {reached}, longest {lengths.max()})",
                flush=True,
            )


if __name__ == "__main__":
    main()
