"""The one structure that crosses from the data side to the algorithms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Transitions, float32, with any leading dimensions: `[batch, ...]` an update, `[updates, batch, ...]` a block.

    Attributes:
        observations: `[..., observation_dim]`.
        actions: `[..., action_dim]`, in [-1, 1], or as wide as the data module's `action_limit` says.
        rewards: `[...]`, after the reward rule of the data module.
        next_observations: `[..., observation_dim]`.
        terminals: `[...]`, 1 where the episode ended in a terminal state (no bootstrapping), else 0.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminals: Tensor

    def updates(self) -> Iterator[Batch]:
        """Split a block `[updates, batch, ...]` into the batches of its updates."""
        return (Batch(*fields) for fields in zip(*(field.unbind(0) for field in self), strict=True))
