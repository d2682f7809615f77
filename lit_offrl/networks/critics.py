"""Action-value and state-value networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lit_offrl.networks.embeddings import StepEmbedding
from lit_offrl.networks.mlp import Mish, concatenate, mlp


class EnsembleQ(nn.Module):
    """Independent Q networks over (observation, action), optionally with LayerNorm after each hidden layer.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        hidden: Widths of the hidden layers.
        members: Number of networks.
        layer_norm: Whether to normalize hidden layers.
        norm_last: Whether to do so after the activation.
        activation: Makes the activation after each hidden layer.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (256, 256, 256),
        *,
        members: int = 2,
        layer_norm: bool = True,
        norm_last: bool = False,
        activation: Callable[[], nn.Module] = Mish,
    ) -> None:
        super().__init__()
        widths = (observation_dim + action_dim, *hidden, 1)
        self.members = nn.ModuleList(
            mlp(widths, activation, layer_norm=layer_norm, norm_last=norm_last) for _ in range(members)
        )

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return the Q values `[members, ...]` of `[..., observation_dim]` and `[..., action_dim]`, which broadcast."""
        inputs = concatenate(observations, actions)
        return torch.stack([member(inputs).squeeze(-1) for member in self.members])


class DiffusionValue(nn.Module):
    """Independent networks V_n(s, a^n) over the steps of a diffusion policy, with LayerNorm (BDPO, Eq. 14).

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        steps: Largest diffusion step.
        hidden: Widths of the hidden layers.
        members: Number of networks; each embeds the step by itself.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        steps: int,
        hidden: Sequence[int] = (256, 256, 256),
        *,
        members: int = 10,
    ) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(StepEmbedding(steps, (64, 128, 64)) for _ in range(members))
        widths = (observation_dim + action_dim + 64, *hidden, 1)
        self.members = nn.ModuleList(mlp(widths, layer_norm=True) for _ in range(members))

    def forward(self, observations: Tensor, noisy_actions: Tensor, step: Tensor) -> Tensor:
        """Return the values `[members, ...]` of `[..., observation_dim]`, `[..., action_dim]` and integers `[...]`.

        The leading dimensions broadcast.
        """
        pairs = zip(self.embeddings, self.members, strict=True)
        inputs = observations, noisy_actions
        return torch.stack([member(concatenate(*inputs, embedding(step))).squeeze(-1) for embedding, member in pairs])


class ValueNetwork(nn.Module):
    """State value V(s).

    Args:
        observation_dim: Width of an observation.
        hidden: Widths of the hidden layers.
        activation: Makes the activation after each hidden layer.
        layer_norm: Whether to normalize hidden layers.
        norm_last: Whether to do so after the activation.
    """

    def __init__(
        self,
        observation_dim: int,
        hidden: Sequence[int] = (256, 256, 256),
        activation: Callable[[], nn.Module] = Mish,
        *,
        layer_norm: bool = False,
        norm_last: bool = False,
    ) -> None:
        super().__init__()
        self.layers = mlp((observation_dim, *hidden, 1), activation, layer_norm=layer_norm, norm_last=norm_last)

    def forward(self, observations: Tensor) -> Tensor:
        """Return the values `[batch]` of `[batch, observation_dim]`."""
        values: Tensor = self.layers(observations).squeeze(-1)
        return values
