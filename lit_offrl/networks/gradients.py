"""Gradients of scalar networks in the action, and the precision that they need."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def action_gradient(function: Callable[[Tensor], Tensor], actions: Tensor) -> Tensor:
    """Return df/da, `[..., action_dim]`, of a scalar function f of each action.

    The gradient is taken in full precision and can be differentiated again, for example with respect to a network's
    parameters. Lightning evaluates in inference mode, where `torch.func.grad` works and `torch.autograd.grad` does not.

    Args:
        function: Maps actions `[..., action_dim]` to values `[...]`. Each value depends on its own action only.
        actions: Where to take the gradient, `[..., action_dim]`.
    """
    with full_precision(actions):
        gradient: Tensor = torch.func.grad(lambda actions: function(actions).sum())(actions)
    return gradient


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device of `like`.

    A density network is used in differences of its values, and its gradient in multiples of up to 150: bfloat16's
    errors would be as large as what is computed.
    """
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
