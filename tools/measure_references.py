"""Measure the reference returns of the collectable datasets: random actions (score 0) and the expert (score 100).

    python tools/measure_references.py [--datasets offrl/antmaze/umaze-v0 ...] [--episodes 100] [--seed 0]

All play the evaluation environment from its own starts, episode i with seed `seed + i`. The expert of a maze is the
planner that heads straight for the goal at the action noise of the collection. For a running or hopping body all levels
of the dataset are measured, with their own noise; the catalog holds these numbers, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np

from lit_offrl.collect.catalog import CATALOG, CollectedDataset, LocomotionDataset, MazeDataset
from lit_offrl.collect.episodes import Episode, make_environment
from lit_offrl.collect.locomotion_episodes import LocomotionRecorder
from lit_offrl.collect.maze_episodes import MazeRecorder

Row = tuple[float, bool, int]  # return, success, length
Player = Callable[[int], Row]


def row(episode: Episode) -> Row:
    return float(episode.rewards.sum()), episode.success, len(episode)


def random_actions(dataset: MazeDataset) -> Player:
    """Return what plays uniformly random actions."""
    env = make_environment(dataset)

    def play(seed: int) -> Row:
        env.reset(seed=seed)
        env.action_space.seed(seed)
        total, length, terminated, truncated = 0.0, 0, False, False
        while not (terminated or truncated):
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, length = total + float(reward), length + 1
        return total, bool(terminated), length

    return play


def planner(dataset: MazeDataset) -> Player:
    """Return what plays the behavior straight to the goal."""
    recorder = MazeRecorder(dataset, seed=0)
    return lambda seed: row(recorder.attempt(seed, np.random.default_rng(seed).uniform(*dataset.mix.noise)))


def level(dataset: LocomotionDataset, number: int) -> Player:
    """Return what plays a policy of the ladder."""
    recorder = LocomotionRecorder(dataset, seed=0)
    return lambda seed: row(recorder.attempt(seed, number))


def players(dataset: CollectedDataset) -> Iterator[tuple[str, Player]]:
    """Yield those worth measuring by name; the same name means the same numbers."""
    if isinstance(dataset, MazeDataset):
        yield f"{dataset.id} random", random_actions(dataset)
        yield f"{dataset.id} planner", planner(dataset)
    elif isinstance(dataset, LocomotionDataset):
        for number, step in enumerate(dataset.levels):
            yield f"{dataset.env_id} {step.name}", level(dataset, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(CATALOG), choices=list(CATALOG))
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.episodes)
    done = set()
    for dataset in arguments.datasets:
        for name, play in players(CATALOG[dataset]):
            if name in done:
                continue
            done.add(name)
            returns, successes, lengths = (np.array(column) for column in zip(*map(play, seeds), strict=True))
            reached = f"{lengths[successes].mean():.1f}" if successes.any() else "none"
            print(
                f"{name}: return {returns.mean():.4f} +- {returns.std():.4f}, success {successes.mean():.3f}, "
                f"length {lengths.mean():.1f} (of successes {reached}, longest {lengths.max()})",
                flush=True,
            )


if __name__ == "__main__":
    main()
