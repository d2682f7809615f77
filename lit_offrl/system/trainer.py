"""All that the package needs of Lightning's trainer beyond its public interface.

tests/test_steps.py and tests/test_lightning_versions.py fail where a version of Lightning changes what is used here.
"""

from __future__ import annotations

from datetime import timedelta

import lightning
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_offrl.errors import UserError


def count_gradient_steps(trainer: lightning.Trainer, steps: int) -> None:
    """Add gradient steps to `trainer.global_step`.

    Lightning counts calls of its own optimizer wrapper, once per optimizer. Algorithms step the raw optimizers, which
    Lightning does not see, so that `global_step` counts gradient steps whatever the number of optimizers.
    """
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    for counter in (progress.total, progress.current):
        counter.ready += steps
        counter.completed += steps


def set_ddp_timeout(trainer: lightning.Trainer, seconds: float) -> None:
    """Set how long a rank waits for the others; `--trainer.strategy ddp` leaves no room for this argument of DDP."""
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy._timeout = timedelta(seconds=seconds)


def validates_after_epoch(trainer: lightning.Trainer) -> bool:
    """Return whether Lightning validates at the end of the present epoch."""
    every = trainer.check_val_every_n_epoch or 1
    return bool(trainer.limit_val_batches) and (trainer.current_epoch + 1) % every == 0


def validate_now(trainer: lightning.Trainer) -> None:
    """Run a validation while training, at another time than after an epoch."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating = True
    validation.run()
    trainer.training = True
    validation._has_run = False  # else the loop that goes on from a checkpoint finds itself done before it has begun


# They change batches, learning rates or weights behind the algorithm's back, or only under automatic optimization.
REFUSED_CALLBACKS = (
    callbacks.BatchSizeFinder,
    callbacks.LearningRateFinder,
    callbacks.StochasticWeightAveraging,
    callbacks.GradientAccumulationScheduler,
    callbacks.ModelPruning,
    callbacks.BackboneFinetuning,
    callbacks.WeightAveraging,
)
# Their values without effect; others would train on other data than the options of the data say.
NEUTRAL = {
    "fast_dev_run": (False, 0),
    "overfit_batches": (0, 0.0),
    "limit_train_batches": (None, 1, 1.0),
    "limit_val_batches": (None, 0, 1, 1.0),
    "limit_test_batches": (None, 1, 1.0),
    "min_epochs": (None, 0, 1),
    "min_steps": (None, 0, -1),
    "barebones": (False,),
    "gradient_clip_algorithm": (None,),
    "val_check_interval": (None, 1, 1.0),
    "reload_dataloaders_every_n_epochs": (0,),
    "gradient_clip_val": (None, 0, 0.0),
    "accumulate_grad_batches": (1,),
}
PRECISIONS = ("32-true", "bf16-mixed", "64-true")  # the last with tables of float64, which scripts may bring


def check_trainer(trainer: lightning.Trainer) -> None:
    """Refuse settings of the trainer that would go wrong or have no effect.

    Raises:
        UserError: The run has no end, shards parameters, starts its ranks in another way than by their command line,
            trains in float16, whose gradients underflow, or with weights in bfloat16, or has settings or callbacks of
            Lightning that change data, gradients or weights behind the algorithm's back.
    """
    if trainer.max_steps < 1:
        raise UserError("trainer.max_steps must say how many gradient steps to train, e.g. --trainer.max_steps 20000")
    strategy = trainer.strategy
    start_method = getattr(strategy, "_start_method", "popen")
    # Exact types: subclasses shard parameters.
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy) or start_method != "popen":
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} ({start_method}) cannot train here; use auto or ddp"
        )
    for name, neutral in NEUTRAL.items():
        value = getattr(trainer, name)
        if value not in neutral:
            raise UserError(f"trainer.{name}: {value} has no place here: leave it out")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, REFUSED_CALLBACKS):
            raise UserError(f"trainer.callbacks: {type(callback).__name__} cannot work here: leave it out")
    if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch < 1:
        every = trainer.check_val_every_n_epoch
        raise UserError(f"trainer.check_val_every_n_epoch: must be at least 1, not {every}")
    if trainer.precision not in PRECISIONS:
        raise UserError(f"trainer.precision: must be 32-true or bf16-mixed, not {trainer.precision}")
