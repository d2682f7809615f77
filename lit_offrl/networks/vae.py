"""A conditional variational autoencoder of actions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_offrl.networks.mlp import concatenate, mlp


class ActionVAE(nn.Module):
    """q(z | s, a) = N(mean, std^2) and a = decode(s, z), of two hidden layers each, ReLU: BCQ's behavior model.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        latent_dim: Width of the latent variable z.
        hidden_dim: Width of the hidden layers.
    """

    LOG_STD_RANGE = (-4.0, 15.0)

    def __init__(self, observation_dim: int, action_dim: int, latent_dim: int, hidden_dim: int = 750) -> None:
        super().__init__()
        hidden = (hidden_dim, hidden_dim)
        self.encoder = mlp((observation_dim + action_dim, *hidden, 2 * latent_dim), nn.ReLU)
        self.decoder = mlp((observation_dim + latent_dim, *hidden, action_dim), nn.ReLU)

    def encode(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of z, `[..., latent_dim]` each."""
        mean, log_std = self.encoder(concatenate(observations, actions)).chunk(2, dim=-1)
        return mean, log_std.clamp(*self.LOG_STD_RANGE).exp()

    def decode(self, observations: Tensor, latents: Tensor) -> Tensor:
        """Return actions in (-1, 1), `[..., action_dim]`; leading dimensions of the arguments broadcast."""
        return torch.tanh(self.decoder(concatenate(observations, latents)))
