"""Checkpoints to resume from, and a clean stop when the user or a scheduler asks for one."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.callbacks.base import AlgorithmCheckpoint
from lit_offrl.data.transitions import BlockSampler
from lit_offrl.errors import RunFailure
from lit_offrl.ranges import Steps, checked
from lit_offrl.system.files import write_atomically

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunCheckpoint(AlgorithmCheckpoint):
    """Writes `last.ckpt` after every epoch and when the run ends or is asked to stop; keeps numbered ones.

    Ctrl-C or SIGTERM stops the run at the end of the present block, with a checkpoint, and an evaluation between two
    environment steps; a second one stops at once, with the checkpoint before. Files are replaced in one step: a kill
    at any moment leaves the last one whole. Several ranks agree to stop after a block, or an evaluation, in which one
    of them was asked to; rank 0 writes.

    Args:
        keep_every_n_epochs: Keep a numbered checkpoint, e.g. `step_0020000.ckpt`, every so many epochs; 0 for none
            but the final one.
    """

    @checked("checkpoint")
    def __init__(self, keep_every_n_epochs: Steps = 50) -> None:
        self.keep_every_n_epochs = keep_every_n_epochs
        self.folder: Path | None = None
        self.received: signal.Signals | None = None
        self.stop_signal: signal.Signals | None = None
        self._ranks = 1
        self._saved_step = -1
        self._previous_handlers: dict[signal.Signals, Any] = {}

    @property
    def stop_requested(self) -> bool:
        """Whether the run has been asked to stop, and all ranks know it."""
        return self.stop_signal is not None

    def agree(self, trainer: lightning.Trainer) -> bool:
        """Return whether any rank has been asked to stop; from here on all know it. All ranks must call this."""
        if self._ranks > 1:
            number = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
            number = trainer.strategy.reduce(number, reduce_op="max")
            self.stop_signal = signal.Signals(int(number)) if number else None
        return self.stop_requested

    def setup(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, stage: str) -> None:
        """Find the run folder."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        self._ranks = trainer.world_size

    def on_train_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Listen to signals; Lightning has installed its own handlers just before."""
        self._listen()

    def on_validation_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Listen to signals in `validate` too."""
        self._listen()

    def on_test_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Listen to signals in `test` too."""
        self._listen()

    def _listen(self) -> None:
        if self._previous_handlers or self.received or threading.current_thread() is not threading.main_thread():
            return
        self._previous_handlers = {number: signal.signal(number, self._request_stop) for number in STOP_SIGNALS}

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self._ranks == 1:
            self.stop_signal = self.received
        for each in STOP_SIGNALS:  # the next one is not asked for but obeyed
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous_handlers = {}

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        algorithm: OfflineAlgorithm,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop here if asked to; save where training stops within an epoch."""
        if self.agree(trainer):
            trainer.should_stop = True
        stops = self.stop_requested or algorithm.gradient_step == trainer.max_steps
        if stops and not _epoch_ends(trainer):  # else the end of the epoch saves, after the evaluation
            self._save(trainer, algorithm)

    def on_train_epoch_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Write `last.ckpt`, and a numbered one where it is due."""
        self._save(trainer, algorithm)
        if self.keep_every_n_epochs and (trainer.current_epoch + 1) % self.keep_every_n_epochs == 0:
            self._keep(trainer, algorithm)
        if self.stop_requested:
            trainer.should_stop = True

    def on_fit_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Keep the final one under its number."""
        if not self.stop_requested:
            self._keep(trainer, algorithm)

    def teardown(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, stage: str) -> None:
        """Give the signals back."""
        self._restore_handlers()

    def _save(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        assert self.folder is not None
        if self._saved_step == algorithm.gradient_step:
            return
        self._saved_step = algorithm.gradient_step
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self.folder / "last.ckpt")  # takes part, and writes nothing
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "last.ckpt", trainer.save_checkpoint)
        except OSError as error:
            raise RunFailure(
                f"the checkpoint {self.folder / 'last.ckpt'} could not be written ({error.strerror or error}); "
                "the one before is intact"
            ) from error

    def _keep(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        if not trainer.is_global_zero:
            return
        assert self.folder is not None
        numbered = self.folder / f"step_{algorithm.gradient_step:07d}.ckpt"
        if numbered.exists() or not (self.folder / "last.ckpt").exists():
            return
        try:
            os.link(self.folder / "last.ckpt", numbered)  # one file, two names: last.ckpt is replaced, never rewritten
        except OSError:  # a file system without links
            write_atomically(numbered, lambda path: shutil.copyfile(self.folder / "last.ckpt", path))  # type: ignore[operator]


def stop_requested(trainer: lightning.Trainer) -> bool:
    """Whether the trainer's run has been asked to stop; the same on all ranks."""
    return any(each.stop_requested for each in _run_checkpoints(trainer))


def stop_received(trainer: lightning.Trainer) -> bool:
    """Whether this rank has been asked to stop, though the others may not know it yet."""
    return any(each.received is not None for each in _run_checkpoints(trainer))


def agree_to_stop(trainer: lightning.Trainer) -> bool:
    """Return whether any rank has been asked to stop; all ranks must call this."""
    agreed = [each.agree(trainer) for each in _run_checkpoints(trainer)]
    return any(agreed)


def _run_checkpoints(trainer: lightning.Trainer) -> list[RunCheckpoint]:
    return [each for each in trainer.checkpoint_callbacks if isinstance(each, RunCheckpoint)]


def _epoch_ends(trainer: lightning.Trainer) -> bool:
    """Whether the latest block completed an epoch. Lightning also calls the end of training one."""
    loader = trainer.train_dataloader
    return not isinstance(loader, BlockSampler) or loader.step % loader.steps_per_epoch == 0
