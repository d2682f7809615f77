"""Noise schedules: which noise levels are trained on, and which ones a sampler visits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogLogisticNoise:
    """Distribution of training noise levels: ln(sigma) is logistic, truncated to [sigma_min, sigma_max].

    The truncation goes through the distribution function: u is uniform between F(sigma_min) and F(sigma_max), and
    sigma = F^-1(u), in float64 (DTQL's authors' code; the paper does not mention it).

    Attributes:
        location: Median of ln(sigma).
        scale: Scale of the logistic distribution.
        sigma_min: Smallest noise level.
        sigma_max: Largest noise level.
    """

    location: float = math.log(0.5)
    scale: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def quantile(self, u: Tensor) -> Tensor:
        """Return the noise levels, float32, at the quantiles `u` in [0, 1) of the truncated distribution."""
        low, high = (
            1 / (1 + math.exp(-(math.log(sigma) - self.location) / self.scale))
            for sigma in (self.sigma_min, self.sigma_max)
        )
        u = low + (high - low) * u.double()
        return (torch.logit(u) * self.scale + self.location).exp().float()


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Return the `steps` + 1 noise levels from `sigma_max` down to `sigma_min` and 0 (Karras et al. 2022, Eq. 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()
