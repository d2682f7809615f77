"""Checkpoints to resume from, and a clean stop when the user or a scheduler asks for one."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import FrameType

import lightning
import torch

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.callbacks.base import AlgorithmCheckpoint, find_callback
from lit_offrl.data.transitions import BlockSampler
from lit_offrl.errors import RunFailure
from lit_offrl.ranges import Steps, checked
from lit_offrl.system.files import write_atomically
from lit_offrl.system.signals import Handlers, listen, restore


class RunCheckpoint(AlgorithmCheckpoint):
    """Writes `last.ckpt` after every epoch and when the run ends or is asked to stop; keeps numbered ones.

    A stop signal (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1) stops the run at the end of the present block, with a checkpoint,
    and an evaluation between two environment steps; a second signal stops at once, with the checkpoint before. Files
    are replaced in one step: a kill at any moment leaves the last checkpoint whole. Several ranks agree to stop after a
    block, or an evaluation, in which one of them was asked to; rank 0 writes.

    Args:
        keep_every_n_epochs: Keep a numbered checkpoint, e.g. `step_0020000.ckpt`, every so many epochs; 0 for none
            but the final one.

    Attributes:
        received: The signal that this rank has received.
        stop_signal: The signal that all ranks know of.
    """

    @checked("checkpoint")
    def __init__(self, keep_every_n_epochs: Steps = 50) -> None:
        self.keep_every_n_epochs = keep_every_n_epochs
        self.folder = Path()
        self.received: signal.Signals | None = None
        self.stop_signal: signal.Signals | None = None
        self._ranks = 1
        self._saved_step = -1
        self._previous_handlers: Handlers = {}

    def agree(self, trainer: lightning.Trainer) -> bool:
        """Return whether any rank has been asked to stop; from here on all know it. All ranks must call this."""
        if self._ranks > 1:
            number = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
            number = trainer.strategy.reduce(number, reduce_op="max")
            self.stop_signal = signal.Signals(int(number)) if number else None
        return self.stop_signal is not None

    def setup(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, stage: str) -> None:
        """Find the run folder."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        self._ranks = trainer.world_size

    def on_train_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Listen to signals; before a training Lightning has just installed its own handlers."""
        if not self._previous_handlers and self.received is None:
            self._previous_handlers = listen(self._request_stop)

    on_validation_start = on_test_start = on_train_start

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self._ranks == 1:
            self.stop_signal = self.received
        restore(self._previous_handlers)  # the next signal stops the process at once

    def on_block_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Stop here if asked to; save where training stops within an epoch."""
        stops = self.agree(trainer)
        if stops:
            trainer.should_stop = True
        # Lightning calls the end of training the end of an epoch, too; the loader knows the difference.
        loader = trainer.train_dataloader
        epoch_ends = not isinstance(loader, BlockSampler) or loader.step % loader.steps_per_epoch == 0
        if not epoch_ends and (stops or algorithm.gradient_step == trainer.max_steps):
            self._save(trainer, algorithm)  # else `on_train_epoch_end` saves, after the evaluation

    def on_train_epoch_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Write `last.ckpt`, and a numbered checkpoint after every `keep_every_n_epochs` epochs."""
        self._save(trainer, algorithm)
        if self.keep_every_n_epochs and (trainer.current_epoch + 1) % self.keep_every_n_epochs == 0:
            self._keep(trainer, algorithm)
        if self.stop_signal is not None:
            trainer.should_stop = True

    def on_fit_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Keep the final checkpoint under its number."""
        if self.stop_signal is None:
            self._keep(trainer, algorithm)

    def teardown(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, stage: str) -> None:
        """Restore the signal handlers."""
        restore(self._previous_handlers)
        self._previous_handlers = {}

    def _save(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        if self._saved_step == algorithm.gradient_step:
            return
        self._saved_step = algorithm.gradient_step
        last = self.folder / "last.ckpt"
        if not trainer.is_global_zero:
            trainer.save_checkpoint(last)  # joins in the collection of the state, and writes nothing
            return
        try:
            write_atomically(last, trainer.save_checkpoint)
        except OSError as error:
            raise RunFailure(
                f"the checkpoint {last} could not be written ({error.strerror or error}); the one before is intact"
            ) from error

    def _keep(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        last, numbered = self.folder / "last.ckpt", self.folder / f"step_{algorithm.gradient_step:07d}.ckpt"
        if not trainer.is_global_zero or numbered.exists() or not last.exists():
            return
        try:
            os.link(last, numbered)  # one file, two names: last.ckpt is replaced, never rewritten
        except OSError:  # a file system without links
            write_atomically(numbered, lambda path: shutil.copyfile(last, path))


def stop_requested(trainer: lightning.Trainer) -> bool:
    """Return whether the trainer's run has been asked to stop; the same on all ranks."""
    checkpoint = find_callback(trainer, RunCheckpoint)
    return checkpoint is not None and checkpoint.stop_signal is not None


def stop_received(trainer: lightning.Trainer) -> bool:
    """Return whether this rank has been asked to stop; the others may not know it yet."""
    checkpoint = find_callback(trainer, RunCheckpoint)
    return checkpoint is not None and checkpoint.received is not None


def agree_to_stop(trainer: lightning.Trainer) -> bool:
    """Return whether any rank has been asked to stop; all ranks must call this."""
    checkpoint = find_callback(trainer, RunCheckpoint)
    return checkpoint is not None and checkpoint.agree(trainer)
