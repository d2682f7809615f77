"""What a gradient step of an algorithm costs, and which of its losses costs how much.

    python tools/benchmark.py [--algorithms BDPO,DTQL] [--shape hopper] [--batch-size 256] [--rounds 5] [--json FILE]
                              [--options '{"members": 4}']

Updates on random data of the shape of a task, without Lightning, data loading or evaluation. Algorithms take turns,
round by round, and medians are shown, so that whatever else a machine does meets all of them alike. Times are CPU
seconds of this process (on a GPU, wall seconds).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_offrl import algorithms
from lit_offrl.algorithms import OfflineAlgorithm
from lit_offrl.batch import Batch

SHAPES = {"hopper": (11, 3), "walker2d": (17, 6), "antmaze": (29, 8)}  # widths of observations and actions
# An actor that waits or pauses would make the cost of a step depend on the step: averaged over `STEPS`.
STEPS = 5
OPTIONS: dict[str, dict[str, Any]] = {"BDPO": {"warmup_steps": 0}, "EDA": {"critic_steps": 0}}
OPTIONS["BDPOGaussian"] = OPTIONS["BDPODeterministic"] = OPTIONS["BDPO"]


class Clock:
    """Times the updates of one algorithm, and in them the way to each `minimize`."""

    def __init__(self, algorithm: OfflineAlgorithm) -> None:
        self.algorithm = algorithm
        self.seconds: dict[str, float] = defaultdict(float)
        self._mark = 0.0
        minimize = algorithm.minimize

        def timed(name: str, loss: Tensor) -> None:
            minimize(name, loss)
            self._lap(name)

        algorithm.minimize = timed  # type: ignore[method-assign]

    def _now(self) -> float:
        if self.algorithm.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def _lap(self, name: str) -> None:
        now = self._now()
        self.seconds[name] += now - self._mark
        self._mark = now

    def run(self, update: Callable[[Batch], Any], batch: Batch, steps: int) -> dict[str, float]:
        """Return seconds per gradient step: in all, and on the way to each `minimize` (loss, gradients and step)."""
        self.seconds.clear()
        started = self._mark = self._now()
        for _ in range(steps):
            update(batch)
            self.algorithm.gradient_step += 1
            for hook in self.algorithm.update_hooks:
                hook(self.algorithm.gradient_step)
            self._lap("rest")
        total = self._now() - started
        return {"step": total / steps, **{name: seconds / steps for name, seconds in self.seconds.items()}}


def make(name: str, batch: Batch, options: dict[str, Any]) -> OfflineAlgorithm:
    """Return an algorithm for a dataset that is one batch, ready for the updates of all its phases."""
    from lit_offrl.callbacks.ema import EMATargets

    torch.manual_seed(0)
    shape = batch.observations.shape[1], batch.actions.shape[1]
    algorithm = getattr(algorithms, name)(*shape, pretrain_steps=0, **{**OPTIONS.get(name, {}), **options})
    algorithm.to(batch.rewards.device).configure_optimizers()
    algorithm.main_steps = 1_000_000
    EMATargets().on_fit_start(None, algorithm)  # type: ignore[arg-type]
    algorithm.dataset_observations, algorithm.dataset_next_observations = batch.observations, batch.next_observations
    for phase in algorithm.phases():
        phase.begin()
    return algorithm


def random_batch(shape: tuple[int, int], size: int, device: str) -> Batch:
    """Return transitions of random numbers."""
    observation_dim, action_dim = shape
    generator = torch.Generator().manual_seed(0)
    observations, next_observations = torch.randn(2, size, observation_dim, generator=generator)
    actions = torch.rand(size, action_dim, generator=generator) * 2 - 1
    rewards, terminals = torch.rand(2, size, generator=generator)
    fields = (observations, actions, rewards, next_observations, (terminals < 0.01).float(), torch.arange(size))
    return Batch(*(x.to(device) for x in fields))


def measure(names: list[str], shape: str, batch_size: int, rounds: int, options: dict[str, Any], device: str) -> Any:
    """Return, by algorithm and phase, the median seconds per gradient step and of its parts."""
    batch = random_batch(SHAPES[shape], batch_size, device)
    clocks = {name: Clock(make(name, batch, options)) for name in names}
    taken: dict[str, list[dict[str, float]]] = defaultdict(list)
    for turn in range(rounds + 1):
        for name, clock in clocks.items():
            for phase in clock.algorithm.phases():
                parts = clock.run(phase.update, batch, STEPS)
                if turn:  # the first warms up
                    taken[f"{name} {phase.name}"].append(parts)
    return {
        key: {part: statistics.median(each[part] for each in each_round) for part in each_round[0]}
        for key, each_round in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [name for name in algorithms.__all__ if name != "OfflineAlgorithm"]
    parser.add_argument("--algorithms", default=",".join(every))
    parser.add_argument("--shape", choices=SHAPES, default="hopper")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--options", type=json.loads, default={}, help="hyper-parameters of all of them, as JSON")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    names = given.algorithms.split(",")
    results = measure(names, given.shape, given.batch_size, given.rounds, given.options, given.device)
    print(f"{given.shape}, batch {given.batch_size}, {given.device}, {torch.get_num_threads()} threads, ms per step\n")
    print("| algorithm and phase | steps/s | ms | of which |\n|---|---|---|---|")
    for key, parts in results.items():
        total = parts["step"]
        split = ", ".join(f"{name} {1000 * s:.1f} ({s / total:.0%})" for name, s in parts.items() if name != "step")
        print(f"| {key} | {1 / total:.1f} | {1000 * total:.1f} | {split} |")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
