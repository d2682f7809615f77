"""From raw observations to raw actions: the units of a dataset, and the choice among candidate actions."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class DataUnits(Protocol):
    """What a data module knows of the units of its dataset, see `D4RLDataModule`."""

    action_limit: float
    normalize_observations: bool

    @property
    def action_units(self) -> tuple[Tensor, Tensor]:
        """Center and scale of the actions, each `[action_dim]`."""

    @property
    def observation_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the observations, each `[observation_dim]`."""


class Units(nn.Module):
    """Maps between the units of a dataset and those of the networks; a part of every checkpoint.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.

    Attributes:
        limit: Networks see actions in [-limit, limit].
    """

    observation_mean: Tensor
    observation_std: Tensor
    action_center: Tensor
    action_scale: Tensor
    limit: Tensor

    def __init__(self, observation_dim: int, action_dim: int) -> None:
        super().__init__()
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))
        self.register_buffer("action_center", torch.zeros(action_dim))
        self.register_buffer("action_scale", torch.ones(action_dim))
        self.register_buffer("limit", torch.ones(()))

    def set_from(self, data: DataUnits) -> None:
        """Copy the units of a data module."""
        center, scale = data.action_units
        self.action_center.copy_(center)
        self.action_scale.copy_(scale)
        self.limit.fill_(data.action_limit)
        if data.normalize_observations:
            mean, std = data.observation_statistics
            self.observation_mean.copy_(mean)
            self.observation_std.copy_(std)

    def normalize(self, observations: Tensor) -> Tensor:
        """Return observations `[..., observation_dim]` as the networks see them."""
        return (observations.to(self.observation_mean) - self.observation_mean) / self.observation_std

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """Return actions `[..., action_dim]` as the networks see them."""
        return (actions - self.action_center) / self.action_scale

    def restore_actions(self, actions: Tensor) -> Tensor:
        """Return actions `[..., action_dim]` of the networks in the units of the dataset."""
        return self.action_center + self.action_scale * actions

    def clamp(self, actions: Tensor) -> Tensor:
        """Return actions of the networks, clamped to [-limit, limit]."""
        return actions.clamp(-self.limit, self.limit)


def draw_noise(observations: Tensor, *shape: int, generator: torch.Generator | None) -> Tensor:
    """Return standard normal noise `[batch, *shape]` to act with at `observations`, of their device and precision."""
    like = observations
    return torch.randn(like.shape[0], *shape, generator=generator, device=like.device, dtype=like.dtype)


def select(actions: Tensor, q: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Return one of the candidate `actions` `[batch, candidates, action_dim]` per row, `[batch, action_dim]`.

    Args:
        actions: Candidates.
        q: Q values of the candidates, `[batch, candidates]`.
        temperature: Temperature of the softmax over `q` from which the choice is drawn; 0 chooses the highest Q.
        generator: Stream of the draw.
    """
    if temperature:
        chosen = torch.multinomial((q / temperature).softmax(dim=-1), 1, generator=generator)[:, 0]
    else:
        chosen = q.argmax(dim=-1)
    return actions[torch.arange(actions.shape[0], device=actions.device), chosen]
