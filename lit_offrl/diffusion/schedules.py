"""Noise schedules: which noise levels are trained on, and which ones a sampler visits.

A schedule says how much signal and noise a noisy value holds: x_t = alpha(t) x_0 + sigma(t) epsilon. Samplers know a
schedule as a tuple of `Level`s only, so that any sampler works with any schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Scalar = TypeVar("Scalar", float, Tensor)


class Level(NamedTuple):
    """One noise level that a sampler visits; Python numbers, so that no step waits for a device.

    Attributes:
        time: Input of the model: t of a VP-SDE, the integer n of a discrete schedule, sigma of EDM.
        alpha: Scale of the clean value.
        sigma: Standard deviation of the noise; 0 at a clean last level.
        half_log_snr: lambda = ln(alpha / sigma); infinite at a clean last level.
    """

    time: float
    alpha: float
    sigma: float
    half_log_snr: float

    def times(self, like: Tensor) -> Tensor:
        """Return `time`, `[1]`, of the dtype of `like`; int64 if it is an index into the tables of a schedule."""
        dtype = torch.long if isinstance(self.time, int) else like.dtype
        return torch.full((1,), self.time, dtype=dtype, device=like.device)


Levels = tuple[Level, ...]


def posterior_coefficients(
    alpha: Scalar, sigma: Scalar, alpha_below: Scalar, sigma_below: Scalar
) -> tuple[Scalar, Scalar, Scalar]:
    """Return c_clean, c_noisy and the variance of q(x_s | x_t, x_0) = N(c_clean x_0 + c_noisy x_t, variance).

    For a variance-preserving schedule and a level s below t (Ho et al. 2020, Eq. 7, with beta = 1 - alpha_t^2 /
    alpha_s^2). At s = 0 they are 1, 0 and 0.
    """
    decay = alpha / alpha_below
    beta = 1 - decay**2
    return alpha_below * beta / sigma**2, decay * sigma_below**2 / sigma**2, beta * sigma_below**2 / sigma**2


@dataclass(frozen=True)
class VPSDE:
    """The variance-preserving SDE dx = f(t) x dt + g(t) dw with linear beta(t) (Song et al. 2021, Eq. 32 and 33).

        alpha(t) = exp(-(beta_max - beta_min) t^2 / 4 - beta_min t / 2),    sigma(t)^2 = 1 - alpha(t)^2

    Times are tensors of any shape in [0, 1]; every function keeps shape, dtype and device. `expm1` keeps sigma exact
    near t = 0, where 1 - alpha^2 cancels: in float32 it loses 5% of sigma^2 at t = 1e-5.

    Attributes:
        beta_min: Rate of noise at t = 0.
        beta_max: Rate of noise at t = 1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_alpha(self, time: Tensor) -> Tensor:
        """Return ln alpha(t)."""
        return -time * ((self.beta_max - self.beta_min) * time / 4 + self.beta_min / 2)

    def alpha(self, time: Tensor) -> Tensor:
        """Return the scale of the clean value."""
        return self.log_alpha(time).exp()

    def sigma(self, time: Tensor) -> Tensor:
        """Return the standard deviation of the noise."""
        return (-torch.expm1(2 * self.log_alpha(time))).sqrt()

    def levels(self, steps: int, *, start: float = 1.0, end: float = 1e-3) -> Levels:
        """Return `steps` + 1 levels from t = `start` to `end` > 0, uniform in t and computed in float64 (EDA, QGPO)."""
        first, last = torch.tensor([start, end], dtype=torch.float64)
        times = torch.lerp(first, last, torch.arange(steps + 1, dtype=torch.float64) / steps)
        return _variance_preserving_levels(times.tolist(), self.log_alpha(times).tolist())


class DiscreteVP(nn.Module):
    """A variance-preserving chain of `steps` steps, indexed by n in 0..steps.

        vp:      beta_n = 1 - exp(-beta_min / N - (beta_max - beta_min) (2 n - 1) / (2 N^2))       (BDPO, Diffusion-QL)
        linear:  beta_n from 1000 / N * 1e-4 to 1000 / N * 2e-2, evenly spaced, at most 0.999              (DDPM, EDP)

        alpha_bar_n = prod_{i <= n} (1 - beta_i)

    The tables are float32, computed in float64, and move with the module; they are not part of a checkpoint. Index 0
    is the clean value: beta_0 = 0 and alpha_bar_0 = 1. `alpha(n)` is sqrt(alpha_bar_n), so that x_n = alpha(n) x_0 +
    sigma(n) epsilon as in every schedule; the papers' alpha_n is 1 - beta_n.

    Args:
        steps: Length N of the chain.
        beta_min: Rate of noise at the beginning.
        beta_max: Rate of noise at the end.
        kind: `vp`, or `linear`, which has no rates.

    Attributes:
        betas: beta_n, the variance of a forward step and of DDPM's backward step, `[steps + 1]`.
    """

    betas: Tensor
    alphas: Tensor
    sigmas: Tensor
    posterior_clean: Tensor
    posterior_noisy: Tensor

    def __init__(
        self,
        steps: int = 5,
        beta_min: float = 0.1,
        beta_max: float = 10.0,
        kind: Literal["vp", "linear"] = "vp",
    ) -> None:
        super().__init__()
        self.steps = steps
        n = torch.arange(steps + 1, dtype=torch.float64)
        if kind == "vp":
            # the sum over i = 1..n of the exponent of 1 - beta_i, where the sum of 2 i - 1 is n^2
            log_alpha_bar = -beta_min * n / steps - (beta_max - beta_min) * n**2 / (2 * steps**2)
        else:
            betas = (torch.linspace(1e-4, 2e-2, steps, dtype=torch.float64) * 1000 / steps).clamp_max(0.999)
            log_alpha_bar = torch.cat([n[:1], torch.log1p(-betas).cumsum(0)])
        self._log_alphas = (log_alpha_bar / 2).tolist()
        alphas, sigmas = (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()
        clean, noisy, _ = posterior_coefficients(alphas[1:], sigmas[1:], alphas[:-1], sigmas[:-1])
        none, whole = torch.zeros(1), torch.ones(1)  # entry n = 0 of the tables keeps the clean value
        tables = {
            "betas": torch.cat([none, -torch.expm1(log_alpha_bar.diff())]),
            "alphas": alphas,
            "sigmas": sigmas,
            "posterior_clean": torch.cat([none, clean]),
            "posterior_noisy": torch.cat([whole, noisy]),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def alpha(self, time: Tensor) -> Tensor:
        """Return sqrt(alpha_bar_n), the scale of the clean value, at the integers `time`."""
        return self.alphas[time]

    def sigma(self, time: Tensor) -> Tensor:
        """Return sqrt(1 - alpha_bar_n), the standard deviation of the noise, at the integers `time`."""
        return self.sigmas[time]

    def posterior_mean(self, x0: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Return the mean of q(x_{n-1} | x_n, x_0), `[batch, dim]`, at the integers n of `time`, `[batch]`."""
        return self.posterior_clean[time][:, None] * x0 + self.posterior_noisy[time][:, None] * x

    def levels(self) -> Levels:
        """Return all levels from n = N down to the clean n = 0."""
        return _variance_preserving_levels(range(self.steps, -1, -1), self._log_alphas[::-1])


def edm_levels(sigmas: Tensor) -> Levels:
    """Return the levels of an EDM sampler, alpha = 1 and time = sigma, for decreasing `sigmas` `[steps + 1]`."""
    return tuple(Level(s, 1.0, s, -math.log(s) if s else math.inf) for s in sigmas.tolist())


def _variance_preserving_levels(times: Iterable[float], log_alphas: Iterable[float]) -> Levels:
    levels = []
    for time, log_alpha in zip(times, log_alphas, strict=True):
        sigma = math.sqrt(-math.expm1(2 * log_alpha))
        half_log_snr = log_alpha - math.log(sigma) if sigma else math.inf
        levels.append(Level(time, math.exp(log_alpha), sigma, half_log_snr))
    return tuple(levels)


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
