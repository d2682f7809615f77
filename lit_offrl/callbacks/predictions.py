"""actions.npy: what `predict` returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.callbacks.base import AlgorithmCallback
from lit_offrl.system.files import write_atomically


class PredictionsFile(AlgorithmCallback):
    """Writes the policy's actions at the dataset's observations, float32 `[n, action_dim]`, in the dataset's order."""

    NAME = "actions.npy"

    def __init__(self) -> None:
        self._actions: list[NDArray[np.float32]] = []

    def on_predict_batch_end(
        self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, outputs: Tensor, *batch: Any
    ) -> None:
        """Keep the actions of a batch."""
        self._actions.append(outputs.float().cpu().numpy())

    def on_predict_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Write all actions, on rank 0 only: every rank has the same."""

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, np.concatenate(self._actions), allow_pickle=False)

        if trainer.is_global_zero:
            write_atomically(Path(trainer.default_root_dir) / self.NAME, write)
