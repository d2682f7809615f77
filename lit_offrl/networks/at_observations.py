"""Networks at fixed observations, whose time features are computed for a whole sampling run at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lit_offrl.networks.mlp import FEW_ROWS


class Timed(Protocol):
    """A noise level as a sampler has it, hashable."""

    def times(self, like: Tensor, count: int) -> Tensor:
        """Return its time as networks take it, `[count]`, on the device of `like`."""


class AtObservations:
    """A function of actions and times at fixed observations, in two stages.

    Args:
        observations: `[..., observation_dim]`.
        prepare: What does not depend on the actions, at times that broadcast to `[...]`.
        finish: The function of actions and of what `prepare` returned; leading dimensions broadcast.
    """

    def __init__(
        self, observations: Tensor, prepare: Callable[[Tensor], tuple[Tensor, ...]], finish: Callable[..., Tensor]
    ) -> None:
        self.observations = observations
        self.prepare = prepare
        self.finish = finish

    def __call__(self, actions: Tensor, time: Tensor) -> Tensor:
        """Return the function of `[..., action_dim]` and `[...]`."""
        return self.finish(actions, *self.prepare(time))

    def along(self, levels: Sequence[Timed]) -> Callable[[Tensor, Timed], Tensor]:
        """Return it as a function of actions and one of the `levels` that a sampler visits.

        For few observations, where calls cost more than arithmetic, the first stage is done here, for all levels at
        once; for many its results would fill the memory, and an evaluation does its own.
        """
        if self.observations.shape[:-1].numel() > FEW_ROWS:
            return lambda actions, level: self(actions, level.times(actions, 1))
        times = torch.cat([level.times(self.observations, 1) for level in levels])  # on the device from the beginning
        prepared = self.prepare(times.view(-1, *[1] * (self.observations.ndim - 1)))
        table = dict(zip(levels, zip(*(each.unbind() for each in prepared), strict=True), strict=True))

        def at_level(actions: Tensor, level: Timed) -> Tensor:
            return self.finish(actions, *table[level])

        return at_level
