"""All that the package needs of Lightning's trainer beyond its public interface.

tests/test_steps.py and tests/test_lightning_versions.py fail where a version of Lightning changes what is used here.
"""

from __future__ import annotations

from datetime import timedelta

import lightning
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


def check_trainer(trainer: lightning.Trainer) -> None:
    """Refuse settings of the trainer that would go wrong or have no effect.

    Raises:
        UserError: The run has no end, shards parameters, starts its ranks in another way than by their command line,
            trains in float16, whose gradients underflow, or has Lightning clip or accumulate gradients, which it does
            for automatic optimization only.
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
    if str(trainer.precision).startswith("16"):
        raise UserError(f"trainer.precision: {trainer.precision} needs loss scaling; use 32-true or bf16-mixed")
    if trainer.gradient_clip_val or trainer.accumulate_grad_batches != 1:
        raise UserError("trainer.gradient_clip_val and accumulate_grad_batches have no effect here: leave them out")
