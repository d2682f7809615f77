"""Networks that produce actions: inside a diffusion policy, and as a one-step Gaussian policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_offrl.networks.embeddings import SinusoidalEmbedding
from lit_offrl.networks.mlp import mlp


class DiffusionMLP(nn.Module):
    """F(x, c_noise, s): the network inside a diffusion policy's denoiser, as DTQL's authors built it.

    Five linear layers on [noisy action, observation, time embedding]. There is deliberately no activation after
    the first: it mixes the three inputs, and the paper's results were had with it.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        hidden_dim: Width of the four hidden layers.
        embedding_dim: Width of the time embedding.
    """

    def __init__(self, observation_dim: int, action_dim: int, hidden_dim: int = 256, embedding_dim: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Sequential(
            SinusoidalEmbedding(embedding_dim), *mlp((embedding_dim, 2 * embedding_dim, embedding_dim))
        )
        self.mix = nn.Linear(action_dim + observation_dim + embedding_dim, hidden_dim)
        self.layers = mlp((hidden_dim, hidden_dim, hidden_dim, hidden_dim, action_dim))

    def forward(self, noisy_actions: Tensor, noise_condition: Tensor, observations: Tensor) -> Tensor:
        """Map `[batch, action_dim]`, `[batch]`, `[batch, observation_dim]` to `[batch, action_dim]`."""
        embedded = self.embedding(noise_condition)
        output: Tensor = self.layers(self.mix(torch.cat([noisy_actions, observations, embedded], dim=-1)))
        return output


# The authors divide actions by 1 + 1e-3, so that those on the border of the box have a finite pre-image.
BORDER = 1e-3


class TanhGaussian(NamedTuple):
    """A diagonal normal distribution on the pre-tanh variable u; actions are tanh(u).

    Attributes:
        mean: `[batch, action_dim]`.
        std: `[batch, action_dim]`.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return actions tanh(mean + std * noise) in (-1, 1), reparametrised."""
        return torch.tanh(self.mean + self.std * noise)

    def log_density(self, actions: Tensor) -> Tensor:
        """Return log N(atanh(a / 1.001); mean, std) summed over action dimensions, `[batch]`.

        The tanh Jacobian is left out, as in the authors' code: it does not depend on the parameters.
        """
        pre_tanh = torch.atanh(actions / (1 + BORDER))
        standardized = (pre_tanh - self.mean) / self.std
        return -(0.5 * standardized.square() + self.std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)


class TanhGaussianPolicy(nn.Module):
    """One-step policy a = tanh(mean(s) + std(s) z), ReLU, orthogonal initialisation in every layer.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        hidden: Widths of the hidden layers.
    """

    LOG_STD_RANGE = (-5.0, 2.0)

    def __init__(self, observation_dim: int, action_dim: int, hidden: Sequence[int] = (256, 256, 256)) -> None:
        super().__init__()
        self.layers = mlp((observation_dim, *hidden, 2 * action_dim), nn.ReLU)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, observations: Tensor) -> TanhGaussian:
        """Return the action distribution at `[batch, observation_dim]`."""
        mean, log_std = self.layers(observations).chunk(2, dim=-1)
        return TanhGaussian(mean, log_std.clamp(*self.LOG_STD_RANGE).exp())
