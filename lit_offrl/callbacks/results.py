"""results.json: what a run came to, for people and for `report`."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import lightning
import torch

from lit_offrl import __version__
from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.callbacks.checkpoint import RunCheckpoint
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.run_folder import write_json

PACKAGES = ("torch", "lightning", "gymnasium", "mujoco", "minari", "numpy")


class ResultsFile(lightning.Callback):
    """Writes results.json, atomically, when fit, validate or test ends, also when it ends badly.

    Callbacks that have a method `results()` add its entries.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write after training."""
        stopped = any(isinstance(c, RunCheckpoint) and c.stop_requested for c in trainer.checkpoint_callbacks)
        self._write(trainer, pl_module, "interrupted" if stopped else "finished")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write after `validate`; while training, note the score so far."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module, "running" if trainer.state.fn == "fit" else "finished")

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write after `test`."""
        self._write(trainer, pl_module, "finished")

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Write that the run failed."""
        interrupted = isinstance(exception, KeyboardInterrupt)
        self._write(trainer, pl_module, "interrupted" if interrupted else "failed")

    def _write(self, trainer: lightning.Trainer, module: lightning.LightningModule, status: str) -> None:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or trainer.log_dir is None or not isinstance(datamodule, D4RLDataModule):
            return
        assert isinstance(module, OfflineAlgorithm)
        info = datamodule.info
        results: dict[str, Any] = {
            "algorithm": type(module).__name__.lower(),
            "dataset": info.id,
            "dataset_source": info.source,
            "dataset_sha256": info.sha256,
            "dataset_return_mean": float(datamodule.transitions.episode_returns().mean()),
            "transitions": len(datamodule.transitions),
            "seed": self.seed,
            "stage": str(trainer.state.fn.value if trainer.state.fn else None),
            "status": status,
            "gradient_steps": module.gradient_step,
        }
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "results"):
                results |= callback.results()
        results["device"] = _device_name(module.device)
        results["versions"] = {
            "lit_offrl": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        }
        write_json(Path(trainer.log_dir) / "results.json", results)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
