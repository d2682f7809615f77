"""What TensorBoard shows beside losses and scores: hyper-parameters, learning rates, gradients, actions and values."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.tensorboard.writer import SummaryWriter

from lit_offrl.algorithms.base import OfflineAlgorithm, OptimizerSpec
from lit_offrl.callbacks.base import AlgorithmCallback, find_datamodule, tensorboard_writers
from lit_offrl.callbacks.checkpoint import stop_requested
from lit_offrl.callbacks.evaluation import Evaluation
from lit_offrl.callbacks.throughput import evaluation_mode
from lit_offrl.data.transitions import BlockSampler
from lit_offrl.ranges import flat, plain

STATES = 256  # of the dataset, evenly spaced; some policies weigh a thousand candidates in each


class TensorBoardDetails(AlgorithmCallback):
    """Logs what explains a curve, at a cost that does not show.

    * `train/learning_rate_<optimizer>`: at the gradient step on the x axis; to every logger.
    * `train/gradient_norm_<optimizer>`: Euclidean norm over all of the optimizer's parameters, after clipping, in the
      last update of a block; to every logger. An optimizer that did not step in the block has none.
    * Histograms at every evaluation: actions of the policy at fixed states of the dataset, one per dimension and in the
      dataset's units, beside the dataset's own actions there; values of both where the algorithm has a critic. Their
      noise comes from a separate stream, so that they change nothing about training.
    * The table of hyper-parameters (HPARAMS), with the scores of the policy.

    Args:
        histograms: Whether to log histograms.
    """

    def __init__(self, histograms: bool = True) -> None:
        self.histograms = histograms
        self._optimizers: dict[str, tuple[OptimizerSpec, torch.optim.Optimizer]] = {}
        self._steps: dict[str, float] = {}  # of each optimizer, at the latest call of `_new_gradient_norms`
        self._shown_step: int | None = None  # of the latest histograms

    def on_train_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Find the parameters of each optimizer."""
        specs = algorithm.optimizer_specs()
        self._optimizers = dict(zip(specs, zip(specs.values(), trainer.optimizers, strict=True), strict=True))
        self._new_gradient_norms()  # of a resumed run: they were logged before

    def on_block_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Log learning rates and gradient norms, with one host sync per block."""
        if not trainer.loggers:
            return
        main_step = algorithm.gradient_step - algorithm.main_start
        rates = {name: spec.rate_at(main_step, algorithm.main_steps) for name, (spec, _) in self._optimizers.items()}
        algorithm.block_metrics |= {f"train/learning_rate_{name}": rate for name, rate in rates.items()}
        norms = self._new_gradient_norms()
        algorithm.block_metrics |= {f"train/gradient_norm_{name}": norm for name, norm in norms.items()}

    def on_validation_epoch_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Log histograms at each evaluation while training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show(trainer, algorithm)

    def on_train_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Log histograms of the final policy, and that the run is finished."""
        self._show(trainer, algorithm)
        if not stop_requested(trainer):
            for writer in tensorboard_writers(trainer):
                _write_hyperparameters(writer, trainer, algorithm, finished=True)
                writer.flush()

    def _new_gradient_norms(self) -> dict[str, float]:
        """Return the norms of the gradients of each optimizer that has stepped since the last call, with one host sync.

        Each optimizer counts its steps on the device: an update that is replayed as a CUDA graph runs no Python.
        """
        found: dict[str, Tensor] = {}
        for name, (_, optimizer) in self._optimizers.items():
            parameters: list[nn.Parameter] = optimizer.param_groups[0]["params"]
            steps = optimizer.state[parameters[0]]["step"]
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros_like(steps)
            found[name] = torch.stack([steps.to(norm), norm])
        numbers: list[list[float]] = torch.stack([*found.values()]).tolist() if found else []
        old, self._steps = self._steps, {name: step for name, (step, _) in zip(found, numbers, strict=True)}
        return {name: norm for name, (step, norm) in zip(found, numbers, strict=True) if step != old.get(name, 0)}

    def _show(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        writers = tensorboard_writers(trainer)
        if not writers or stop_requested(trainer) or self._shown_step == algorithm.gradient_step:
            return
        is_first, self._shown_step = self._shown_step is None, algorithm.gradient_step
        if is_first:
            for writer in writers:
                _write_hyperparameters(writer, trainer, algorithm, finished=False)
        if self.histograms and isinstance(trainer.train_dataloader, BlockSampler):
            with evaluation_mode(trainer, algorithm):
                histograms = _histograms(algorithm, trainer.train_dataloader, with_data=is_first)
                for tag, values in histograms.items():
                    for writer in writers:
                        writer.add_histogram(tag, values.float().cpu().numpy(), algorithm.gradient_step)


@torch.no_grad()
def _histograms(algorithm: OfflineAlgorithm, table: BlockSampler, *, with_data: bool) -> dict[str, Tensor]:
    """Return the values of each histogram by its tag; the dataset's actions are shown once, `with_data`."""
    rows = torch.linspace(0, len(table.table) - 1, STATES, device=table.table.device).long()
    observations, data, *_ = torch.split(table.table[rows], list(table.widths), dim=-1)
    generator = torch.Generator(device=algorithm.device).manual_seed(algorithm.gradient_step)
    actions = {"data": data, "policy": algorithm.units.clamp(algorithm.sample_actions(observations, generator))}
    shown: dict[str, Tensor] = {}
    digits = len(str(algorithm.action_dim - 1))  # TensorBoard sorts by letters
    for whose, each in actions.items():
        if whose == "policy" or with_data:
            columns = algorithm.units.restore_actions(each).unbind(-1)
            shown |= {f"histograms/action_{i:0{digits}d}_{whose}": column for i, column in enumerate(columns)}
        values = algorithm.value_of(observations, each)
        if values is not None:
            shown[f"histograms/q_of_{whose}_actions"] = values
    return shown


def _write_hyperparameters(
    writer: SummaryWriter, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, *, finished: bool
) -> None:
    # Not `log_hyperparams(params, metrics)`: that logs the metrics a second time. The table reads the curves' ends.
    from torch.utils.tensorboard.summary import hparams

    scores: dict[str, float] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Evaluation) and "policy" in callback.scores:
            scores = callback.scores["policy"].logged("eval")
    experiment, start, end = hparams(_hyperparameters(trainer, algorithm), scores)  # type: ignore[no-untyped-call]
    file: Any = writer.file_writer
    for summary in (end,) if finished else (experiment, start):
        file.add_summary(summary)


def _hyperparameters(trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> dict[str, int | float | str]:
    """Return the options in which runs differ, as values that TensorBoard's table can sort and filter by."""
    values: dict[str, Any] = {"algorithm": type(algorithm).__name__, "max_steps": trainer.max_steps}
    datamodule = find_datamodule(trainer)
    if datamodule is not None:
        options = ("dataset", "batch_size", "reward", "normalize_observations")
        values |= {name: getattr(datamodule, name) for name in options}
    # Lightning adds names of its own that begin with an underscore; the widths are the dataset's.
    left_out = ("_", "observation_dim", "action_dim")
    values |= {name: each for name, each in flat(plain(algorithm.hparams)).items() if not name.startswith(left_out)}
    return {
        # a bool would be shown as 1.0000
        name: each if isinstance(each, (int, float, str)) and not isinstance(each, bool) else str(each).lower()
        for name, each in values.items()
    }
