"""Samplers: free functions over a callable `denoise(x, sigma)`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]


def sample_heun(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """Solve the probability-flow ODE from sigmas[0] to sigmas[-1] by Heun's method (Karras et al. 2022, Algorithm 1).

    Args:
        denoise: D(x, sigma) for `x` `[batch, dim]` and `sigma` `[batch]`.
        x: Noise of standard deviation `sigmas[0]`, `[batch, dim]`.
        sigmas: Decreasing noise levels, `[steps + 1]`; a last level of 0 takes an Euler step.

    Returns:
        The sample, `[batch, dim]`.
    """
    levels = [(sigma, sigma.expand(len(x))) for sigma in sigmas.to(x)]
    final = float(sigmas[-1])
    for i, ((sigma, sigma_row), (next_sigma, next_row)) in enumerate(pairwise(levels)):
        slope = (x - denoise(x, sigma_row)) / sigma
        euler = x + (next_sigma - sigma) * slope
        if i == len(levels) - 2 and final == 0:
            x = euler
        else:
            next_slope = (euler - denoise(euler, next_row)) / next_sigma
            x = x + (next_sigma - sigma) * (slope + next_slope) / 2
    return x
