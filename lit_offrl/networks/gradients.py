"""Gradients of scalar networks in the action, and the precision that they need."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def action_gradient(function: Callable[..., Tensor], actions: Tensor, *conditions: Tensor) -> Tensor:
    """Return df/da, `[..., action_dim]`, of a scalar function f of each action, in full precision.

    Where gradients are enabled, the result can be differentiated again with respect to parameters and conditions.
    `torch.func.grad` would do the same, but takes twice as long for a single state.

    Args:
        function: Maps actions and conditions to values `[...]`. Each value depends on its own action only.
        actions: Where to take the gradient, `[..., action_dim]`.
        conditions: Further arguments of `function`, e.g. times and observations.
    """
    differentiable = torch.is_grad_enabled()
    # Lightning evaluates in inference mode: autograd is off there, and tensors made there must be copied to enter it.
    with torch.inference_mode(False), torch.enable_grad(), full_precision(actions):
        inputs = [each.clone() for each in (actions.detach(), *conditions)]
        values = function(inputs[0].requires_grad_(), *inputs[1:])
        return torch.autograd.grad(values.sum(), inputs[0], create_graph=differentiable)[0]


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device of `like`.

    A density network is used in differences of its values, and its gradient in multiples of up to 150: bfloat16's
    errors would be as large as what is computed.
    """
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
