"""Networks that produce actions: inside a diffusion policy, and as one-step policies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_offrl.networks.embeddings import SinusoidalEmbedding, StepEmbedding
from lit_offrl.networks.mlp import (
    Mish,
    ResidualBlock,
    apply_with_dropout,
    concatenate,
    mlp,
    orthogonal_,
    tanh_gelu,
    xavier_uniform_,
)


class DiffusionMLP(nn.Module):
    """F(x, c_noise, s): the network inside a diffusion policy's denoiser, as DTQL's authors built it.

    Five linear layers on [noisy action, observation, time embedding]. There is no activation after the first layer,
    as in the authors' code, with which the paper's results were obtained.

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
        """Map `[..., action_dim]`, `[...]` and `[..., observation_dim]`, which broadcast, to `[..., action_dim]`."""
        inputs = concatenate(noisy_actions, observations, self.embedding(noise_condition))
        output: Tensor = self.layers(self.mix(inputs))
        return output


class StepDenoisingMLP(nn.Module):
    """F(x_n, n, s) of a discrete schedule: the noise prediction of BDPO and Diffusion-QL.

    An MLP on [noisy action, features of the step, observation], Mish.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        steps: Largest diffusion step.
        hidden: Widths of the hidden layers.
        embedding: Features of the step; BDPO's where None.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        steps: int,
        hidden: Sequence[int] = (256, 256, 256, 256),
        embedding: StepEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.embedding = StepEmbedding(steps) if embedding is None else embedding
        self.layers = mlp((action_dim + self.embedding.width + observation_dim, *hidden, action_dim))

    def forward(self, noisy_actions: Tensor, step: Tensor, observations: Tensor) -> Tensor:
        """Map `[..., action_dim]`, integers `[...]` and `[..., observation_dim]`, which broadcast, to noise."""
        output: Tensor = self.layers(concatenate(noisy_actions, self.embedding(step), observations))
        return output


class ResidualDenoiser(nn.Module):
    """epsilon(a_t, t, s) by residual blocks: the behavior model of IDQL and SRPO.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        time: Features of the time, which are `time_dim` wide.
        time_dim: Their width.
        hidden_dim: Width of the blocks.
        blocks: Number of blocks.
        activation: Makes the activations.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        time: nn.Module,
        time_dim: int,
        hidden_dim: int = 256,
        blocks: int = 3,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        self.time = time
        self.mix = nn.Linear(action_dim + observation_dim + time_dim, hidden_dim)
        self.blocks = nn.ModuleList(ResidualBlock(hidden_dim, activation) for _ in range(blocks))
        self.head = nn.Sequential(activation(), nn.Linear(hidden_dim, action_dim))

    def forward(self, noisy_actions: Tensor, time: Tensor, observations: Tensor, masks: Tensor | None = None) -> Tensor:
        """Map `[..., action_dim]`, `[...]` and `[..., observation_dim]`, which broadcast, to `[..., action_dim]`.

        Dropout masks are one for each block, `[blocks, ..., hidden_dim]`.
        """
        hidden = self.mix(concatenate(noisy_actions, observations, self.time(time)))
        for i, block in enumerate(self.blocks):
            hidden = block(hidden, None if masks is None else masks[i])
        epsilon: Tensor = self.head(hidden)
        return epsilon


class VelocityField(nn.Module):
    """v(x_t, t, s) of a flow: an MLP on [observation, x_t, t], GELU, Glorot initialization (FQL).

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action, or of a chunk of actions.
        hidden: Widths of the hidden layers.
    """

    def __init__(self, observation_dim: int, action_dim: int, hidden: Sequence[int] = (512, 512, 512, 512)) -> None:
        super().__init__()
        self.layers = mlp((observation_dim + action_dim + 1, *hidden, action_dim), tanh_gelu)
        xavier_uniform_(self.layers)

    def forward(self, x: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        """Map `[..., action_dim]`, `[...]` and `[..., observation_dim]`, which broadcast, to `[..., action_dim]`."""
        velocity: Tensor = self.layers(concatenate(observations, x, time[..., None]))
        return velocity


class NoiseToAction(nn.Module):
    """a = mu(s, z), z ~ N(0, I): the one-step policy of FQL, like `VelocityField` without time. It is not bounded.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action, or of a chunk of actions.
        hidden: Widths of the hidden layers.
    """

    def __init__(self, observation_dim: int, action_dim: int, hidden: Sequence[int] = (512, 512, 512, 512)) -> None:
        super().__init__()
        self.layers = mlp((observation_dim + action_dim, *hidden, action_dim), tanh_gelu)
        xavier_uniform_(self.layers)

    def forward(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Map `[..., observation_dim]` and `[..., action_dim]`, which broadcast, to actions `[..., action_dim]`."""
        actions: Tensor = self.layers(concatenate(observations, noise))
        return actions


# The authors divide actions by 1 + 1e-3, so that atanh is finite for actions on the border of the box.
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

    def sample_with_log_density(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return actions as `sample` does, and their log density with the tanh Jacobian, `[...]` (SAC, Eq. 21)."""
        pre_tanh = self.mean + self.std * noise
        normal = -(0.5 * noise.square() + self.std.log() + 0.5 * math.log(2 * math.pi))
        jacobian = 2 * (math.log(2) - pre_tanh - nn.functional.softplus(-2 * pre_tanh))  # log(1 - tanh^2), stable
        return torch.tanh(pre_tanh), (normal - jacobian).sum(-1)

    def log_density(self, actions: Tensor) -> Tensor:
        """Return log N(atanh(a / 1.001); mean, std) summed over action dimensions, `[batch]`.

        The tanh Jacobian is left out, as in the authors' code: it does not depend on the parameters.
        """
        pre_tanh = torch.atanh(actions / (1 + BORDER))
        standardized = (pre_tanh - self.mean) / self.std
        return -(0.5 * standardized.square() + self.std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)


class TanhGaussianPolicy(nn.Module):
    """One-step policy a = tanh(mean(s) + std(s) z), ReLU, orthogonal initialization in every layer.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        hidden: Widths of the hidden layers.
    """

    LOG_STD_RANGE = (-5.0, 2.0)

    def __init__(self, observation_dim: int, action_dim: int, hidden: Sequence[int] = (256, 256, 256)) -> None:
        super().__init__()
        self.layers = mlp((observation_dim, *hidden, 2 * action_dim), nn.ReLU)
        orthogonal_(self.layers, gain=1.0)

    def forward(self, observations: Tensor) -> TanhGaussian:
        """Return the action distribution at `[batch, observation_dim]`."""
        mean, log_std = self.layers(observations).chunk(2, dim=-1)
        return TanhGaussian(mean, log_std.clamp(*self.LOG_STD_RANGE).exp())


class Gaussian(NamedTuple):
    """A diagonal normal distribution of actions.

    Attributes:
        mean: `[batch, action_dim]`.
        std: `[batch, action_dim]`.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return actions, reparametrised, of the shape of `noise`, `[batch, samples, action_dim]`."""
        return self.mean[:, None] + self.std[:, None] * noise

    def divergence(self, other: Gaussian) -> Tensor:
        """Return KL(self || other), `[batch]` (BDPO, Eq. 22)."""
        ratio = (self.std / other.std).square()
        distance = ((self.mean - other.mean) / other.std).square()
        return (ratio + distance - 1 - ratio.log()).sum(-1) / 2

    def cloning_loss(self, actions: Tensor) -> Tensor:
        """Return the negative log-likelihood of `actions` `[batch, action_dim]`, `[batch]`."""
        distance = ((actions - self.mean) / self.std).square()
        return (distance / 2 + self.std.log() + math.log(2 * math.pi) / 2).sum(-1)


class GaussianPolicy(nn.Module):
    """a ~ N(mean(s), std^2), diagonal.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        hidden: Widths of the hidden layers.
        activation: Makes the activation after each hidden layer.
        tanh_mean: Whether the mean passes through a tanh.
        std: The standard deviation is `of_state`, an output of the network; `free`, one parameter for each dimension of
            the action; or 1, `unit`.
        log_std_range: Bounds of ln std.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (256, 256, 256, 256),
        activation: Callable[[], nn.Module] = Mish,
        *,
        tanh_mean: bool = True,
        std: Literal["of_state", "free", "unit"] = "of_state",
        log_std_range: tuple[float, float] = (-5.0, 2.0),
    ) -> None:
        super().__init__()
        outputs = 2 * action_dim if std == "of_state" else action_dim
        self.layers = mlp((observation_dim, *hidden, outputs), activation)
        self.log_std = nn.Parameter(torch.zeros(action_dim)) if std == "free" else None
        self.std = std
        self.tanh_mean = tanh_mean
        self.log_std_range = log_std_range

    def forward(self, observations: Tensor, masks: Tensor | None = None) -> Gaussian:
        """Return the action distribution at `[batch, observation_dim]`; `masks` as in `apply_with_dropout`."""
        mean = apply_with_dropout(self.layers, observations, masks)
        log_std = torch.zeros_like(mean)
        if self.std == "of_state":
            mean, log_std = mean.chunk(2, dim=-1)
        elif self.log_std is not None:
            log_std = self.log_std.expand_as(mean)
        return Gaussian(torch.tanh(mean) if self.tanh_mean else mean, log_std.clamp(*self.log_std_range).exp())


class Dirac(NamedTuple):
    """A distribution that is a single action, `[batch, action_dim]`."""

    action: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return the action for every sample of `noise`, `[batch, samples, action_dim]`."""
        return self.action[:, None].expand_as(noise)

    def divergence(self, other: Dirac) -> Tensor:
        """Return half the squared distance, `[batch]` (BDPO, Eq. 21)."""
        return (self.action - other.action).square().sum(-1) / 2

    def cloning_loss(self, actions: Tensor) -> Tensor:
        """Return half the squared distance from `actions` `[batch, action_dim]`, `[batch]`."""
        return self.divergence(Dirac(actions))


class DeterministicPolicy(nn.Module):
    """a = tanh(pi(s)).

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        hidden: Widths of the hidden layers.
        activation: Makes the activation after each hidden layer.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (256, 256, 256, 256),
        activation: Callable[[], nn.Module] = Mish,
    ) -> None:
        super().__init__()
        self.layers = mlp((observation_dim, *hidden, action_dim), activation)

    def forward(self, observations: Tensor) -> Dirac:
        """Return the action at `[batch, observation_dim]`."""
        return Dirac(torch.tanh(self.layers(observations)))
