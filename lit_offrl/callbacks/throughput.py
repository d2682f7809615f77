"""How fast a run goes, and where its time goes."""

from __future__ import annotations

import time
from typing import Any

import lightning

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.callbacks.base import AlgorithmCallback


class Throughput(AlgorithmCallback):
    """Measures gradient steps per second and the wall time of training and of evaluation, over all resumptions.

    Logs `time/gradient_steps_per_s` of each block. `RolloutEvaluation` reports its own time through `add_evaluation`.
    """

    def __init__(self) -> None:
        self.train_s = 0.0
        self.eval_s = 0.0
        self.steps = 0
        self._mark = 0.0
        self._mark_step = 0

    def on_train_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Start the clock."""
        self._mark, self._mark_step = time.perf_counter(), algorithm.gradient_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        algorithm: OfflineAlgorithm,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Account for a block."""
        now = time.perf_counter()
        steps, seconds = algorithm.gradient_step - self._mark_step, now - self._mark
        self.train_s += seconds
        self.steps += steps
        self._mark, self._mark_step = now, algorithm.gradient_step
        algorithm.block_metrics["time/gradient_steps_per_s"] = steps / max(seconds, 1e-9)

    def add_evaluation(self, seconds: float) -> None:
        """Account for an evaluation that has just ended."""
        self.eval_s += seconds
        self._mark = time.perf_counter()

    @property
    def steps_per_s(self) -> float | None:
        """Gradient steps per second of training time."""
        return self.steps / self.train_s if self.train_s else None

    def results(self) -> dict[str, Any]:
        """Return the `time` entry of results.json."""
        return {
            "time": {
                "train_s": round(self.train_s, 3),
                "eval_s": round(self.eval_s, 3),
                "gradient_steps_per_s": None if self.steps_per_s is None else round(self.steps_per_s, 3),
            }
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the times so far."""
        return {"train_s": self.train_s, "eval_s": self.eval_s, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the times of the checkpoint."""
        self.train_s, self.eval_s, self.steps = state_dict["train_s"], state_dict["eval_s"], state_dict["steps"]
