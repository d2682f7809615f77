"""What TensorBoard shows beside losses and scores: hyper-parameters, learning rates, gradients, actions and values."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.tensorboard.writer import SummaryWriter

from lit_offrl.algorithms.base import OfflineAlgorithm, OptimizerSpec
from lit_offrl.callbacks.bandit import BanditEvaluation
from lit_offrl.callbacks.base import AlgorithmCallback, evaluation_mode
from lit_offrl.callbacks.checkpoint import stop_requested
from lit_offrl.callbacks.rollout import RolloutEvaluation
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.transitions import BlockSampler
from lit_offrl.ranges import flat, plain

STATES = 256  # of the dataset, evenly spaced; some policies weigh a thousand candidates in each


class TensorBoardDetails(AlgorithmCallback):
    """Logs what explains a curve, at a cost that does not show.

    * `train/learning_rate_<optimizer>`: at the gradient step on the x axis; to every logger.
    * `train/gradient_norm_<optimizer>`: Euclidean norm over all of the optimizer's parameters, after clipping, in the
      last update of a block; to every logger. An optimizer that did not step in the block has none.
    * Histograms at every evaluation: actions of the policy at fixed states of the dataset, one per dimension and in the
      dataset's units, beside the dataset's own there; values of both where the algorithm has a critic. They draw noise
      from a stream of their own, so that they change nothing about training.
    * The table of hyper-parameters (HPARAMS), with the scores of the policy.

    Args:
        histograms: Whether to log histograms.
    """

    def __init__(self, histograms: bool = True) -> None:
        self.histograms = histograms
        self._optimizers: dict[str, tuple[OptimizerSpec, torch.optim.Optimizer]] = {}
        self._steps: dict[str, float] = {}  # of each optimizer, when its norm was last asked for
        self._data_shown = False
        self._described = False
        self._shown_step: int | None = None

    # ---------------------------------------------------------------- Lightning's hooks

    def on_train_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Find the parameters of each optimizer."""
        self._optimizers = {
            name: (spec, optimizer)
            for (name, spec), optimizer in zip(algorithm.optimizer_specs().items(), trainer.optimizers, strict=True)
        }
        self._new_gradient_norms()  # of a resumed run: they were logged before

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        algorithm: OfflineAlgorithm,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log learning rates and gradient norms, with one host sync per block."""
        if not trainer.loggers:
            return
        main_step = algorithm.gradient_step - algorithm.main_start
        values = {
            f"train/learning_rate_{name}": spec.rate_at(main_step, algorithm.main_steps)
            for name, (spec, _) in self._optimizers.items()
        }
        values |= {f"train/gradient_norm_{name}": norm for name, norm in self._new_gradient_norms().items()}
        algorithm.block_metrics.update(values)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Log histograms at each evaluation while training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show(trainer, algorithm)

    def on_train_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Log those of the final policy, and that the run is finished."""
        self._show(trainer, algorithm)
        if not stop_requested(trainer):
            for writer in _writers(trainer):
                _write_hyperparameters(writer, trainer, algorithm, finished=True)
                writer.flush()

    # ---------------------------------------------------------------- the work

    def _new_gradient_norms(self) -> dict[str, float]:
        """Return the norms of the gradients of each optimizer that has stepped since the last call, with one host sync.

        Steps are counted on the device, by the optimizer: an update that is replayed runs no Python that could.
        """
        found: dict[str, Tensor] = {}
        for name, (_, optimizer) in self._optimizers.items():
            parameters: list[nn.Parameter] = optimizer.param_groups[0]["params"]
            steps = optimizer.state[parameters[0]]["step"]
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros_like(steps)
            found[name] = torch.stack([steps.to(norm), norm])
        numbers: list[list[float]] = torch.stack([*found.values()]).tolist() if found else []
        new = {
            name: norm for name, (step, norm) in zip(found, numbers, strict=True) if step != self._steps.get(name, 0)
        }
        self._steps = {name: step for name, (step, _) in zip(found, numbers, strict=True)}
        return new

    def _show(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        writers = _writers(trainer)
        if not writers or stop_requested(trainer) or self._shown_step == algorithm.gradient_step:
            return
        self._shown_step = algorithm.gradient_step
        if not self._described:
            self._described = True
            for writer in writers:
                _write_hyperparameters(writer, trainer, algorithm, finished=False)
        if self.histograms and isinstance(trainer.train_dataloader, BlockSampler):
            with evaluation_mode(trainer, algorithm):
                self._show_histograms(writers, algorithm, trainer.train_dataloader)

    @torch.no_grad()
    def _show_histograms(self, writers: list[SummaryWriter], algorithm: OfflineAlgorithm, table: BlockSampler) -> None:
        rows = torch.linspace(0, len(table.table) - 1, STATES, device=table.table.device).long()
        observations, data, *_ = torch.split(table.table[rows], list(table.widths), dim=-1)
        generator = torch.Generator(device=algorithm.device).manual_seed(algorithm.gradient_step)
        policy = algorithm.units.clamp(algorithm.sample_actions(observations, generator))
        actions = {"policy": policy} if self._data_shown else {"data": data, "policy": policy}
        self._data_shown = True
        shown: dict[str, Tensor] = {}
        digits = len(str(algorithm.action_dim - 1))  # TensorBoard sorts by letters
        for whose, each in actions.items():
            columns = algorithm.units.restore_actions(each).unbind(-1)
            shown |= {f"histograms/action_{i:0{digits}d}_{whose}": column for i, column in enumerate(columns)}
        for whose, each in (("data", data), ("policy", policy)):
            values = algorithm.value_of(observations, each)
            if values is not None:
                shown[f"histograms/q_of_{whose}_actions"] = values
        for tag, values in shown.items():
            numbers = values.float().cpu().numpy()
            for writer in writers:
                writer.add_histogram(tag, numbers, algorithm.gradient_step)


def _writers(trainer: lightning.Trainer) -> list[SummaryWriter]:
    loggers = [each for each in trainer.loggers if isinstance(each, TensorBoardLogger)]
    return [each.experiment for each in loggers] if trainer.is_global_zero else []


def _write_hyperparameters(
    writer: SummaryWriter, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, *, finished: bool
) -> None:
    # Not `log_hyperparams(params, metrics)`: that logs the metrics a second time. The table reads the curves' ends.
    from torch.utils.tensorboard.summary import hparams

    experiment, start, end = hparams(hyperparameters(trainer, algorithm), _final_scores(trainer))  # type: ignore[no-untyped-call]
    file: Any = writer.file_writer
    for summary in (end,) if finished else (experiment, start):
        file.add_summary(summary)


def hyperparameters(trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> dict[str, int | float | str]:
    """Return what tells one run from another, in values that TensorBoard's table can sort and filter by."""
    values: dict[str, Any] = {"algorithm": type(algorithm).__name__, "max_steps": trainer.max_steps}
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(datamodule, D4RLDataModule):
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


def _final_scores(trainer: lightning.Trainer) -> dict[str, float]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (RolloutEvaluation, BanditEvaluation)) and "policy" in callback.scores:
            return callback.scores["policy"].logged("eval")
    return {}
