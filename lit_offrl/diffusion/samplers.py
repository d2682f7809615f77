"""Samplers: free functions over a callable `denoise(x, level)` and a tuple of noise levels.

All share one signature, `sample(denoise, x, levels, ..., clip, path)`:

    denoise: Estimate of x_0 from `x` `[batch, dim]` and one of the `levels`; `denoisers.as_denoiser` makes one of a
        model of x and time.
    x: Noise at the first level, `[batch, dim]`.
    levels: Noise levels in the order of the visits, made beforehand by a schedule.
    clip: Bound to which every estimate of x_0 is clamped; the samplers then behave as if the model had returned the
        clamped value. None leaves it unbounded.
    path: Return all states from `x` to the sample, `[steps + 1, batch, dim]`, rather than the sample alone.

All coefficients are Python numbers in float64: no step waits for a device, and a compiled sampler is one graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Literal, cast

import torch
from torch import Tensor

from lit_offrl.diffusion.denoisers import Denoise, Model, add_scaled, as_denoiser
from lit_offrl.diffusion.schedules import Level, Levels, edm_levels, posterior_coefficients, singlestep_orders

Noise = torch.Generator | Tensor  # a generator, or the draws themselves: standard normal, `[steps, batch, dim]`


def sample_ddpm(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    noise: Noise,
    *,
    variance: Literal["beta", "posterior"] = "beta",
    clip: float | None = None,
    path: bool = False,
) -> Tensor:
    """Sample by ancestral sampling on variance-preserving levels (Ho et al. 2020, Algorithm 2).

    Args:
        denoise: See the module.
        x: See the module.
        levels: See the module.
        noise: Generator on the device of `x`, or the draws `[steps, batch, dim]`.
        variance: "beta" for beta_n in every step (BDPO), "posterior" for the variance of q(x_{n-1} | x_n, x_0).
            The step to a clean level adds no noise in either case.
        clip: See the module.
        path: See the module.
    """
    kernels = []
    for level, below in pairwise(levels):
        clean, noisy, spread = posterior_coefficients(level.alpha, level.sigma, below.alpha, below.sigma)
        if variance == "beta" and below.sigma > 0:
            spread = 1 - (level.alpha / below.alpha) ** 2
        kernels.append((clean, noisy, math.sqrt(spread)))
    return _sample_chain(denoise, x, levels, kernels, noise, clip, path)


def sample_ddim(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    noise: Noise | None = None,
    *,
    eta: float = 0.0,
    clip: float | None = None,
    path: bool = False,
) -> Tensor:
    """Sample by DDIM on variance-preserving levels (Song, Meng and Ermon 2021, Eqs. 12 and 16).

    x_s = alpha_s x_0 + sqrt(sigma_s^2 - v) epsilon + sqrt(v) z with v = eta^2 times the posterior variance: eta = 0
    solves the probability-flow ODE to first order, eta = 1 is DDPM with the posterior variance. epsilon is that of the
    clamped x_0.

    Args:
        denoise: See the module.
        x: See the module.
        levels: See the module.
        noise: Generator on the device of `x`, or the draws `[steps, batch, dim]`; needed unless `eta` is 0.
        eta: Amount of noise, from 0 to 1.
        clip: See the module.
        path: See the module.

    Raises:
        ValueError: If `eta` is not 0 and there is no `noise`.
    """
    kernels = []
    for level, below in pairwise(levels):
        *_, variance = posterior_coefficients(level.alpha, level.sigma, below.alpha, below.sigma)
        spread = eta**2 * variance
        noisy = math.sqrt(below.sigma**2 - spread) / level.sigma  # epsilon = (x - alpha_t x_0) / sigma_t
        kernels.append((below.alpha - noisy * level.alpha, noisy, math.sqrt(spread)))
    return _sample_chain(denoise, x, levels, kernels, noise, clip, path)


def sample_heun(
    denoise: Denoise | Model, x: Tensor, levels: Levels | Tensor, *, clip: float | None = None, path: bool = False
) -> Tensor:
    """Solve the probability-flow ODE by Heun's method (Karras et al. 2022, Algorithm 1).

    In y = x / alpha the flow is dy/ds = (y - D) / s over the noise s = sigma / alpha, on any schedule. Every step costs
    two evaluations, but a step to a clean level is Euler's and costs one.

    Args:
        denoise: See the module; with EDM's noise levels EDM's denoiser, of `x` and sigma `[batch]`.
        x: See the module.
        levels: See the module; or EDM's decreasing noise levels, a tensor `[steps + 1]` on the CPU.
        clip: See the module.
        path: See the module.
    """
    if isinstance(levels, Tensor):
        denoise, levels = as_denoiser(cast(Model, denoise), "x0"), edm_levels(levels)
    evaluate = _evaluator(cast(Denoise, denoise), clip)

    def slope(y: Tensor, level: Level) -> Tensor:
        return (y - evaluate(level.alpha * y, level)) / (level.sigma / level.alpha)

    y = x / levels[0].alpha
    states = [x]
    for level, below in pairwise(levels):
        step = below.sigma / below.alpha - level.sigma / level.alpha
        first = slope(y, level)
        euler = y + step * first
        y = euler if below.sigma == 0 else y + step * (first + slope(euler, below)) / 2
        states = [*states, below.alpha * y] if path else [below.alpha * y]
    return torch.stack(states) if path else states[-1]


def sample_dpm_singlestep(
    denoise: Denoise, x: Tensor, levels: Levels, *, order: int = 2, clip: float | None = None, path: bool = False
) -> Tensor:
    """Solve the probability-flow ODE by single-step DPM-Solver++ (Lu et al. 2022b, Algorithm 1, and its third order).

    Every level but the last costs one evaluation; `singlestep_orders` groups them into steps. A step of order 2 passes
    through the level between its ends, one of order 3 through two, wherever the levels put them. EDA, QGPO and AEPO:
    order 2 on `VPSDE().levels(15)`, seven steps of order 2 and a last one of order 1.

    Args:
        denoise: See the module.
        x: See the module.
        levels: See the module; `evaluations + 1` of them.
        order: 1, 2 or 3.
        clip: See the module.
        path: See the module; the states at the ends of steps, without the levels inside them.

    Raises:
        ValueError: If `order` is not 1, 2 or 3, or the step to a clean level is not of order 1.
    """
    orders = singlestep_orders(len(levels) - 1, order)
    _require_first_order_to_clean(levels, orders[-1])
    evaluate = _evaluator(denoise, clip)
    states = [x]
    for begin, end in pairwise(accumulate(orders, initial=0)):
        source, *inner, target = levels[begin : end + 1]
        h = target.half_log_snr - source.half_log_snr
        ratios = [(level.half_log_snr - source.half_log_snr) / h for level in inner]
        clean = evaluate(x, source)
        onward = _first_order_step(x, clean, source, target)
        if len(inner) == 1:
            middle = evaluate(_first_order_step(x, clean, source, inner[0]), inner[0])
            onward = add_scaled(onward, -target.alpha * _phi1(h) / 2 / ratios[0], middle - clean)
        elif len(inner) == 2:
            early, late = inner
            first = evaluate(_first_order_step(x, clean, source, early), early)
            correction = late.alpha * _phi2(ratios[1] * h) * ratios[1] / ratios[0]
            second = evaluate(add_scaled(_first_order_step(x, clean, source, late), correction, first - clean), late)
            onward = add_scaled(onward, target.alpha * _phi2(h) / ratios[1], second - clean)
        x = onward
        states = [*states, x] if path else [x]
    return torch.stack(states) if path else x


def sample_dpm_multistep(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    *,
    order: int = 2,
    lower_order_final: bool = True,
    clip: float | None = None,
    path: bool = False,
) -> Tensor:
    """Solve the probability-flow ODE by multistep DPM-Solver++ (Lu et al. 2022b, Algorithm 2, and its third order).

    Every step costs one evaluation and reuses up to `order` - 1 earlier ones; the first steps have lower orders. Orders
    1 and 2 are those of the published code. Its third order, and every copy of it, takes only half of the second
    derivative and so converges with order 2; here it is whole.

    Args:
        denoise: See the module.
        x: See the module.
        levels: See the module.
        order: 1, 2 or 3.
        lower_order_final: Lower the order of the last steps too, down to 1, at any number of steps (published codes
            do so always, or below 10 or 15 steps). It steadies the last step of time-uniform levels, long in lambda.
        clip: See the module.
        path: See the module.

    Raises:
        ValueError: If `order` is not 1, 2 or 3, or the step to a clean level is not of order 1.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    steps = len(levels) - 1
    orders = [min(order, i + 1, steps - i if lower_order_final else order) for i in range(steps)]
    _require_first_order_to_clean(levels, orders[-1])
    evaluate = _evaluator(denoise, clip)
    states = [x]
    history: list[Tensor] = []  # the newest estimate of x_0 comes first
    for i, (source, target) in enumerate(pairwise(levels)):
        clean = evaluate(x, source)
        history = [clean, *history[: order - 1]]
        h = target.half_log_snr - source.half_log_snr
        x = _first_order_step(x, clean, source, target)
        if orders[i] > 1:
            r0 = (source.half_log_snr - levels[i - 1].half_log_snr) / h
            d0 = (clean - history[1]) / r0
        if orders[i] == 2:
            x = add_scaled(x, -target.alpha * _phi1(h) / 2, d0)
        elif orders[i] == 3:
            r1 = (levels[i - 1].half_log_snr - levels[i - 2].half_log_snr) / h
            d1 = (history[1] - history[2]) / r1
            curvature = 2 * (d0 - d1) / (r0 + r1)
            x = x + target.alpha * (_phi2(h) * (d0 + r0 * curvature / 2) - _phi3(h) * curvature)
        states = [*states, x] if path else [x]
    return torch.stack(states) if path else x


# ---------------------------------------------------------------- parts


def _evaluator(denoise: Denoise, clip: float | None) -> Callable[[Tensor, Level], Tensor]:
    """Return the clamped denoiser at a level."""

    def evaluate(x: Tensor, level: Level) -> Tensor:
        clean = denoise(x, level)
        return clean if clip is None else clean.clamp(-clip, clip)

    return evaluate


def _sample_chain(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    kernels: list[tuple[float, float, float]],
    noise: Noise | None,
    clip: float | None,
    path: bool,
) -> Tensor:
    """Run x <- c_clean x_0 + c_noisy x + std z over `kernels` = (c_clean, c_noisy, std)."""
    if isinstance(noise, torch.Generator):
        noise = torch.randn(len(kernels), *x.shape, generator=noise, device=x.device, dtype=x.dtype)
    if noise is None and any(std > 0 for *_, std in kernels):
        raise ValueError("this sampler is stochastic and needs noise: a generator or the draws themselves")
    evaluate = _evaluator(denoise, clip)
    states = [x]
    for i, (clean, noisy, std) in enumerate(kernels):
        x = add_scaled(clean * evaluate(x, levels[i]), noisy, x)
        if noise is not None and std > 0:
            x = add_scaled(x, std, noise[i])
        states = [*states, x] if path else [x]
    return torch.stack(states) if path else x


def _require_first_order_to_clean(levels: Levels, last_order: int) -> None:
    if levels[-1].sigma == 0 and last_order > 1:
        raise ValueError(f"the step to a clean level must be of order 1, not {last_order}: its lambda is infinite")


def _first_order_step(x: Tensor, clean: Tensor, source: Level, target: Level) -> Tensor:
    """Return the solution at `target` when x_0 stays `clean` all the way: DDIM's step."""
    h = target.half_log_snr - source.half_log_snr
    return add_scaled(target.sigma / source.sigma * x, -target.alpha * _phi1(h), clean)


# The weights that a constant, linear and quadratic x_0(lambda) have in the exact solution over a step h, up to sign.


def _phi1(h: float) -> float:
    return math.expm1(-h)


def _phi2(h: float) -> float:
    return _phi1(h) / h + 1


def _phi3(h: float) -> float:
    return _phi2(h) / h - 0.5
