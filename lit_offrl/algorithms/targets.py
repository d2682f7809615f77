"""Target networks: slowly moving copies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Target:
    """A pair of networks of which one slowly moves to the other: target <- target + rate * (online - target).

    Attributes:
        online: The network that is trained.
        target: The network that moves to it.
        rate: Share of the distance covered in one step.
        every: Move at the gradient steps of the main phase, counted from 1, that this number divides.
        after: Move only at steps of the main phase beyond this one.
        early: Move at every step before the main phase, instead of in it.
        early_steps: Where `early`, move in the last so many steps before the main phase only; None for all of them.
    """

    online: nn.Module
    target: nn.Module
    rate: float
    every: int = 1
    after: int = 0
    early: bool = False
    early_steps: int | None = None

    def moves_at(self, main_step: int) -> bool:
        """Return whether to move after step `main_step` of the main phase, counted from 1; below, before it."""
        if self.early or main_step < 1:
            in_range = self.early_steps is None or main_step > -self.early_steps
            return self.early and main_step < 1 and in_range
        return main_step > self.after and main_step % self.every == 0
