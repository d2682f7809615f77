"""How well fitted Q evaluation ranks policies: its values beside true discounted returns, measured by rollouts.

    python tools/fqe_study.py [--dataset offrl/pointmaze/medium-v0] [--steps 8000] [--episodes 100] [--folder DIR]

It trains BC, TD3BC and DTQL for a short time with a tenth of the episodes held out, and takes eight policies of
differing quality from them: checkpoints of several lengths, and blends with uniform actions. The true value of each is
the mean discounted return over episodes from the environment's own starts, the value by fitted Q evaluation that over
the first states of the held-out episodes. Runs in the folder that are complete are used again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import lit_offrl
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.envs.make import environment_for, make_env
from lit_offrl.envs.rollout import Rollouts
from lit_offrl.evaluate.evaluation import HELD_OUT_FRACTION, evaluate_policy
from lit_offrl.evaluate.fqe import FQEOptions
from lit_offrl.policy import Policy
from lit_offrl.run_folder import RunFolder

Array = NDArray[np.float32]
DISCOUNT = 0.99
STEPS = {"BC": 2000, "TD3BC": 4000, "DTQL": 4000}
DTQL_OPTIONS = ("--config=quick/dtql_pointmaze", "--model.init_args.pretrain_steps=1000")


@dataclass(frozen=True)
class Candidate:
    """A policy to judge.

    Attributes:
        algorithm: The algorithm.
        step: Gradient steps of its checkpoint.
        actor: Which of its actors.
        noise: Probability of a uniformly random action in place of the actor's.
    """

    algorithm: str
    step: int
    actor: str = "policy"
    noise: float = 0.0

    @property
    def name(self) -> str:
        """Name in the table."""
        actor = "" if self.actor == "policy" else f", {self.actor}"
        noise = f", {self.noise:.0%} random actions" if self.noise else ""
        return f"{self.algorithm} at step {self.step:,}{actor}{noise}"


CANDIDATES = (
    Candidate("BC", 2000),
    Candidate("BC", 2000, noise=0.5),
    Candidate("TD3BC", 1000),
    Candidate("TD3BC", 4000),
    Candidate("DTQL", 2000),
    Candidate("DTQL", 4000),
    Candidate("DTQL", 4000, noise=0.5),
    Candidate("DTQL", 4000, noise=1.0),
)


class DiscountedRewards(gym.Wrapper[Any, Any, Any, Any]):
    """Weighs the reward of step t of an episode, counted from 0, by the t-th power of the discount."""

    def reset(self, **options: Any) -> Any:
        """Begin an episode."""
        self.weight = 1.0
        return self.env.reset(**options)

    def step(self, action: Any) -> Any:
        """Step."""
        observation, reward, *rest = self.env.step(action)
        weighted, self.weight = self.weight * float(reward), self.weight * DISCOUNT
        return observation, weighted, *rest


def train(folder: Path, dataset: str, algorithm: str) -> RunFolder:
    """Train an algorithm, if that has not been done, and return its run folder."""
    options = DTQL_OPTIONS if algorithm == "DTQL" else (f"--model={algorithm}", "--data.normalize_observations=true")
    run = RunFolder.of(folder, algorithm.lower(), dataset, 0)
    code = lit_offrl.main(
        [
            "fit",
            *options,
            f"--data.dataset={dataset}",
            "--data.reward=minus_one",
            f"--data.validation_fraction={HELD_OUT_FRACTION}",
            "--evaluation.enabled=false",
            "--tensorboard.histograms=false",
            "--checkpoint.keep_every_n_epochs=1",
            f"--trainer.max_steps={STEPS[algorithm]}",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={folder}",
            "--ckpt_path=auto",
        ]
    )
    if code:
        raise SystemExit(code)
    return run


def acting(candidate: Candidate, runs: dict[str, RunFolder]) -> tuple[Policy, Callable[[Array], Array]]:
    """Return the policy of a candidate, and how the candidate acts."""
    checkpoint = runs[candidate.algorithm].checkpoints / f"step_{candidate.step:07d}.ckpt"
    policy = lit_offrl.load_policy(checkpoint, candidate.actor)
    rng, spec = np.random.default_rng(0), policy.spec

    def act(observations: Array) -> Array:
        actions: Array = policy.act(observations)
        is_random = rng.random(len(actions)) < candidate.noise
        uniform = rng.uniform(spec.action_low, spec.action_high, actions.shape)
        return np.where(is_random[:, None], uniform, actions).astype(np.float32)

    return policy, act


def ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Return ranks from 0; equal values share the mean of theirs."""
    array = np.asarray(values)
    below = (array[:, None] > array).sum(1)
    return below + ((array[:, None] == array).sum(1) - 1) / 2


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the rank correlation."""
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="offrl/pointmaze/medium-v0")
    parser.add_argument("--steps", type=int, default=8000, help="gradient steps of each evaluation")
    parser.add_argument("--episodes", type=int, default=100, help="rollouts of each policy")
    parser.add_argument("--folder", type=Path, help="where the runs lie; by default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        study(options, options.folder or Path(temporary))


def study(options: argparse.Namespace, folder: Path) -> None:
    runs = {algorithm: train(folder, options.dataset, algorithm) for algorithm in STEPS}
    data = D4RLDataModule(options.dataset, validation_fraction=HELD_OUT_FRACTION)
    transitions, info = data.load()
    assert data.held_out is not None
    environment = partial(make_env, environment_for(info), info.observation_keys)
    fqe_options = FQEOptions(options.steps, DISCOUNT)
    rows = []
    for candidate in CANDIDATES:
        policy, act = acting(candidate, runs)
        bounds = policy.spec.action_low, policy.spec.action_high
        result = evaluate_policy(act, transitions, data.held_out, bounds, fqe_options)
        policy, act = acting(candidate, runs)
        with Rollouts(lambda: DiscountedRewards(environment()), num_envs=10) as rollouts:
            episodes = rollouts.run(lambda observations, _, act=act: act(observations), range(options.episodes))
        returns = np.array([each.episode_return for each in episodes])
        rows.append((candidate.name, result, returns))
        print(
            f"{candidate.name}: FQE {result.last.value:.3f} {result.interval}, true {returns.mean():.3f}, "
            f"success {np.mean([bool(each.success) for each in episodes]):.2f}; {result.act_s:.0f} s + "
            f"{result.fit_s:.0f} s",
            flush=True,
        )
    print("\n| policy | FQE | 95% | true | ± | TD error | action distance |\n|:--|--:|--:|--:|--:|--:|--:|")
    for name, result, returns in sorted(rows, key=lambda row: -row[2].mean()):
        low, high = result.interval or (float("nan"),) * 2
        error = returns.std(ddof=1) / len(returns) ** 0.5
        print(
            f"| {name} | {result.last.value:.3f} | {low:.3f} to {high:.3f} | {returns.mean():.3f} | {error:.3f} "
            f"| {result.last.td_error:.2g} | {result.action_distance:.2f} |"
        )
    true = [float(returns.mean()) for _, _, returns in rows]
    value = [result.last.value for _, result, _ in rows]
    td_error = [-result.last.td_error for _, result, _ in rows]
    regret = max(true) - true[int(np.argmax(value))]
    print(f"\nSpearman of FQE's value and the true one: {spearman(value, true):.2f}")
    print(f"Spearman of the (negative) TD error and the true value: {spearman(td_error, true):.2f}")
    print(f"the policy of the highest FQE value is {regret:.3f} below the best, of a range of {np.ptp(true):.3f}")


if __name__ == "__main__":
    main()
