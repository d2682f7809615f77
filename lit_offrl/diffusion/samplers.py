"""Samplers: free functions over a callable `denoise(x, level)` and a tuple of noise levels.

All of them share these arguments:

    denoise: Estimate of x_0 from `x`, `[batch, ..., dim]`, and one of the `levels`; `denoisers.as_denoiser` makes one
        of a model of x and time.
    x: Noise at the first level, `[batch, ..., dim]`.
    levels: Noise levels in the order of the visits, made beforehand by a schedule.
    clip: Bound to which every estimate of x_0 is clamped; None leaves it unbounded.

All coefficients are Python numbers in float64: no step waits for a device, and a compiled sampler is one graph.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lit_offrl.diffusion.denoisers import Denoise, add_scaled
from lit_offrl.diffusion.schedules import Level, Levels, posterior_coefficients


def sample_ddpm(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    noise: Tensor,
    *,
    clip: float | None = None,
    clip_path: float | None = None,
    variance: Literal["forward", "posterior"] = "forward",
) -> Tensor:
    """Sample by ancestral sampling on variance-preserving levels (Ho et al. 2020, Algorithm 2).

    Args:
        denoise: See the module.
        x: See the module.
        levels: See the module.
        noise: Standard normal noise, `[steps, batch, ..., dim]`. A last step to a clean level adds no noise and needs
            none.
        clip: See the module.
        clip_path: Bound to which x is clamped after every step (IDQL); None leaves it unbounded.
        variance: Of the noise of a step: `forward` for beta_n (BDPO, DAC, IDQL), `posterior` for the variance of
            q(x_s | x_t, x_0) (Diffusion-QL, EDP). Ho et al. found both alike.
    """
    for i, (level, below) in enumerate(pairwise(levels)):
        clean, noisy, posterior = posterior_coefficients(level.alpha, level.sigma, below.alpha, below.sigma)
        x = add_scaled(clean * _clamp(denoise(x, level), clip), noisy, x)
        if below.sigma > 0:
            forward = 1 - (level.alpha / below.alpha) ** 2
            x = add_scaled(x, math.sqrt(forward if variance == "forward" else posterior), noise[i])
        x = _clamp(x, clip_path)
    return x


def sample_ddim(
    denoise: Denoise, x: Tensor, levels: Levels, *, clip: float | None = None, path: bool = False
) -> Tensor:
    """Sample by deterministic DDIM on variance-preserving levels (Song, Meng and Ermon 2021, Eq. 12 with sigma = 0).

    It solves the probability-flow ODE to first order: x_s = alpha_s x_0 + sigma_s epsilon, with the epsilon of x_0.

    Args:
        denoise: See the module.
        x: See the module.
        levels: See the module.
        clip: See the module.
        path: Return all states from `x` to the sample, `[steps + 1, batch, ..., dim]`, rather than the sample alone.
    """
    states = [x]
    for level, below in pairwise(levels):
        noisy = below.sigma / level.sigma  # epsilon = (x - alpha_t x_0) / sigma_t
        clean = below.alpha - noisy * level.alpha
        states.append(add_scaled(clean * _clamp(denoise(states[-1], level), clip), noisy, states[-1]))
    return torch.stack(states) if path else states[-1]


def sample_heun(denoise: Denoise, x: Tensor, levels: Levels) -> Tensor:
    """Solve the probability-flow ODE by Heun's method (Karras et al. 2022, Algorithm 1).

    In y = x / alpha the flow is dy/ds = (y - D) / s over the noise s = sigma / alpha, on any schedule. Every step costs
    two evaluations, but a step to a clean level is Euler's and costs one.

    Args:
        denoise: See the module.
        x: See the module.
        levels: See the module.
    """

    def slope(y: Tensor, level: Level) -> Tensor:
        return (y - denoise(level.alpha * y, level)) / (level.sigma / level.alpha)

    y = x / levels[0].alpha
    for level, below in pairwise(levels):
        step = below.sigma / below.alpha - level.sigma / level.alpha
        first = slope(y, level)
        euler = y + step * first
        y = euler if below.sigma == 0 else y + step * (first + slope(euler, below)) / 2
    return levels[-1].alpha * y


def sample_dpm_singlestep(denoise: Denoise, x: Tensor, levels: Levels) -> Tensor:
    """Solve the probability-flow ODE by single-step DPM-Solver++ of order 2 (Lu et al. 2022b, Algorithm 1).

    Every level but the last costs one evaluation. A step of order 2 goes over two levels, and an odd number of
    evaluations leaves a last step of order 1. EDA, QGPO and AEPO: `VPSDE().levels(15)`, seven steps of order 2 and one
    of order 1.

    Args:
        denoise: See the module.
        x: See the module.
        levels: See the module.

    Raises:
        ValueError: If a step of order 2 would end at a clean level, whose lambda is infinite.
    """
    if levels[-1].sigma == 0 and len(levels) % 2 == 1:
        raise ValueError("the step to a clean level must be of order 1: give an odd number of evaluations")
    for i in range(0, len(levels) - 1, 2):
        source, *middle, target = levels[i : i + 3]
        clean = denoise(x, source)
        onward = _first_order_step(x, clean, source, target)
        if middle:
            (level,) = middle
            h = target.half_log_snr - source.half_log_snr
            ratio = (level.half_log_snr - source.half_log_snr) / h
            change = denoise(_first_order_step(x, clean, source, level), level) - clean
            onward = add_scaled(onward, -target.alpha * math.expm1(-h) / 2 / ratio, change)
        x = onward
    return x


def _clamp(clean: Tensor, clip: float | None) -> Tensor:
    return clean if clip is None else clean.clamp(-clip, clip)


def _first_order_step(x: Tensor, clean: Tensor, source: Level, target: Level) -> Tensor:
    """Return the solution at `target` when x_0 stays `clean` all the way: DDIM's step."""
    h = target.half_log_snr - source.half_log_snr
    return add_scaled(target.sigma / source.sigma * x, -target.alpha * math.expm1(-h), clean)
