"""Checkpoints to resume from, and a clean stop when the user or a scheduler asks for one."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.callbacks.base import AlgorithmCheckpoint, find_callback
from lit_offrl.data.transitions import BlockSampler
from lit_offrl.errors import RunFailure
from lit_offrl.ranges import Steps, checked
from lit_offrl.system.files import write_atomically
from lit_offrl.system.signals import Handlers, listen, restore
from lit_offrl.system.trainer import validate_now, validates_after_epoch


class RunCheckpoint(AlgorithmCheckpoint):
    """Writes `last.ckpt` after every epoch and when the run ends or is asked to stop; keeps numbered ones.

    The checkpoint of an epoch is written before its validation, in which a simulator may fail, and once more after it.
    A run that goes on from the first one, because it ended in between, begins with that validation.

    A stop signal (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2) stops the run at the end of the present block, with a
    checkpoint, and an evaluation between two environment steps; a second signal stops at once, with the checkpoint
    before. Files are replaced in one step: a kill at any moment leaves the last checkpoint whole. Several ranks agree
    to stop after a block, or an evaluation, in which one of them was asked to; rank 0 writes.

    Args:
        keep_every_n_epochs: Keep a numbered checkpoint, e.g. `step_0020000.ckpt`, every so many epochs; 0 for none
            but the final one.

    Attributes:
        validation_due: Whether the run, or its checkpoint, stands before a validation.
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
        self.validation_due = False
        self._saved: tuple[int, bool] | None = None
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
        """Listen to signals, as Lightning has just installed its own handlers; make up for a missed validation."""
        self._listen()
        if self.validation_due:
            validate_now(trainer)
            self.validation_due = self.stop_signal is not None

    def on_validation_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Listen to signals; save what an epoch has trained before anything can go wrong in its validation."""
        self._listen()
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not self.validation_due:
            self.validation_due = True
            self._save(trainer, algorithm)

    def on_test_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Listen to signals."""
        self._listen()

    def _listen(self) -> None:
        if not self._previous_handlers and self.received is None:
            self._previous_handlers = listen(self._request_stop)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self._ranks == 1:
            self.stop_signal = self.received
        restore(self._previous_handlers)  # the next signal stops the process at once

    def on_block_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Stop here if asked to; save where training stops within an epoch."""
        # Lightning calls the end of training the end of an epoch, too; the loader knows the difference.
        loader = trainer.train_dataloader
        epoch_ends = not isinstance(loader, BlockSampler) or loader.step % loader.steps_per_epoch == 0
        stops = self.agree(trainer)
        if stops:
            self.validation_due = epoch_ends and validates_after_epoch(trainer)
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # else Lightning would validate before it stops
        if not epoch_ends and (stops or algorithm.gradient_step == trainer.max_steps):
            self._save(trainer, algorithm)  # else `on_train_epoch_end` saves

    def on_train_epoch_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Write `last.ckpt`, and a numbered checkpoint after every `keep_every_n_epochs` epochs."""
        if self.stop_signal is None:
            self.validation_due = False
        else:
            trainer.should_stop = True
        self._save(trainer, algorithm)
        if self.keep_every_n_epochs and (trainer.current_epoch + 1) % self.keep_every_n_epochs == 0:
            self._keep(trainer, algorithm)

    def on_fit_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Keep the final checkpoint under its number."""
        if self.stop_signal is None:
            self._keep(trainer, algorithm)

    def state_dict(self) -> dict[str, Any]:
        """Return whether a validation is due."""
        return {"validation_due": self.validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the checkpoint."""
        self.validation_due = state_dict["validation_due"]

    def teardown(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, stage: str) -> None:
        """Restore the signal handlers."""
        restore(self._previous_handlers)
        self._previous_handlers = {}

    def _save(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        state = algorithm.gradient_step, self.validation_due
        if self._saved == state:
            return
        self._saved = state
        last = self.folder / "last.ckpt"
        if not trainer.is_global_zero:
            trainer.save_checkpoint(last)  # joins in the collection of the state, and writes nothing
            return
        try:
            write_atomically(last, trainer.save_checkpoint)
        except OSError as error:
            before = "the one before is intact" if last.exists() else "there is none yet"
            raise RunFailure(
                f"the checkpoint {last} could not be written ({error.strerror or error}); {before}"
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


def validation_was_due(checkpoint: dict[str, Any] | None) -> bool:
    """Return whether a run that goes on from this checkpoint begins with a validation, whose rows come again."""
    states = (checkpoint or {}).get("callbacks", {})
    return bool(states.get(RunCheckpoint.__name__, {}).get("validation_due"))
