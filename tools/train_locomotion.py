"""Train the policies that collect the locomotion data, from poor to good, or evaluate their checkpoints.

    pip install -e '.[behaviors]'
    python tools/train_locomotion.py Walker2d-v5 --steps 200000 --output ladder
    python tools/train_locomotion.py --evaluate ladder/Walker2d-v5_*.npz

The algorithm is soft actor-critic. Training takes about half an hour on one core and writes a checkpoint every 25,000
steps, which `lit_offrl.collect.behaviors.SACActor` reads. The checkpoints of HalfCheetah-v5 and Walker2d-v5 in
lit_offrl/collect/artifacts were made with the defaults.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from lit_offrl.collect.behaviors import Actor, load_actor
from lit_offrl.collect.locomotion_episodes import play

SAVING_SEEDS = range(100, 105)  # episodes whose mean return is saved with a checkpoint
UNSEEN_SEEDS = range(1000, 1010)  # episodes of `--evaluate`


def returns(
    env: gymnasium.Env[Any, Any], actor: Actor, seeds: range, noise: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the returns and lengths of one episode per seed, with the policy's own noise or without noise."""
    episodes = [play(env, actor, np.random.default_rng(seed) if noise else None, seed) for seed in seeds]
    return np.array([episode.rewards.sum() for episode in episodes]), np.array([len(e) for e in episodes], float)


class Trainee:
    """The policy under training, without noise."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def act(self, observation: NDArray[np.floating], rng: np.random.Generator | None) -> NDArray[np.float64]:
        """Return the mode of the policy; `rng` is not used."""
        action: NDArray[np.float64] = self.model.predict(observation, deterministic=True)[0]
        return action


def train(env_id: str, steps: int, every: int, seed: int, output: Path) -> None:
    """Train a policy, and write a checkpoint every `every` steps."""
    import torch
    from stable_baselines3 import SAC

    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    env = gymnasium.make(env_id)
    model = SAC(
        "MlpPolicy",
        gymnasium.make(env_id),
        policy_kwargs={"net_arch": [128, 128]},
        batch_size=256,
        learning_rate=1e-3,
        learning_starts=5000,
        seed=seed,
        device="cpu",
    )
    begin = time.monotonic()
    for done in range(every, steps + 1, every):
        model.learn(every, reset_num_timesteps=False)
        scores, _ = returns(env, Trainee(model), SAVING_SEEDS, noise=False)
        arrays = {name: value.numpy().astype(np.float16) for name, value in model.actor.state_dict().items()}
        np.savez_compressed(output / f"{env_id}_{done // 1000}k.npz", **arrays, ret=scores.mean())
        print(
            f"{env_id} {done}: {scores.mean():.0f} +- {scores.std():.0f}, {time.monotonic() - begin:.0f} s", flush=True
        )


def evaluate(checkpoints: list[Path]) -> None:
    """Print a table of returns on `UNSEEN_SEEDS`."""
    print(
        f"| checkpoint | deterministic | length | policy noise | length | ({len(UNSEEN_SEEDS)} unseen seeds)\n|"
        + "---|" * 5
    )
    for path in checkpoints:
        env = gymnasium.make(path.stem.rpartition("_")[0])
        cells = []
        for noise in (False, True):
            scores, lengths = returns(env, load_actor(path), UNSEEN_SEEDS, noise)
            cells += [f"{scores.mean():.0f} +- {scores.std():.0f}", f"{lengths.mean():.0f}"]
        print(f"| {path.stem} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env_id", nargs="?", help="environment for training; its actions must be in [-1, 1]")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--every", type=int, default=25_000, help="steps between checkpoints, a multiple of 1000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("ladder"), help="folder of the checkpoints")
    parser.add_argument("--evaluate", type=Path, nargs="+", metavar="CHECKPOINT", help="evaluate these checkpoints")
    arguments = parser.parse_args()
    if (arguments.env_id is None) == (arguments.evaluate is None):
        parser.error("name an environment to train in, or checkpoints to evaluate")
    if arguments.evaluate:
        evaluate(arguments.evaluate)
    else:
        train(arguments.env_id, arguments.steps, arguments.every, arguments.seed, arguments.output)


if __name__ == "__main__":
    main()
