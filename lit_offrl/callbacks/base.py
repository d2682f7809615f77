"""The base of all callbacks, and what several of them need of the trainer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar

import lightning
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from lit_offrl.data.datamodule import D4RLDataModule

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from lit_offrl.algorithms.base import OfflineAlgorithm

C = TypeVar("C")

# Lightning types the module of every hook as `LightningModule`, which a hook may not narrow to `OfflineAlgorithm`.
# mypy does not check hooks against a base of type `Any`.
_callback: Any = lightning.Callback
_checkpoint: Any = Checkpoint
_progress_bar: Any = ProgressBar


class AlgorithmCallback(_callback):  # type: ignore[misc]
    """A callback for the training of an `OfflineAlgorithm`."""

    def on_block_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Do something after each block of updates; Lightning calls a block a batch."""

    def on_train_batch_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, *block: Any) -> None:
        """Call `on_block_end`."""
        self.on_block_end(trainer, algorithm)

    def results(self) -> dict[str, Any]:
        """Return the entries that this callback adds to results.json."""
        return {}


class AlgorithmCheckpoint(AlgorithmCallback, _checkpoint):  # type: ignore[misc]
    """A callback that Lightning runs after all others."""


class AlgorithmProgressBar(AlgorithmCallback, _progress_bar):  # type: ignore[misc]
    """A callback that Lightning uses as the progress bar."""


def find_callback(trainer: lightning.Trainer, cls: type[C]) -> C | None:
    """Return the trainer's first callback of a class, or None."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, cls)), None)


def find_datamodule(trainer: lightning.Trainer) -> D4RLDataModule | None:
    """Return the trainer's data module; None where the training data come from elsewhere."""
    datamodule = getattr(trainer, "datamodule", None)
    return datamodule if isinstance(datamodule, D4RLDataModule) else None


def tensorboard_writers(trainer: lightning.Trainer) -> list[SummaryWriter]:
    """Return the writers of the TensorBoard loggers; none on ranks other than 0."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [each.experiment for each in loggers if isinstance(each, TensorBoardLogger)]


def print_note(trainer: lightning.Trainer, text: str) -> None:
    """Print what the user must know above the progress bar; on standard error where there is none."""
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.print(text)
    elif trainer.is_global_zero:
        print(text, file=sys.stderr)


def print_line(trainer: lightning.Trainer, text: str) -> None:
    """Print a line above the progress bar; on standard output where there is none, e.g. into the log of a job."""
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.print(text)
    elif trainer.is_global_zero:
        print(text, flush=True)  # a log that is read while the run goes on
