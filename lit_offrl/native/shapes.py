"""What tracing and counting know of the kernels: shapes of results, and floating-point operations of products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

OPS = torch.ops.lit_offrl_native
Shape = Sequence[int]


def _weights(shapes: Sequence[Shape]) -> list[Shape]:
    return [shape for shape in shapes if len(shape) == 2]


@torch.library.register_fake("lit_offrl_native::mlp")  # type: ignore[untyped-decorator]
def _mlp(
    x: Sequence[Tensor], parameters: Sequence[Tensor], activation: str, norm: bool, activated: bool, eps: float
) -> list[Tensor]:
    return [each.new_empty((*each.shape[:-1], parameters[-1].shape[0])) for each in x]


@torch.library.register_fake("lit_offrl_native::mlp_forward")  # type: ignore[untyped-decorator]
def _mlp_forward(
    x: Sequence[Tensor], parameters: Sequence[Tensor], activation: str, norm: bool, activated: bool, eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    memories: list[Tensor] = []
    shapes = [each.shape for each in parameters[: len(parameters) // len(x)]]
    for each in x:
        rows = each.shape[:-1].numel()
        for _, width in _weights(shapes)[0 if activated else 1 :]:
            memories += [each.new_empty((rows, width)) for _ in ("slope", "value")]
            if norm:
                memories += [each.new_empty((rows, width)), each.new_empty((rows,))]
    return _mlp(x, parameters, activation, norm, activated, eps), memories


@torch.library.register_fake("lit_offrl_native::mlp_backward")  # type: ignore[untyped-decorator]
def _mlp_backward(
    gradients: Sequence[Tensor],
    x: Sequence[Tensor],
    parameters: Sequence[Tensor],
    memories: Sequence[Tensor],
    needed: Sequence[int],
    norm: bool,
) -> list[Tensor]:
    own = [each.shape for each in parameters]
    width = _weights(own)[0][1]
    shapes = [*((*each.shape[:-1], width) for each in gradients), *own]
    return [gradients[0].new_empty(shapes[i]) for i in needed]


@torch.library.register_fake("lit_offrl_native::feature_block")  # type: ignore[untyped-decorator]
def _feature_block(x: Tensor, shift: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], parameters[0].shape[0]))


@torch.library.register_fake("lit_offrl_native::bottleneck_gradient")  # type: ignore[untyped-decorator]
def _bottleneck_gradient(actions: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(actions, memory_format=torch.contiguous_format)


@register_flop_formula([OPS.mlp, OPS.mlp_forward])
def _mlp_flops(x: Sequence[Shape], parameters: Sequence[Shape], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[0][:-1]) * sum(map(math.prod, _weights(parameters)))


@register_flop_formula(OPS.mlp_backward)
def _mlp_backward_flops(
    gradients: Sequence[Shape],
    x: Sequence[Shape],
    parameters: Sequence[Shape],
    memories: Any,
    needed: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    networks = len(gradients)
    count = len(parameters) // networks
    elements = sum(map(math.prod, _weights(parameters)))  # for the gradients of the inputs of all layers
    for network in range(networks):
        own = range(networks + network * count, networks + (network + 1) * count)
        numbers = [i for i in own if len(parameters[i - networks]) == 2]
        elements += sum(math.prod(parameters[i - networks]) for i in numbers if i in needed)
        if x and network not in needed:
            elements -= math.prod(parameters[numbers[0] - networks])
    return 2 * math.prod(gradients[0][:-1]) * elements


@register_flop_formula(OPS.feature_block)
def _feature_block_flops(x: Shape, shift: Shape, parameters: Sequence[Shape], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * sum(map(math.prod, _weights(parameters)))


@register_flop_formula(OPS.bottleneck_gradient)
def _bottleneck_gradient_flops(
    actions: Shape, shift: Shape, action_map: Shape, head: Shape, blocks: Sequence[Shape], *_: Any, **__: Any
) -> int:
    groups = math.prod(actions[:-1]) * (1 + actions[-1])
    return 2 * groups * sum(map(math.prod, _weights(blocks)))
