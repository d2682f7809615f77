"""Action-value and state-value networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_offrl.networks.mlp import mlp


class EnsembleQ(nn.Module):
    """Independent Q networks over (observation, action), Mish, optionally with LayerNorm after each hidden layer.

    Kept as separate networks: batching them into one tensor does not pay on a CPU, and each stays a plain MLP.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        hidden: Widths of the hidden layers.
        members: Number of networks.
        layer_norm: Whether to normalise hidden layers.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (256, 256, 256),
        *,
        members: int = 2,
        layer_norm: bool = True,
    ) -> None:
        super().__init__()
        widths = (observation_dim + action_dim, *hidden, 1)
        self.members = nn.ModuleList(mlp(widths, layer_norm=layer_norm) for _ in range(members))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return the Q values `[members, batch]` of `[batch, observation_dim]`, `[batch, action_dim]`."""
        inputs = torch.cat([observations, actions], dim=-1)
        return torch.stack([member(inputs).squeeze(-1) for member in self.members])


class ValueNetwork(nn.Module):
    """State value V(s), Mish, no normalisation."""

    def __init__(self, observation_dim: int, hidden: Sequence[int] = (256, 256, 256)) -> None:
        super().__init__()
        self.layers = mlp((observation_dim, *hidden, 1))

    def forward(self, observations: Tensor) -> Tensor:
        """Return the values `[batch]` of `[batch, observation_dim]`."""
        values: Tensor = self.layers(observations).squeeze(-1)
        return values
