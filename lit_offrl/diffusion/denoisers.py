"""Denoisers: from a raw network to an estimate of the clean action."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


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
        return EDMCoefficients(
            skip=self.sigma_data**2 / variance,
            out=sigma * self.sigma_data * variance.rsqrt(),
            scale_in=variance.rsqrt(),
            noise=sigma.log() / 4,
        )

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """Return the denoised value of `x`, `[batch, dim]`, at noise level `sigma`, `[batch]`."""
        c = self.coefficients(sigma)
        raw = self.network(c.scale_in[:, None] * x, c.noise, condition)
        denoised: Tensor = c.skip[:, None] * x + c.out[:, None] * raw
        return denoised if self.clip is None else denoised.clamp(-self.clip, self.clip)

    def loss(self, x: Tensor, sigma: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        """Return the denoising loss mean over batch and dimensions of ((D(x + sigma noise) - x) / c_out)^2.

        DTQL Eq. 2 with w(sigma) = 1 / c_out^2. It is a mean over dimensions, not the squared norm of the paper: the
        paper's alpha values belong to the mean. Nothing is detached, so that as a function of `x` it is the
        trust-region loss of Eq. 4.
        """
        denoised = self(x + sigma[:, None] * noise, sigma, condition)
        error: Tensor = (denoised - x) / self.coefficients(sigma).out[:, None]
        return error.square().mean()
