"""Denoisers: from a raw network to an estimate of the clean action.

The conversions hold for x = alpha x_0 + sigma epsilon; `alpha` and `sigma` are floats or broadcast against `x`, as
`[batch, 1]` does against `[batch, dim]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_offrl.diffusion.schedules import Level

Model = Callable[[Tensor, Tensor], Tensor]  # a network's prediction from x `[batch, ..., dim]` and time `[1]`
AtLevel = Callable[[Tensor, Level], Tensor]  # a network's prediction from x and a noise level
Denoise = AtLevel  # the prediction of x_0
Prediction = Literal["x0", "epsilon", "score"]


def add_scaled(x: Tensor, factor: Tensor | float, y: Tensor) -> Tensor:
    """Return x + factor y in one kernel: sampling for a single state spends most of its time in calling kernels."""
    return torch.addcmul(x, y, factor) if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def diffuse(x0: Tensor, epsilon: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Return x = alpha x_0 + sigma epsilon."""
    return add_scaled(alpha * x0, sigma, epsilon)


def x0_from_epsilon(x: Tensor, epsilon: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Return x_0 = (x - sigma epsilon) / alpha."""
    return add_scaled(x, -sigma, epsilon) / alpha


def epsilon_from_score(score: Tensor, sigma: Tensor | float) -> Tensor:
    """Return epsilon = -sigma grad log q(x)."""
    return -sigma * score


def x0_from_score(x: Tensor, score: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Return x_0 = (x + sigma^2 grad log q(x)) / alpha, Tweedie's formula."""
    return add_scaled(x, sigma**2, score) / alpha


def as_denoiser(model: Model, predicts: Prediction = "epsilon") -> Denoise:
    """Return the denoiser, as samplers need it, of a `model` that predicts epsilon, the score or x_0."""

    def denoise(x: Tensor, level: Level) -> Tensor:
        output = model(x, level.times(x))
        if predicts == "x0":
            return output
        convert = x0_from_epsilon if predicts == "epsilon" else x0_from_score
        return convert(x, output, level.alpha, level.sigma)

    return denoise


class EDMCoefficients(NamedTuple):
    """c_skip, c_out, c_in and c_noise at some noise levels, each of the shape of sigma."""

    skip: Tensor
    out: Tensor
    scale_in: Tensor
    noise: Tensor


class EDMDenoiser(nn.Module):
    """D(x; sigma, s) = c_skip x + c_out F(c_in x, c_noise, s) (Karras et al. 2022, Table 1; DTQL Appendix B).

    Args:
        network: F, called as `network(c_in * x, c_noise, condition)`.
        sigma_data: Standard deviation that the clean data is assumed to have.
        clip: Bound of the denoised value, applied in the losses too; None leaves it unbounded.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5, clip: float | None = 1.0) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data
        self.clip = clip

    def coefficients(self, sigma: Tensor) -> EDMCoefficients:
        """Return the preconditioning at `sigma`. The paper prints c_in without its square root: a misprint."""
        variance = sigma.square() + self.sigma_data**2
        scale_in = variance.rsqrt()
        return EDMCoefficients(
            skip=self.sigma_data**2 / variance,
            out=sigma * self.sigma_data * scale_in,
            scale_in=scale_in,
            noise=sigma.log() / 4,
        )

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """Return the denoised value of `x`, `[batch, dim]`, at noise level `sigma`, `[batch]` or `[1]`."""
        return self._denoised(x, self.coefficients(sigma[:, None]), condition)

    def _denoised(self, x: Tensor, c: EDMCoefficients, condition: Tensor) -> Tensor:
        raw = self.network(c.scale_in * x, c.noise.squeeze(1), condition)
        denoised = add_scaled(c.skip * x, c.out, raw)
        return denoised if self.clip is None else denoised.clamp(-self.clip, self.clip)

    def loss(self, x: Tensor, sigma: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        """Return the denoising loss mean over batch and dimensions of ((D(x + sigma noise) - x) / c_out)^2.

        DTQL Eq. 2 with w(sigma) = 1 / c_out^2. It is a mean over dimensions, not the squared norm of the paper: the
        paper's alpha values belong to the mean. Nothing is detached: as a function of `x` it is the
        trust-region loss of Eq. 4.
        """
        return self.errors(x, sigma, noise, condition).mean()

    def errors(self, x: Tensor, sigma: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        """Return the squared errors of which `loss` is the mean, `[batch, dim]`."""
        sigma = sigma[:, None]
        c = self.coefficients(sigma)
        error: Tensor = (self._denoised(add_scaled(x, sigma, noise), c, condition) - x) / c.out
        return error.square()
