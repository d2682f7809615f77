"""Compare the guidance of AEPO, DPS, MSE regression and contrastive energy prediction (CEP) with the exact guidance.

    python tools/guidance_error.py [--samples 4096] [--steps 2000] [--seed 0]

The behavior policy is a mixture of two Gaussians in the plane, and Q is linear or quadratic. All guidance except CEP's
is computed in closed form with the exact noise prediction, so that the table shows errors of the equations and not of
networks. AEPO's energy is the expectation E[y_t | a_t] to which its regression converges; its variances are estimated
from samples and clamped as in training. CEP's energy is a small network, trained for `--steps` gradient steps per row
(0 leaves it out; all other rows take seconds).

Each entry is mean |g - g*| / mean |g*| over noisy actions, where g* is the gradient of log E[exp(beta Q(a_0)) | a_t].
The rows "exact" show mean |g*|. It is small at t = 1, and at early times where the energy is flat within modes; there
the relative error of a network is large but has little effect.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lit_offrl.algorithms.aepo import energy_terms, posterior_variance
from lit_offrl.algorithms.qgpo import contrastive_loss
from lit_offrl.diffusion.denoisers import diffuse, epsilon_from_score
from lit_offrl.diffusion.mixtures import ComponentQ, GaussianMixture, intermediate_energy
from lit_offrl.diffusion.schedules import VPSDE
from lit_offrl.networks.energy_guidance import EnergyNetwork

TIMES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BETAS = (0.1, 1.0, 3.0)
SCHEDULE = VPSDE()
BEHAVIOR = GaussianMixture.isotropic(torch.tensor([[-0.5, 0.0], [0.5, 0.0]], dtype=torch.float64), 0.1)
SLOPE = torch.tensor([1.0, 0.5], dtype=torch.float64)
QS = {
    "linear": ComponentQ(slope=SLOPE),
    "quadratic": ComponentQ(slope=SLOPE, curvature=torch.tensor([-1.0, -2.0], dtype=torch.float64)),
}


def alpha_and_sigma(time: float) -> tuple[float, float]:
    """Return alpha_t and sigma_t."""
    t = torch.tensor(time, dtype=torch.float64)
    return SCHEDULE.alpha(t).item(), SCHEDULE.sigma(t).item()


def gradient(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Return the gradient of a function `[batch, dim] -> [batch]` at points, `[batch, dim]`."""
    points = points.detach().requires_grad_()
    return torch.autograd.grad(function(points).sum(), points)[0]


def exact_gradient(q: ComponentQ, beta: float, points: Tensor, time: float) -> Tensor:
    """Return the gradient of log E[exp(beta Q(a_0)) | a_t]."""
    return intermediate_energy(BEHAVIOR, q, beta, points, *alpha_and_sigma(time))[1]


def mse_gradient(q: ComponentQ, beta: float, points: Tensor, time: float) -> Tensor:
    """Return the gradient of beta E[Q(a_0) | a_t], which a regression on Q of the clean action learns (MSE)."""

    def value(x: Tensor) -> Tensor:
        posterior = BEHAVIOR.posterior(x, *alpha_and_sigma(time))
        return beta * (q(posterior.mean())[..., 0] + (q.curvature * _variances(posterior)).sum(-1) / 2)

    return gradient(value, points)


def dps_gradient(q: ComponentQ, beta: float, points: Tensor, time: float) -> Tensor:
    """Return the gradient of beta Q(E[a_0 | a_t]) (DPS)."""
    return gradient(lambda x: beta * q(BEHAVIOR.posterior(x, *alpha_and_sigma(time)).mean())[..., 0], points)


def aepo_energy(q: ComponentQ, beta: float, points: Tensor, time: float, variance: Tensor) -> Tensor:
    """Return E[y_t | a_t], `[batch]`, where y_t is the expansion at the data action (AEPO, Eq. 25)."""
    posterior = BEHAVIOR.posterior(points, *alpha_and_sigma(time))
    mean, spread = posterior.mean(), _variances(posterior)
    slope = q.slope + q.curvature * mean
    # y_t at the posterior's mean, plus the mean contribution of the data action's distance from that mean
    value, _, last = energy_terms(beta, q(mean)[..., 0], slope, mean, mean, variance)
    shift = -beta * q.curvature / 2 + beta**2 * variance * q.curvature.square() / 2
    return value + last + (shift * spread).sum(-1)


def aepo_gradient(q: ComponentQ, beta: float, points: Tensor, time: float, variance: Tensor) -> Tensor:
    """Return the gradient of E[y_t | a_t] (AEPO)."""
    return gradient(lambda x: aepo_energy(q, beta, x, time, variance), points)


def train_energy(q: ComponentQ, beta: float, steps: int, generator: torch.Generator) -> EnergyNetwork:
    """Return an energy trained by CEP (QGPO); a gradient step has 32 times with 16 behavior actions each."""
    network = EnergyNetwork(2, 0, hidden_dim=64, layers=3)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        actions = BEHAVIOR.sample(32 * 16, generator)[0].float().view(32, 16, 2)
        time = 1e-3 + (1 - 1e-3) * (torch.arange(32)[:, None] + torch.rand(32, 1, generator=generator)) / 32
        noise = torch.randn(actions.shape, generator=generator)
        noisy = diffuse(actions, noise, SCHEDULE.alpha(time)[..., None], SCHEDULE.sigma(time)[..., None])
        loss = contrastive_loss(network(noisy, time, noisy), beta * q(actions)[..., 0].float())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network


def relative_errors(name: str, beta: float, samples: int, steps: int, seed: int) -> dict[str, list[float]]:
    """Return the relative errors at `TIMES` by the name of the guidance."""
    q = QS[name]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = train_energy(q, beta, steps, generator) if steps else None
    table: dict[str, list[float]] = {}
    for time in TIMES:
        alpha, sigma = alpha_and_sigma(time)
        actions = BEHAVIOR.sample(samples, generator)[0]
        noise = torch.randn(actions.shape, generator=generator, dtype=actions.dtype)
        points = diffuse(actions, noise, alpha, sigma)
        epsilon = epsilon_from_score(BEHAVIOR.diffused(alpha, sigma).score(points), sigma)
        guidance = {"DPS": dps_gradient(q, beta, points, time), "MSE": mse_gradient(q, beta, points, time)}
        for posterior in (1, 2, 3):
            variance = posterior_variance(posterior, actions, noise, epsilon, alpha, sigma)
            guidance[f"AEPO, posterior {posterior}"] = aepo_gradient(q, beta, points, time, variance)
        if network is not None:
            times = torch.full((samples,), time)
            with torch.no_grad():
                guidance["CEP, learned"] = network.gradient(points.float())(points.float(), times).double()
        truth = exact_gradient(q, beta, points, time)
        mean_length = torch.linalg.vector_norm(truth, dim=-1).mean()
        table.setdefault("exact, its mean length", []).append(mean_length.item())
        for way, estimate in guidance.items():
            error = torch.linalg.vector_norm(estimate - truth, dim=-1).mean() / mean_length
            table.setdefault(way, []).append(error.item())
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4096, help="number of noisy actions at each time")
    parser.add_argument("--steps", type=int, default=2000, help="number of gradient steps of each learned energy")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| Q | beta | guidance |" + "".join(f" t = {time:g} |" for time in TIMES))
    print("|---|---|---|" + "---|" * len(TIMES))
    for name in QS:
        for beta in BETAS:
            for way, row in relative_errors(name, beta, options.samples, options.steps, options.seed).items():
                print(f"| {name} | {beta:g} | {way} |" + "".join(f" {error:.2g} |" for error in row), flush=True)


def _variances(posterior: GaussianMixture) -> Tensor:
    return posterior.covariance().diagonal(dim1=-2, dim2=-1)


if __name__ == "__main__":
    main()
