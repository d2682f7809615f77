"""results.json: the outcome of a run, for people and for `report`."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lit_offrl import __version__
from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.callbacks.base import AlgorithmCallback, find_datamodule
from lit_offrl.callbacks.checkpoint import stop_requested
from lit_offrl.system.files import write_json


class ResultsFile(AlgorithmCallback):
    """Writes results.json, atomically, when fit, validate or test ends, also after an error.

    Other callbacks add their entries by their method `results`. This one comes after them in the list of callbacks.

    Attributes:
        ablation: Name of the ablation that the run trains, e.g. `no_q`; None for the algorithm as it is.
    """

    def __init__(self) -> None:
        self.ablation: str | None = None
        self._training = False

    def on_train_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Note that training has begun: from here on an error is a failure of the run."""
        self._training = True

    def on_fit_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Write after training, which is finished only if it has made all its steps: not after `max_time`."""
        if stop_requested(trainer):
            status = "interrupted"
        elif algorithm.gradient_step >= trainer.max_steps:
            status = "finished"
        else:
            early = (each for each in trainer.callbacks if isinstance(each, EarlyStopping))  # type: ignore[attr-defined]
            status = "stopped early" if any(each.stopped_epoch for each in early) else "interrupted"
        self._write(trainer, algorithm, status)

    def on_validation_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Write the present scores while training, and those of `validate` and `test` unless they were stopped."""
        if trainer.state.fn == "fit":
            self._write(trainer, algorithm, "running")
        elif not stop_requested(trainer):
            self._write(trainer, algorithm, "finished")

    on_test_end = on_validation_end

    def on_exception(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, exception: BaseException) -> None:
        """Write that the run failed, if training had begun: bad input leaves the results of an earlier run alone."""
        if self._training:
            interrupted = isinstance(exception, (KeyboardInterrupt, SystemExit))
            self._write(trainer, algorithm, "interrupted" if interrupted else "failed")

    def _write(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, status: str) -> None:
        datamodule = find_datamodule(trainer)
        if not trainer.is_global_zero or datamodule is None:
            return
        info = datamodule.info
        results: dict[str, Any] = {
            "algorithm": type(algorithm).__name__.lower(),
            "ablation": self.ablation,
            "dataset": info.id,
            "dataset_source": info.source,
            "dataset_sha256": info.sha256,
            "dataset_return_mean": float(datamodule.transitions.episode_returns().mean()),
            "transitions": len(datamodule.transitions),
            "seed": algorithm.seed,
            "stage": str(trainer.state.fn.value if trainer.state.fn else None),
            "status": status,
            "gradient_steps": algorithm.gradient_step,
            "init_from": algorithm.init_from,
        }
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AlgorithmCallback):
                results |= callback.results()
        device = trainer.strategy.root_device  # the module itself is back on the CPU after fit
        results["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        results["versions"] = _versions()
        write_json(Path(trainer.default_root_dir) / "results.json", results)


@functools.cache
def _versions() -> dict[str, str]:
    packages = ("torch", "lightning", "gymnasium", "mujoco", "minari", "numpy")
    own = {"lit_offrl": __version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in packages}
