"""Embeddings of the diffusion time or noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_offrl.networks.mlp import Mish, mlp


class SinusoidalEmbedding(nn.Module):
    """Sines, then cosines, of `x * 10000^(-k / (dim/2 - 1))` for k = 0 .. dim/2 - 1 (Vaswani et al. 2017).

    Args:
        dim: Width of the embedding; even, at least 4.
    """

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.register_buffer(
            "frequencies", torch.exp(torch.arange(half) * (-math.log(10_000.0) / (half - 1))), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[...]` to `[..., dim]`."""
        angles = x[..., None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class FourierEmbedding(nn.Module):
    """Sines, then cosines, of 2 pi w t for frequencies w of a half-normal distribution of scale 30 (EDA, CEP).

    The authors draw the frequencies from a normal distribution, once for each network; the sign of a frequency changes
    nothing that a linear layer on top can learn. Here the frequencies are quantiles, so that all runs share them.

    Args:
        width: Width of the embedding, twice the number of frequencies; even.
    """

    WIDTH = 32
    SCALE = 30.0

    frequencies: Tensor

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        half = width // 2
        quantiles = (torch.arange(half, dtype=torch.float64) + 0.5) / half
        self.register_buffer("frequencies", (self.SCALE * torch.special.ndtri((1 + quantiles) / 2)).float())

    def forward(self, time: Tensor) -> Tensor:
        """Map `[...]` to `[..., width]`."""
        angles = (2 * math.pi * time)[..., None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class StepEmbedding(nn.Module):
    """Learned features of a discrete diffusion step: sinusoids, then two linear layers with Mish.

    The features of all `steps` + 1 steps are computed as a table, in which `forward` looks the steps up.

    Args:
        steps: Largest step.
        widths: Widths of the sinusoids, of the hidden layer and of the features; by default BDPO's.
        activate_last: Whether the features pass through Mish as well (BDPO).
    """

    sinusoids: Tensor

    def __init__(self, steps: int, widths: tuple[int, int, int] = (64, 64, 64), *, activate_last: bool = True) -> None:
        super().__init__()
        table = SinusoidalEmbedding(widths[0])(torch.arange(steps + 1, dtype=torch.float32))
        self.register_buffer("sinusoids", table, persistent=False)
        self.layers = nn.Sequential(*mlp(widths), *([Mish()] if activate_last else []))
        self.width = widths[-1]

    def forward(self, step: Tensor) -> Tensor:
        """Map integers `[...]` to `[..., width]`."""
        return F.embedding(step, self.layers(self.sinusoids))


class LearnedFourierEmbedding(nn.Module):
    """Cosines, then sines, of 2 pi w t with learned frequencies w, which start normal with deviation 0.2 (IDQL).

    Args:
        width: Width of the embedding; even.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(0.2 * torch.randn(width // 2))

    def forward(self, time: Tensor) -> Tensor:
        """Map `[...]` to `[..., width]`."""
        angles = (2 * math.pi * time)[..., None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)
