"""Sampling under guidance, as QGPO (Lu et al., 2023, arXiv 2304.12824) and AEPO (Hu et al., 2025, arXiv 2505.01822) do.

Functions of networks that the algorithms own: a noise network of the behavior policy mu, and the gradient of an energy
f_t that turns the score of mu into the policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.acting import draw_noise
from lit_offrl.algorithms.vp_diffusion import (
    FIGURE_SAMPLES,
    FIGURE_TIMES,
    VPDiffusion,
)
from lit_offrl.diffusion.denoisers import as_denoiser, x0_from_epsilon
from lit_offrl.diffusion.schedules import Level
from lit_offrl.errors import require
from lit_offrl.networks.energy_guidance import EnergyNetwork, NoiseNetwork
from lit_offrl.networks.gradients import full_precision

Rescale = Literal["none", "sample", "batch"]


def rescaled(guided: Tensor, plain: Tensor, scales: Tensor, rescale: Rescale) -> Tensor:
    """Return the guided score with the norm of the plain one (AEPO, Eq. 45); of noise the same, sigma_t cancels.

    Of the two readings that the equation leaves open neither keeps the distribution that guidance aims at, see `AEPO`.

    Args:
        guided: `[batch, dim]`.
        plain: `[batch, dim]`; where the two are equal, and where one is 0, nothing changes.
        scales: Guidance scale omega of each row, `[batch]`.
        rescale: "sample" for the norm of a row, which no other row changes; "batch" for the norm of all rows of the
            same scale together; "none" for `guided` as it is.
    """
    if rescale == "none":
        return guided
    both = torch.stack([plain, guided])
    squares = (both * both).sum(-1)
    if rescale == "batch":
        squares = squares @ (scales[:, None] == scales).to(squares)
    plain_square, guided_square = squares
    precision = torch.finfo(guided.dtype)
    least = (precision.eps**2 * plain_square).clamp(min=precision.tiny)  # finite factors, and 1 where the two are equal
    factor: Tensor = (plain_square / torch.maximum(guided_square, least)).sqrt()
    return factor[:, None] * guided


def guided_epsilon(epsilon: Tensor, gradient: Tensor, sigma: float, scales: Tensor, rescale: Rescale) -> Tensor:
    """Return the noise epsilon - omega sigma_t grad f_t, whose score is grad log mu_t + omega grad f_t (AEPO, Eq. 13).

    Args:
        epsilon: Noise that the behavior model predicts, `[batch, dim]`.
        gradient: grad f_t, `[batch, dim]`.
        sigma: sigma_t.
        scales: omega, `[batch]`.
        rescale: See `rescaled`.
    """
    guided = torch.addcmul(epsilon, scales[:, None], gradient, value=-sigma)
    return rescaled(guided, epsilon, scales, rescale)


def check_width(hidden_dim: int) -> None:
    """Raise `UserError` unless the behavior model can be `hidden_dim` wide: its blocks halve the width twice."""
    require(hidden_dim % 4 == 0, "model.init_args.diffusion.hidden_dim", "a multiple of 4", hidden_dim)


# ---------------------------------------------------------------- sampling


@torch.no_grad()
def sample_guided(
    process: VPDiffusion,
    behavior: NoiseNetwork,
    guidance: Callable[[Tensor, Tensor, Tensor], Tensor],
    observations: Tensor,
    noise: Tensor,
    scales: Sequence[float],
    rescale: Rescale = "none",
) -> Tensor:
    """Return actions of the policies mu exp(omega f), `[batch, action_dim]`, each row with an omega of its own.

    With an omega of 0 a row is a sample of the behavior model, exactly; where all are 0, f is not evaluated.

    Args:
        process: The diffusion process and its solver.
        behavior: The behavior model.
        guidance: Returns grad f_t, `[batch, action_dim]`, of a_t, t and observations.
        observations: `[batch, observation_dim]`.
        noise: a_t at t = 1, `[batch, action_dim]`.
        scales: omega of each row, or one for all.
        rescale: See `rescaled`.
    """
    with full_precision(noise):
        if not any(scales):
            return process.solve(as_denoiser(lambda x, time: behavior(x, time, observations)), noise)
        omega = noise.new_tensor(scales).expand(noise.shape[0])

        def denoise(noisy_actions: Tensor, level: Level) -> Tensor:
            time = level.times(noisy_actions)
            epsilon = behavior(noisy_actions, time, observations)
            gradient = guidance(noisy_actions, time, observations)
            guided = guided_epsilon(epsilon, gradient, level.sigma, omega, rescale)
            return x0_from_epsilon(noisy_actions, guided, level.alpha, level.sigma)

        return process.solve(denoise, noise)


@torch.no_grad()
def sample_behavior(
    process: VPDiffusion,
    behavior: NoiseNetwork,
    observations: Tensor,
    count: int,
    action_dim: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Return `count` actions of the behavior model at each of `[batch, observation_dim]`."""
    noise = draw_noise(observations, count, action_dim, generator=generator)
    with full_precision(noise):
        return process.solve(as_denoiser(lambda x, time: behavior(x, time, observations[:, None])), noise)


def draw_for_actors(
    observations: Tensor, action_dim: int, actors: Sequence[str], generators: Mapping[str, torch.Generator | None]
) -> Tensor:
    """Return standard normal noise `[batch, action_dim]`, each row from the stream of the actor named for it."""
    noise = observations.new_empty(len(observations), action_dim)
    for name in dict.fromkeys(actors):
        rows = [i for i, each in enumerate(actors) if each == name]
        shape, stream = (len(rows), action_dim), generators[name]
        noise[rows] = torch.randn(shape, generator=stream, device=noise.device, dtype=noise.dtype)
    return noise


# ---------------------------------------------------------------- pictures of 2-D bandits


def energy_maps(
    process: VPDiffusion,
    behavior: NoiseNetwork,
    energy: EnergyNetwork | nn.Module,
    observations: Tensor,
    actions: Tensor,
) -> dict[str, Tensor]:
    """Return f at times of the diffusion, by title, where noisy samples of the behavior model lie."""
    generator = torch.Generator(actions.device).manual_seed(0)
    dim = actions.shape[-1]
    samples = sample_behavior(process, behavior, observations[:1], FIGURE_SAMPLES, dim, generator)[0]
    noise = torch.randn(samples.shape, generator=generator, device=actions.device)
    maps = {}
    for t in FIGURE_TIMES:
        f = energy(actions, torch.full_like(actions[:, 0], t), observations)
        maps[rf"$f$, t = {t:g}"] = f.where(process.near_samples(actions, samples, noise, t), torch.nan)
    return maps
