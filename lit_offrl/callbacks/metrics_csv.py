"""metrics.csv: every logged scalar, one row per logging event, appended to when a run is resumed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_offrl.run_folder import GrowingCSV


class MetricsCSV(Logger):
    """Logs to metrics.csv. Lightning's CSVLogger does not serve: it starts the file anew when a run is resumed.

    Args:
        folder: The run folder.
        keep_until: Gradient step of the checkpoint that training resumes from: later rows go. Infinity keeps all;
            None is for a new run.
        validates_again: The run begins with the validation of that checkpoint: its rows go, too.
    """

    name = version = ""  # not part of the path

    def __init__(self, folder: str | Path, keep_until: float | None = None, validates_again: bool = False) -> None:
        super().__init__()
        self._validates_again = validates_again
        self._folder = Path(folder)
        self._keep_until = keep_until

    @property
    def save_dir(self) -> str:
        """The run folder; Lightning's `trainer.log_dir` where this logger is the first."""
        return str(self._folder)

    @functools.cached_property
    @rank_zero_experiment
    def experiment(self) -> GrowingCSV:
        """The file, opened at the first use."""
        dropped_at_end = ("val/", "eval") if self._validates_again else ()
        return GrowingCSV(self._folder / "metrics.csv", ["step"], self._keep_until, dropped_at_end)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row."""
        self.experiment.append({"step": step, **{name: float(value) for name, value in metrics.items()}})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: they are in config.yaml."""
