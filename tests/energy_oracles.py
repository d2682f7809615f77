"""Exact stand-ins for the networks of energy-guided policies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mixtures import ComponentQ, GaussianMixture
from torch import Tensor, nn

from lit_offrl.diffusion.schedules import VPSDE

SDE = VPSDE()


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scales(time: float) -> tuple[float, float]:
    return SDE.alpha(tensor(time)).item(), SDE.sigma(tensor(time)).item()


class ExactNoise(nn.Module):
    """The noise prediction of a diffused mixture in the place of a trained network."""

    def __init__(self, mixture: GaussianMixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, actions: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        time = time.expand(actions.shape[:-1]).to(self.mixture.means).flatten()
        sigma = SDE.sigma(time)
        score = self.mixture.diffused(SDE.alpha(time), sigma).score(actions.to(self.mixture.means).flatten(0, -2))
        return (-sigma[:, None] * score).to(actions).view(actions.shape)


class ExactQ(nn.Module):
    """Q of the action alone, twice."""

    def __init__(self, q: ComponentQ) -> None:
        super().__init__()
        self.q = q

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        value = self.q(actions)[..., 0]
        return value.expand(2, *value.shape)


class GivenGradient(nn.Module):
    """An energy of which the gradient alone is known."""

    def __init__(self, function: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.function = function

    def gradient(self, actions: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        return self.function(actions, time[0].item())
