"""The one structure that crosses from the data side to the algorithms."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Transitions, float32, with any leading dimensions.

    `[batch, ...]` for an update and `[updates, batch, ...]` for a block; segments have `[..., steps, ...]`.

    Attributes:
        observations: `[..., observation_dim]`.
        actions: `[..., action_dim]`, in [-1, 1], or as wide as the data module's `action_limit` says.
        rewards: `[...]`, after the reward rule of the data module.
        next_observations: `[..., observation_dim]`.
        terminals: `[...]`, 1 where the episode ended in a terminal state (no bootstrapping), else 0.
        rows: `[...]`, int64, which rows of the dataset these are; None in batches that come from no dataset.
        mask: Of segments `[..., steps]`: 1 for the steps of the episode that the segment begins in, 0 for those beyond
            its end, which repeat its last transition; None where transitions are drawn one by one.
        returns_to_go: Of segments `[..., steps]`: undiscounted sum of `rewards` from each step to the end of its
            episode.
        timesteps: Of segments `[..., steps]`, int64: the place of each step in its episode, from 0.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminals: Tensor
    rows: Tensor | None = None
    mask: Tensor | None = None
    returns_to_go: Tensor | None = None
    timesteps: Tensor | None = None

    def updates(self) -> Iterator[Batch]:
        """Split a block `[updates, batch, ...]` into the batches of its updates."""
        count = len(self.rewards)
        fields = (repeat(None, count) if field is None else field.unbind(0) for field in self)
        return (Batch(*each) for each in zip(*fields, strict=True))

    def at(self, step: int) -> Batch:
        """Return the transitions `[batch, ...]` at one step of segments `[batch, steps, ...]`; rows stay the first."""
        observations, actions, rewards, next_observations, terminals = (field[:, step] for field in self[:5])
        return Batch(observations, actions, rewards, next_observations, terminals, self.rows)

    def head(self, count: int) -> Batch:
        """Return the first `count` transitions of a batch, or all where there are fewer."""
        return Batch._make(None if field is None else field[:count] for field in self)
