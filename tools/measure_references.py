"""Measure the reference returns of the collectable datasets: random actions (score 0) and the expert (score 100).

    python tools/measure_references.py [--datasets offrl/antmaze/umaze-v0 ...] [--episodes 100] [--seed 0]

Every policy plays the evaluation environment from the environment's own starts, episode i with seed `seed + i`. The
expert of a maze is the planner that goes straight to the goal, with the action noise of the collection. For locomotion
all policies of the dataset are measured, with their own noise. `lit_offrl/collect/catalog.py` holds the results.
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


def summarize(episode: Episode) -> Row:
    return float(episode.rewards.sum()), episode.success, len(episode)


def random_actions(dataset: MazeDataset) -> Player:
    """Return a player of uniformly random actions."""
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
    """Return a player of the behavior policy that goes straight to the goal."""
    recorder = MazeRecorder(dataset, seed=0)
    return lambda seed: summarize(recorder.attempt(seed, np.random.default_rng(seed).uniform(*dataset.mix.noise)))


def level(dataset: LocomotionDataset, number: int) -> Player:
    """Return a player of one of the dataset's policies."""
    recorder = LocomotionRecorder(dataset, seed=0)
    return lambda seed: summarize(recorder.attempt(seed, number))


def players(dataset: CollectedDataset) -> Iterator[tuple[str, Player]]:
    """Yield the players to measure with their names; players of the same name give the same numbers."""
    if isinstance(dataset, MazeDataset):
        yield f"{dataset.id} random", random_actions(dataset)
        yield f"{dataset.id} planner", planner(dataset)
    elif isinstance(dataset, LocomotionDataset):
        for number, step in enumerate(dataset.levels):
            yield f"{dataset.env_id} {step.name}", level(dataset, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(CATALOG), choices=list(CATALOG))
    parser.add_argument("--episodes", type=int, default=100, help="number of episodes of each policy")
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
