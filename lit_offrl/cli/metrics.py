"""The names of metrics that validations log, for what watches one: callbacks of Lightning, and searches."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import EarlyStopping

from lit_offrl.callbacks.bandit import BanditScores
from lit_offrl.callbacks.rollout import Scores
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.sources import source_of
from lit_offrl.errors import UserError, did_you_mean


def check_metric(option: str, metric: str, is_bandit: bool, validation_fraction: float, others: str = "") -> None:
    """Check the name of a metric that validations log.

    Args:
        option: What names it.
        metric: The name.
        is_bandit: Whether the dataset is a 2-D set, whose evaluations have metrics of their own.
        validation_fraction: Share of held-out episodes, without which there is no `val/...`.
        others: Further kinds of metrics, for the error message.

    Raises:
        UserError: There is no such metric.
    """
    if metric.startswith("eval/"):
        scores = BanditScores(0, 0, 0, 0, 0, 0) if is_bandit else Scores(0, 0, 0, 0, 0, 0)
        known = list(scores.logged("eval"))
        if metric not in known:
            hint = did_you_mean(metric, known)
            raise UserError(f"{option}: no '{metric}'{hint}; evaluations have {', '.join(known)}")
    elif not metric.startswith(("eval_", "val/")):
        raise UserError(f"{option}: '{metric}' is none of eval/...{others and f', {others}'} and val/...")
    if metric.startswith("val/") and not validation_fraction:
        raise UserError(f"{option}: val/... needs held-out episodes: set data.validation_fraction, e.g. 0.1")


def check_monitors(trainer: lightning.Trainer, datamodule: D4RLDataModule, resumes: bool) -> None:
    """Check the metrics that callbacks watch.

    Args:
        trainer: Has the callbacks.
        datamodule: Decides which metrics there are.
        resumes: The run goes on from a checkpoint. EarlyStopping then finds no metric before the first validation, and
            must not take that for a wrong name, which the run's first part would have found.

    Raises:
        UserError: One is never logged.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str):
            option = f"trainer.callbacks: {type(callback).__name__}.monitor"
            is_bandit = not source_of(datamodule.info).plays_episodes
            check_metric(option, monitor, is_bandit, datamodule.validation_fraction)
        if isinstance(callback, EarlyStopping) and resumes:
            callback.strict = False
