"""Target networks."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor

from lit_offrl.algorithms.base import OfflineAlgorithm, Target
from lit_offrl.callbacks.base import AlgorithmCallback


class EMATargets(AlgorithmCallback):
    """Moves the algorithm's `targets()` after every update, with one fused operation for each target."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Target, list[Tensor], list[Tensor]]] = []

    def on_fit_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Find the parameters, and let the algorithm call `update` after each of its updates."""
        self._pairs = [
            (each, [p.detach() for p in each.target.parameters()], [p.detach() for p in each.online.parameters()])
            for each in algorithm.targets()
        ]
        algorithm.target_updates = self

    def on_fit_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Detach from the algorithm."""
        algorithm.target_updates = None

    def update(self, main_step: int) -> None:
        """Move the targets that move at step `main_step` of the main phase, counted from 1; at most 0 before it."""
        for target, parameters, online_parameters in self._pairs:
            if target.moves_at(main_step):
                torch._foreach_lerp_(parameters, online_parameters, target.rate)
