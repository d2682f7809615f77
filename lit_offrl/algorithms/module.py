"""What Lightning calls: the hooks of a training, the same for all algorithms. Authors of algorithms read base.py."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import lightning
import torch
from torch import Tensor

from lit_offrl.algorithms.acting import Units
from lit_offrl.algorithms.checkpoints import (
    ENTRY,
    load_weights,
    read_checkpoint,
    restore_training_state,
    training_state,
)
from lit_offrl.algorithms.loop import Phase, RunUpdate, main_start, run_eagerly, train_block
from lit_offrl.algorithms.noise import NoiseStream
from lit_offrl.algorithms.optimizers import Optimizers, OptimizerSpec
from lit_offrl.algorithms.targets import Target
from lit_offrl.batch import Batch
from lit_offrl.errors import UserError
from lit_offrl.ranges import store_options
from lit_offrl.system.trainer import check_trainer, count_gradient_steps

if TYPE_CHECKING:
    from lit_offrl.algorithms.base import OfflineAlgorithm


class TargetUpdates(Protocol):
    """Moves target networks; the `EMATargets` callback."""

    def update(self, main_step: int) -> None:
        """Move those that move at step `main_step` of the main phase, counted from 1; below, before it."""


class TrainingModule(lightning.LightningModule):
    """Trains on blocks of minibatches with manual optimization; `OfflineAlgorithm` is its only direct subclass.

    Args:
        seed: Seed of the noise of training.
        units: Units of the dataset and of the networks.
    """

    segment_length: int
    pretrained: str | None
    optimizer_set: Optimizers  # made by `configure_optimizers`

    def __init__(self, seed: int, units: Units) -> None:
        options = self.__dict__.pop("_options", {})
        super().__init__()
        self.save_hyperparameters(options)
        self.automatic_optimization = False
        self.noise = NoiseStream(seed)
        self.units = units
        self.dataset_observations: Tensor | None = None
        self.dataset_next_observations: Tensor | None = None
        self.dataset_rewards: Tensor | None = None
        self.dataset_terminals: Tensor | None = None
        self.dataset_episode_ends: Tensor | None = None
        self.gradient_step = 0
        self.main_steps: int | None = None  # length of the main phase
        self.run_update: RunUpdate = run_eagerly  # `Acceleration` runs updates in other ways
        self.target_updates: TargetUpdates | None = None
        self.block_metrics: dict[str, float] = {}  # what loggers receive at the end of the block
        self.control_actors: dict[str, Callable[..., Tensor]] = {}  # what an evaluation plays beside `actors()`
        self.shows_progress = False  # whether work that takes minutes shows a bar; the progress bar's callback says so
        self.trained_on: dict[str, str | None] | None = None  # id and digest of the dataset
        self.init_from: dict[str, Any] | None = None  # the checkpoint whose weights the run began with
        self.traced_active: tuple[str, ...] | None = None  # `active` while an update is traced

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let the constructor of a subclass check and store its arguments before it runs."""
        super().__init_subclass__(**kwargs)
        store_options(cls, "model.init_args", "_options")

    @abstractmethod
    def optimizer_specs(self) -> Mapping[str, OptimizerSpec]:
        """See `OfflineAlgorithm`, as of the next methods."""

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]: ...  # noqa: D102

    @abstractmethod
    def targets(self) -> tuple[Target, ...]: ...  # noqa: D102

    @abstractmethod
    def validation_losses(self, batch: Batch) -> dict[str, Tensor]: ...  # noqa: D102

    @abstractmethod
    def act(self, observations: Tensor) -> Tensor: ...  # noqa: D102

    @contextmanager
    def tracing(self, active: tuple[str, ...]) -> Iterator[None]:
        """Let an update that is traced take `active` for what is active: it must not read the gradient step."""
        self.traced_active = active
        try:
            yield
        finally:
            self.traced_active = None

    @property
    def main_start(self) -> int:
        """The gradient step at which the main phase begins."""
        return main_start(self.phases())

    def update_targets(self) -> None:
        """Move the target networks after an update, while its gradient step still counts as the present one."""
        if self.target_updates is not None:
            self.target_updates.update(self.gradient_step + 1 - self.main_start)

    # ---------------------------------------------------------------- Lightning's hooks

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Make one fused Adam per spec."""
        self.optimizer_set = Optimizers(self.optimizer_specs())
        return [*self.optimizer_set.adams.values()]

    def setup(self, stage: str) -> None:
        """Copy the units of the training data, and note which data they are."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and hasattr(data, "action_units"):
            self.units.set_from(data)
            self.trained_on = {"id": data.info.id, "sha256": data.info.sha256}

    def on_fit_start(self) -> None:
        """Check what must hold before the first update."""
        check_trainer(self.trainer)
        if self.trainer.world_size != self.noise.ranks:
            raise UserError("training on several devices needs the DistributedTraining callback")
        self.main_steps = max(self.trainer.max_steps - self.main_start, 1)
        if self.targets() and self.target_updates is None:
            raise UserError(f"{type(self).__name__} has target networks: train it with the EMATargets callback")
        if self.pretrained is not None and self.gradient_step == 0:
            option = "model.init_args.pretrained"
            load_weights(self._algorithm, read_checkpoint(self.pretrained, option), self.pretrained, option)

    def on_train_start(self) -> None:
        """Find the dataset in the table that minibatches are drawn from."""
        table: Any = self.trainer.train_dataloader
        if self.segment_length > 1:
            table.segment_length = self.segment_length
        self.dataset_observations = getattr(table, "observations", None)
        self.dataset_next_observations = getattr(table, "next_observations", None)
        self.dataset_rewards = getattr(table, "rewards", None)
        self.dataset_terminals = getattr(table, "terminals", None)
        self.dataset_episode_ends = getattr(table, "episode_ends", None)

    def training_step(self, block: Batch, batch_idx: int) -> None:
        """Perform the updates of one block and log the means of what they report."""
        means = train_block(self._algorithm, block)
        count_gradient_steps(self.trainer, len(block.rewards))
        self.block_metrics = {f"train/{name}": mean for name, mean in means.items()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hand the scalars of the block, those that callbacks added included, to the loggers as one event."""
        for logger in self.loggers:
            logger.log_metrics(self.block_metrics, step=self.gradient_step)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the losses of held-out transitions, where there are any; rollouts are `RolloutEvaluation`'s."""
        if isinstance(batch, Batch):
            with self.noise.independent(seed=batch_idx):  # equal noise in every validation: only the networks differ
                losses = self.validation_losses(batch)
            rows = len(batch.rewards)
            self.log_dict({f"val/{name}": value for name, value in losses.items()}, batch_size=rows)
            self.log("step", float(self.gradient_step), batch_size=rows)  # the x axis of the loggers

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: `RolloutEvaluation` does the work, but Lightning asks for this method."""

    def predict_step(self, batch: Tensor | Batch, batch_idx: int) -> Tensor:
        """Return actions for a batch of raw observations."""
        return self.act(batch.observations if isinstance(batch, Batch) else batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `training_state` says."""
        checkpoint[ENTRY] = training_state(self._algorithm)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the step count and the noise stream."""
        restore_training_state(self._algorithm, checkpoint[ENTRY])

    @property
    def _algorithm(self) -> OfflineAlgorithm:
        return cast("OfflineAlgorithm", self)
