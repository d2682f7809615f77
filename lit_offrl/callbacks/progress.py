"""The progress bar: gradient steps, steps/s, time left, score."""

from __future__ import annotations

import sys
from typing import Any

import lightning
from tqdm import tqdm

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.algorithms.loop import phase_at
from lit_offrl.callbacks.base import AlgorithmProgressBar
from lit_offrl.system.progress import progress_bar


class GradientStepBar(AlgorithmProgressBar):
    """One bar over the whole run, counted in gradient steps, with the latest score."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing (ranks other than the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def on_train_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Open the bar at the present gradient step."""
        algorithm.shows_progress = self._enabled
        step = algorithm.gradient_step
        phase, _ = phase_at(algorithm.phases(), step)
        self._bar = progress_bar(phase.name, trainer.max_steps, initial=step, disable=not self._enabled)

    def on_block_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Advance the bar."""
        assert self._bar is not None
        phase, _ = phase_at(algorithm.phases(), algorithm.gradient_step - 1)
        self._bar.set_description(phase.name, refresh=False)
        score = trainer.callback_metrics.get("eval/normalized_score")
        if score is not None:
            self._bar.set_postfix_str(f"score {float(score):.1f}", refresh=False)
        self._bar.update(algorithm.gradient_step - self._bar.n)

    def on_train_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, *exception: BaseException) -> None:
        """Draw the last state and end the line, so that scores and errors start on their own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_exception = on_train_end

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print a line of its own above the bar."""
        if self._enabled:
            tqdm.write(sep.join(str(arg) for arg in args), file=sys.stderr)
