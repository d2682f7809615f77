"""The base of all callbacks: Lightning's, with the module of every hook typed as an algorithm."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning
from lightning.pytorch.callbacks import Checkpoint, ProgressBar

if TYPE_CHECKING:
    from lit_offrl.algorithms.base import OfflineAlgorithm

# Lightning types the module of every hook as `LightningModule`, which a hook may not narrow to `OfflineAlgorithm`.
# Behind `Any` the hooks can say what they are called with.
_callback: Any = lightning.Callback
_checkpoint: Any = Checkpoint
_progress_bar: Any = ProgressBar


class AlgorithmCallback(_callback):  # type: ignore[misc]
    """A callback of trainings of an `OfflineAlgorithm`."""

    def results(self) -> dict[str, Any]:
        """Return the entries of results.json that this callback knows."""
        return {}


class AlgorithmCheckpoint(_checkpoint):  # type: ignore[misc]
    """A callback that Lightning runs after all others."""


class AlgorithmProgressBar(_progress_bar):  # type: ignore[misc]
    """A callback that Lightning knows as the progress bar."""


def say(trainer: lightning.Trainer, text: str) -> None:
    """Print a line above the progress bar, where there is one."""
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.print(text)


@contextmanager
def evaluation_mode(trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> Iterator[None]:
    """Put the algorithm in evaluation mode, and count the time as evaluation."""
    from lit_offrl.callbacks.throughput import Throughput

    started, training = time.perf_counter(), algorithm.training
    algorithm.eval()
    try:
        yield
    finally:
        algorithm.train(training)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback.add_evaluation(time.perf_counter() - started)
