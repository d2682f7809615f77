"""Multi-layer perceptrons on concatenated inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mish(nn.Module):
    """Mish activation x tanh(softplus(x)) (Misra 2019), equal to `torch.nn.Mish` up to rounding.

    On a CPU it is computed as x p / (2 - p), with s = sigmoid(x) and p = s (2 - s). One sigmoid and rational arithmetic
    are cheaper than exponential, logarithm and tanh: the gradients of an MLP of three layers of 256 units with
    LayerNorm at 256 rows take 4.3 ms instead of 6.2 compiled, and 6.0 instead of 6.6 eager.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation, elementwise."""
        if x.device.type != "cpu":
            return F.mish(x)  # one kernel
        s = torch.sigmoid(x)
        p = s * (2 - s)
        return x * p / (2 - p)


def mlp(
    widths: Sequence[int],
    activation: Callable[[], nn.Module] = Mish,
    *,
    layer_norm: bool = False,
) -> nn.Sequential:
    """Build linear layers `widths[0] -> ... -> widths[-1]` with `activation` between them (none after the last).

    Args:
        widths: Input width, hidden widths, output width.
        activation: Makes the activation after each hidden layer.
        layer_norm: Put a LayerNorm before each activation.
    """
    layers: list[nn.Module] = []
    for i, (width_in, width_out) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(width_in, width_out))
        if i < len(widths) - 2:
            if layer_norm:
                layers.append(nn.LayerNorm(width_out))
            layers.append(activation())
    return nn.Sequential(*layers)


def concatenate(*inputs: Tensor) -> Tensor:
    """Return `inputs`, `[..., width]` each, concatenated along the last dimension; the leading dimensions broadcast."""
    shape = torch.broadcast_shapes(*(each.shape[:-1] for each in inputs))  # type: ignore[no-untyped-call]
    return torch.cat([each.expand(*shape, -1) for each in inputs], dim=-1)


def orthogonal_(module: nn.Module, gain: float) -> None:
    """Initialize every linear layer below `module` with an orthogonal weight and no bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
