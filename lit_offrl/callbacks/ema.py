"""Target networks."""

from __future__ import annotations

from dataclasses import dataclass

import lightning
import torch
from torch import Tensor

from lit_offrl.algorithms.base import OfflineAlgorithm


@dataclass(frozen=True)
class _Pair:
    online: list[Tensor]
    target: list[Tensor]
    rate: float
    every: int


class EMATargets(lightning.Callback):
    """Applies the algorithm's `targets()` after every update of the main phase, a few fused kernels in all."""

    def __init__(self) -> None:
        self._pairs: list[_Pair] = []

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Attach to the algorithm's updates."""
        assert isinstance(pl_module, OfflineAlgorithm)
        self._pairs = [
            _Pair(
                [p.detach() for p in target.online.parameters()],
                [p.detach() for p in target.target.parameters()],
                target.rate,
                target.every,
            )
            for target in pl_module.targets()
        ]
        if self._pairs:
            pl_module.update_hooks.append(self._follow)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Detach."""
        assert isinstance(pl_module, OfflineAlgorithm)
        if self._follow in pl_module.update_hooks:
            pl_module.update_hooks.remove(self._follow)

    def _follow(self, main_step: int) -> None:
        for pair in self._pairs:
            if main_step % pair.every == 0:
                torch._foreach_lerp_(pair.target, pair.online, pair.rate)
