"""Target networks."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor

from lit_offrl.algorithms.base import OfflineAlgorithm, Target


class EMATargets(lightning.Callback):
    """Applies the algorithm's `targets()` after every update, a few fused kernels in all."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Target, list[Tensor], list[Tensor]]] = []

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Attach to the algorithm's updates."""
        assert isinstance(pl_module, OfflineAlgorithm)
        self._pairs = [
            (
                target,
                [p.detach() for p in target.target.parameters()],
                [p.detach() for p in target.online.parameters()],
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
        for target, following, followed in self._pairs:
            if target.due(main_step):
                torch._foreach_lerp_(following, followed, target.rate)
