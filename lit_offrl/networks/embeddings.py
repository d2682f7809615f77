"""Embeddings of the diffusion time or noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


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
        """Map `[batch]` to `[batch, dim]`."""
        angles = x[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
