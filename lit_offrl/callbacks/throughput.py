"""Speed of a run, and the time of its training and evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.callbacks.base import AlgorithmCallback, find_callback


class Throughput(AlgorithmCallback):
    """Measures gradient steps per second and the wall time of training and of evaluation, over all resumptions.

    Logs `time/gradient_steps_per_s` of each block. Time within `evaluation_mode` counts as evaluation.
    """

    def __init__(self) -> None:
        self.train_s = 0.0
        self.eval_s = 0.0
        self.steps = 0
        self.block_start = 0.0  # on the clock; moved by each evaluation, whose time is not training
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Start the clock."""
        self.block_start, self._step = time.perf_counter(), algorithm.gradient_step

    def on_block_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Add the block's steps and time."""
        now = time.perf_counter()
        steps, seconds = algorithm.gradient_step - self._step, now - self.block_start
        self.train_s += seconds
        self.steps += steps
        self.block_start, self._step = now, algorithm.gradient_step
        algorithm.block_metrics["time/gradient_steps_per_s"] = steps / max(seconds, 1e-9)

    def results(self) -> dict[str, Any]:
        """Return the `time` entry of results.json."""
        speed = round(self.steps / self.train_s, 3) if self.train_s else None
        times = {"train_s": round(self.train_s, 3), "eval_s": round(self.eval_s, 3)}
        return {"time": {**times, "gradient_steps_per_s": speed}}

    def state_dict(self) -> dict[str, Any]:
        """Return the times and the number of steps."""
        return {"train_s": self.train_s, "eval_s": self.eval_s, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.train_s, self.eval_s, self.steps = state_dict["train_s"], state_dict["eval_s"], state_dict["steps"]


@contextmanager
def evaluation_mode(trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> Iterator[None]:
    """Put the algorithm in evaluation mode, and count the time as evaluation."""
    started, training = time.perf_counter(), algorithm.training
    algorithm.eval()
    try:
        yield
    finally:
        algorithm.train(training)
        throughput = find_callback(trainer, Throughput)
        if throughput is not None:
            throughput.block_start = time.perf_counter()
            throughput.eval_s += throughput.block_start - started
