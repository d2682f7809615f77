"""Training on several devices: one process (rank) each, all with the same weights, sharing each batch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import lightning
import torch
from torch import Tensor, distributed

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.callbacks.base import AlgorithmCallback
from lit_offrl.data.transitions import BlockSampler
from lit_offrl.errors import RunFailure, UserError
from lit_offrl.ranges import Positive, Steps, checked, flat, plain
from lit_offrl.system.trainer import set_ddp_timeout

T = TypeVar("T")


class DistributedTraining(AlgorithmCallback):
    """Makes W ranks train as one process does with the same batch; with one rank it does nothing.

    Every rank draws the indices and the noise of the whole batch, and uses the rows r, r + W, ... of both: streams are
    the same on all ranks, at any W. Each call of `minimize` averages the gradients in one all-reduce, so that weights,
    optimizers and targets stay equal without any further exchange. Lightning's DDP wrapper copies the weights of rank 0
    to all ranks at the start; its own reduction of gradients never starts, as `minimize` does not use autograd's hooks.

    Args:
        timeout_s: Seconds that a rank waits for the others before it gives up; more than evaluations of two ranks may
            differ in time.
        check_every_n_epochs: Epochs from one comparison of the ranks' weights to the next; 0 for none.
    """

    @checked("distributed")
    def __init__(self, timeout_s: Positive = 600.0, check_every_n_epochs: Steps = 1) -> None:
        self.timeout_s = timeout_s
        self.check_every_n_epochs = check_every_n_epochs
        self._ranks = 1
        self._ranks_of_checkpoint: int | None = None

    def prepare(self, trainer: lightning.Trainer) -> None:
        """Set the timeout, before Lightning makes the process group. The command line calls it."""
        set_ddp_timeout(trainer, self.timeout_s)

    def setup(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, stage: str) -> None:
        """Store the number of ranks."""
        self._ranks = trainer.world_size

    def on_fit_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Give the algorithm its share of each batch, and the reduction of gradients."""
        if trainer.is_global_zero and self._ranks_of_checkpoint not in (None, trainer.world_size):
            print(
                f"warning: the checkpoint was made by {self._ranks_of_checkpoint} rank(s), {trainer.world_size} go on: "
                "with the same batches and noise, but sums are rounded in another order",
                file=sys.stderr,
            )
        if trainer.world_size > 1:
            algorithm.noise.rank, algorithm.noise.ranks = trainer.global_rank, trainer.world_size
            algorithm.noise.gather = gather_rows
            algorithm.optimizer_set.average = average

    def on_train_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Copy rank 0's streams of indices and noise to all ranks, and check that all start from the same weights.

        Raises:
            UserError: The loader gives each rank more or less than its share.
        """
        if trainer.world_size == 1:
            return
        loader = trainer.train_dataloader
        if not isinstance(loader, BlockSampler) or loader.ranks != trainer.world_size:
            raise UserError("several devices share the batches of a D4RLDataModule: train with one")
        check_batch_sizes(algorithm, loader.batch_size, trainer.world_size)
        for generator in (algorithm.noise.generator, loader.generator):
            generator.set_state(trainer.strategy.broadcast(generator.get_state()))
        check_equal(algorithm)

    def on_train_epoch_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Check that the ranks have the same weights, before a checkpoint is written."""
        every = self.check_every_n_epochs
        if trainer.world_size > 1 and every and (trainer.current_epoch + 1) % every == 0:
            check_equal(algorithm)

    def teardown(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, stage: str) -> None:
        """Let the algorithm use all rows again."""
        algorithm.noise.rank, algorithm.noise.ranks, algorithm.noise.gather = 0, 1, None

    def state_dict(self) -> dict[str, Any]:
        """Return the number of ranks."""
        return {"ranks": self._ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store how many ranks made the checkpoint."""
        self._ranks_of_checkpoint = state_dict["ranks"]


def check_batch_sizes(algorithm: OfflineAlgorithm, batch_size: int, ranks: int) -> None:
    """Check that all ranks have equally many rows: only then is the mean of their means the mean of the batch.

    Args:
        algorithm: Its options that end in `batch_size` count transitions of the batch.
        batch_size: Transitions of a batch, of all ranks together.
        ranks: Number of ranks.

    Raises:
        UserError: A size is no multiple of `ranks`.
    """
    options = flat(plain(algorithm.hparams))
    parts = {f"model.init_args.{name}": size for name, size in options.items() if name.endswith("batch_size")}
    for option, size in {"data.batch_size": batch_size, **parts}.items():
        if min(size, batch_size) % ranks:
            raise UserError(f"{option}: {size} cannot be shared out evenly over {ranks} devices: take a multiple")


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the mean of each tensor over the ranks, by a single all-reduce; the tensors have one dtype."""
    flat = torch.cat([each.reshape(-1) for each in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = torch.split(flat, [each.numel() for each in tensors])
    return [part.view(each.shape) for part, each in zip(parts, tensors, strict=True)]


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all W ranks in their order, `[W batch, ...]`: rank r has r, r + W, ... as `[batch, ...]`."""
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, which must all call this, in the order of the ranks."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def check_equal(algorithm: OfflineAlgorithm) -> None:
    """Compare the weights, and the position in the noise stream, of all ranks by checksums.

    Raises:
        RunFailure: They differ, on all ranks alike.
    """
    state = {name: each for name, each in algorithm.state_dict().items() if each.is_floating_point()}
    state["the stream of noise"] = algorithm.noise.get_state().to(algorithm.device)
    values = [each.double() for each in state.values()]
    sums = torch.stack([torch.stack([each.sum(), each.abs().sum()]) for each in values]).nan_to_num()
    extremes = torch.stack([sums, -sums])
    distributed.all_reduce(extremes, distributed.ReduceOp.MAX)
    differ = (extremes[0] != -extremes[1]).any(dim=1).tolist()
    if any(differ):
        raise RunFailure(
            f"the ranks have come to differ by gradient step {algorithm.gradient_step}, first in "
            f"{list(state)[differ.index(True)]}: see that all run the same versions on the same kind of device and "
            "read the same dataset, then go on with --ckpt_path last"
        )
