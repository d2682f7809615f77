"""Speed of a run, the time of its training and evaluation, and how long its policy takes for one action."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import numpy as np
import torch

from lit_offrl.algorithms.base import Memory, OfflineAlgorithm
from lit_offrl.callbacks.base import AlgorithmCallback, find_callback, find_datamodule

MOST_ACTIONS, FEWEST_ACTIONS = 100, 5
SHARE_FOR_ACTIONS = 0.01  # of the training's time


class Throughput(AlgorithmCallback):
    """Measures gradient steps per second and the wall time of training and of evaluation, over all resumptions.

    Logs `time/gradient_steps_per_s` of each block. Time within `evaluation_mode` counts as evaluation. When training
    ends, it lets the policy act at one state some times, for no longer than a hundredth of the training took.
    """

    def __init__(self) -> None:
        self.train_s = 0.0
        self.eval_s = 0.0
        self.steps = 0
        self.block_start = 0.0  # on the clock; moved by each evaluation, whose time is not training
        self._step = 0
        self.action_s: list[float] = []

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

    def on_train_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Measure how long one action at one state takes."""
        datamodule = find_datamodule(trainer)
        if datamodule is None or not trainer.is_global_zero:
            return
        observation = torch.from_numpy(datamodule.transitions.observations[:1]).to(algorithm.device)
        generator = torch.Generator(algorithm.device).manual_seed(0)
        memories: list[Memory] = [{}]
        with evaluation_mode(trainer, algorithm):
            algorithm.act(observation, generator, memories=memories)  # the first call may be slower
            self.action_s, end = [], time.perf_counter() + SHARE_FOR_ACTIONS * self.train_s
            while len(self.action_s) < MOST_ACTIONS:
                started = time.perf_counter()
                if len(self.action_s) >= FEWEST_ACTIONS and started > end:
                    break
                memories[0]["reward"] = 0.0
                algorithm.act(observation, generator, memories=memories).cpu()  # waits for the device
                self.action_s.append(time.perf_counter() - started)

    def results(self) -> dict[str, Any]:
        """Return the `time` entry of results.json."""
        speed = round(self.steps / self.train_s, 3) if self.train_s else None
        times = {"train_s": round(self.train_s, 3), "eval_s": round(self.eval_s, 3), "gradient_steps_per_s": speed}
        times["train_s_per_1k_steps"] = round(1000 * self.train_s / self.steps, 3) if self.steps else None
        times["act_ms"], times["act_ms_p99"] = (
            [round(1000 * float(each), 3) for each in np.quantile(self.action_s, [0.5, 0.99])]
            if self.action_s
            else (None, None)
        )
        return {"time": times}

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
