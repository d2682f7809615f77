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
def _mlp(x: Tensor, parameters: Sequence[Tensor], activation: str, norm: bool, activated: bool, eps: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], parameters[-1].shape[0]))


@torch.library.register_fake("lit_offrl_native::mlp_forward")  # type: ignore[untyped-decorator]
def _mlp_forward(
    x: Tensor, parameters: Sequence[Tensor], activation: str, norm: bool, activated: bool, eps: float
) -> tuple[Tensor, list[Tensor]]:
    memories: list[Tensor] = []
    rows = x.shape[:-1].numel()
    for _, width in _weights([each.shape for each in parameters])[0 if activated else 1 :]:
        memories += [x.new_empty((rows, width)) for _ in ("slope", "value")]
        if norm:
            memories += [x.new_empty((rows, width)), x.new_empty((rows,))]
    return _mlp(x, parameters, activation, norm, activated, eps), memories


@torch.library.register_fake("lit_offrl_native::mlp_backward")  # type: ignore[untyped-decorator]
def _mlp_backward(
    gradient: Tensor,
    x: Tensor | None,
    parameters: Sequence[Tensor],
    memories: Sequence[Tensor],
    needed: Sequence[int],
    norm: bool,
) -> list[Tensor]:
    width = _weights([each.shape for each in parameters])[0][1]
    shapes = [(*gradient.shape[:-1], width), *(each.shape for each in parameters)]
    return [gradient.new_empty(shapes[i]) for i in needed]


@torch.library.register_fake("lit_offrl_native::feature_block")  # type: ignore[untyped-decorator]
def _feature_block(x: Tensor, shift: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], parameters[0].shape[0]))


@torch.library.register_fake("lit_offrl_native::bottleneck_gradient")  # type: ignore[untyped-decorator]
def _bottleneck_gradient(actions: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(actions, memory_format=torch.contiguous_format)


@register_flop_formula([OPS.mlp, OPS.mlp_forward])
def _mlp_flops(x: Shape, parameters: Sequence[Shape], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * sum(map(math.prod, _weights(parameters)))


@register_flop_formula(OPS.mlp_backward)
def _mlp_backward_flops(
    gradient: Shape,
    x: Shape | None,
    parameters: Sequence[Shape],
    memories: Any,
    needed: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    own = [math.prod(shape) for i, shape in enumerate(parameters, 1) if len(shape) == 2 and i in needed]
    onward = [math.prod(shape) for shape in _weights(parameters)]
    if x is not None and 0 not in needed:
        onward = onward[1:]
    return 2 * math.prod(gradient[:-1]) * (sum(own) + sum(onward))


@register_flop_formula(OPS.feature_block)
def _feature_block_flops(x: Shape, shift: Shape, parameters: Sequence[Shape], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * sum(map(math.prod, _weights(parameters)))


@register_flop_formula(OPS.bottleneck_gradient)
def _bottleneck_gradient_flops(
    actions: Shape, shift: Shape, action_map: Shape, head: Shape, blocks: Sequence[Shape], *_: Any, **__: Any
) -> int:
    groups = math.prod(actions[:-1]) * (1 + actions[-1])
    return 2 * groups * sum(map(math.prod, _weights(blocks)))
