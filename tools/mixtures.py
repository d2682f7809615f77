"""Gaussian mixtures, whose diffusion is known in closed form: the oracle of every test of a diffusion algorithm.

Under x_t = alpha x_0 + sigma epsilon a mixture stays a mixture, and so do the posterior of x_0 and the target
exp(beta Q(x_0)) q(x_0) for a Q that is at most quadratic on every component. Everything else follows from these three
operations: `diffused`, `posterior` and `tilted`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class ComponentQ:
    """Q(x, k) = constant_k + slope_k . x + sum_j curvature_kj x_j^2 / 2 of a point x of component k.

    Attributes:
        constant: `[components]` or a scalar.
        slope: `[components, dim]`, or anything that broadcasts to it.
        curvature: `[components, dim]`, or anything that broadcasts to it.
    """

    constant: Tensor = field(default_factory=lambda: torch.zeros(()))
    slope: Tensor = field(default_factory=lambda: torch.zeros(()))
    curvature: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __call__(self, x: Tensor) -> Tensor:
        """Return Q for `x` `[..., dim]` as a point of each component, `[..., components]`."""
        x = x[..., None, :]
        return self.constant + (self.slope * x + self.curvature * x.square() / 2).sum(-1)


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of Gaussians with diagonal covariances; leading dimensions are a batch of mixtures.

    Attributes:
        log_weights: Logarithms of the weights, which sum to 1, `[..., components]`.
        means: `[..., components, dim]`.
        variances: `[..., components, dim]`, or `[..., components, 1]` where they are isotropic.
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor

    @classmethod
    def isotropic(cls, means: Tensor, std: float, weights: Tensor | None = None) -> GaussianMixture:
        """Return the mixture of N(means_k, std^2 I), `means` `[components, dim]`, with equal or given weights."""
        weights = torch.ones_like(means[:, 0]) if weights is None else weights
        return cls((weights / weights.sum()).log(), means, torch.full_like(means[:, :1], std**2))

    def log_density(self, x: Tensor) -> Tensor:
        """Return ln q(x), `[...]`, of `x` `[..., dim]`."""
        return self._joint(x).logsumexp(-1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Return the probability that each component made `x`, `[..., components]`."""
        return self._joint(x).softmax(-1)

    def score(self, x: Tensor) -> Tensor:
        """Return grad ln q(x), `[..., dim]`."""
        pull = (self.means - x[..., None, :]) / self.variances
        return (self.responsibilities(x)[..., None] * pull).sum(-2)

    def mean(self) -> Tensor:
        """Return the mean, `[..., dim]`."""
        return (self.log_weights.exp()[..., None] * self.means).sum(-2)

    def covariance(self) -> Tensor:
        """Return the covariance matrix, `[..., dim, dim]`: the variances within components plus that of the means."""
        offset = self.means - self.mean()[..., None, :]
        within = torch.diag_embed(self.variances.expand_as(offset))
        components = within + offset[..., :, None] * offset[..., None, :]
        return (self.log_weights.exp()[..., None, None] * components).sum(-3)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return `count` points of one mixture, `[count, dim]`, and their components, `[count]`."""
        component = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        like = self.means
        noise = torch.randn(count, like.shape[-1], generator=generator, dtype=like.dtype, device=like.device)
        return like[component] + self.variances[component].sqrt() * noise, component

    # ---------------------------------------------------------------- the three closed operations

    def diffused(self, alpha: Tensor | float, sigma: Tensor | float) -> GaussianMixture:
        """Return the distribution of x_t = alpha x_0 + sigma epsilon, for scalars or `[batch]` levels."""
        alpha, sigma = self._scale(alpha), self._scale(sigma)
        return GaussianMixture(self.log_weights, alpha * self.means, alpha**2 * self.variances + sigma**2)

    def posterior(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> GaussianMixture:
        """Return the distribution of x_0 given x_t = `x` `[batch, dim]`, a batch of mixtures."""
        marginal = self.diffused(alpha, sigma)
        alpha, sigma = self._scale(alpha), self._scale(sigma)
        gain = alpha * self.variances / marginal.variances
        return GaussianMixture(
            marginal._joint(x).log_softmax(-1),
            self.means + gain * (x[..., None, :] - marginal.means),
            sigma**2 * self.variances / marginal.variances,
        )

    def tilted(self, q: ComponentQ, beta: float = 1.0) -> tuple[GaussianMixture, Tensor]:
        """Return the mixture proportional to exp(beta Q) q, and ln E[exp(beta Q)], `[...]`.

        Raises:
            ValueError: If the expectation is infinite: beta times a curvature is at least 1 / variance.
        """
        slope, curvature = beta * q.slope, beta * q.curvature
        shrink = 1 - curvature * self.variances
        if (shrink <= 0).any():
            raise ValueError("E[exp(beta Q)] is infinite: beta * curvature must stay below 1 / variance")
        exponent = curvature * self.means**2 / 2 + slope * self.means + self.variances * slope**2 / 2
        gain = beta * q.constant + (exponent / shrink - shrink.log() / 2).sum(-1)
        joint = self.log_weights + gain
        means = (self.means + self.variances * slope) / shrink
        return GaussianMixture(joint.log_softmax(-1), means, self.variances / shrink), joint.logsumexp(-1)

    # ---------------------------------------------------------------- parts

    def _joint(self, x: Tensor) -> Tensor:
        """Return ln of weight times density of each component at `x`, `[..., components]`."""
        distance = (x[..., None, :] - self.means).square() / self.variances
        return self.log_weights - (distance + (2 * math.pi * self.variances).log()).sum(-1) / 2

    def _scale(self, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=self.means.dtype, device=self.means.device)[..., None, None]


def intermediate_energy(
    mixture: GaussianMixture, q: ComponentQ, beta: float, x: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return f(x) = ln E[exp(beta Q(x_0)) | x_t = x], `[batch]`, and its gradient, `[batch, dim]`.

    The diffused target is the diffused mixture times exp(f) / E[exp(beta Q)] (Lu et al. 2023, Theorem 3.1), and both
    are mixtures, so that f and its gradient are differences of log-densities and of scores.
    """
    target, log_normalizer = mixture.tilted(q, beta)
    guided, plain = target.diffused(alpha, sigma), mixture.diffused(alpha, sigma)
    return guided.log_density(x) - plain.log_density(x) + log_normalizer, guided.score(x) - plain.score(x)


def eight_gaussians() -> tuple[GaussianMixture, ComponentQ]:
    """Return the 2-D set "8gaussians" of QGPO, EDA and BDPO, in float64, and its Q = k / 7 of the component k.

    Components go counterclockwise from the top; the authors' scale is 1 / 1.414, not 1 / sqrt(2).
    """
    angle = math.pi * (0.5 + torch.arange(8, dtype=torch.float64) / 4)
    centers = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return (
        GaussianMixture.isotropic(4 * centers / 1.414, 0.5 / 1.414),
        ComponentQ(constant=torch.arange(8, dtype=torch.float64) / 7),
    )


def twenty_five_gaussians() -> GaussianMixture:
    """Return DTQL's 2-D set of 25 Gaussians, in float64: means on the grid {-10, -5, 0, 5, 10}^2, std 0.3."""
    line = torch.arange(-10, 11, 5, dtype=torch.float64)
    return GaussianMixture.isotropic(torch.cartesian_prod(line, line), 0.3)
