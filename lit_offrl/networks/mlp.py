"""Multi-layer perceptrons, one or several at once, on inputs in blocks, and a cheap Mish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_offrl import native


class _MishFunction(torch.autograd.Function):
    """Mish and its slope by one sigmoid and rational arithmetic, in the memory of two results and one more.

    With s = sigmoid(x) and p = s + s (1 - s): g = tanh(softplus(x)) = p / (2 - p), and the slope of x g is
    g + x s (1 - g^2). Nothing overflows; 1 - g^2 is off by no more than rounding where s is near 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        gate = _gate(s)
        product = s.mul_(x)
        slope = torch.ops.aten.tanh_backward.grad_input(product, gate, grad_input=product).add_(gate)
        ctx.save_for_backward(slope)
        return gate.mul_(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        slope: Tensor = ctx.saved_tensors[0]
        return gradient * slope


def _gate(s: Tensor) -> Tensor:
    """Return tanh(softplus(x)) of s = sigmoid(x)."""
    p = torch.lerp(s, s.new_ones(()), s)
    return p.div_(2 - p)


SMALL = 4096  # elements up to which, without gradients, one native call is cheaper than several of ours


class Mish(nn.Module):
    """Mish activation (Misra 2019), equal to `torch.nn.Mish` within 2e-6 in float32 and 4 to 5 times faster on a CPU.

    On other devices it is the native one, a single kernel; an `MLP` may have a kernel for the whole of it. It has a
    first derivative only, which `torch.func` cannot take.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x tanh(softplus(x)), elementwise."""
        differentiable = torch.is_grad_enabled()
        if x.device.type != "cpu" or (not differentiable and x.numel() <= SMALL):
            return F.mish(x)
        if not differentiable:
            return _gate(torch.sigmoid(x)).mul_(x)
        output: Tensor = _MishFunction.apply(x)  # type: ignore[no-untyped-call]
        return output


FEW_ROWS = 64  # up to which one product of everything costs less than the calls of several


def side_by_side(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Return `inputs` `[..., width]`, whose leading dimensions broadcast, as one where that pays an `MLP`."""
    shapes = {each.shape[:-1] for each in inputs}
    if len(shapes) > 1:
        shape = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
        if shape.numel() > FEW_ROWS:
            return inputs
        inputs = tuple(each.expand(*shape, -1) for each in inputs)
    return (torch.cat(inputs, dim=-1),) if len(inputs) > 1 else inputs


EPSILON = 1e-5  # of LayerNorm, PyTorch's default


class MLP(nn.Sequential):
    """Linear layers with one activation between them, maybe with LayerNorm before it; other modules before and after.

    On a CPU everything from the first linear layer to the last is one kernel, forward and backward, where there are
    kernels for it (`lit_offrl.native`). It has a first derivative only, which `torch.func` cannot take.

    Attributes:
        fused: Whether they may be used.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        linear = [i for i, module in enumerate(self) if isinstance(module, nn.Linear)] or [len(self)]
        self.first, self.end = linear[0], linear[-1] + 1
        kinds = {type(module).__name__ for module in list(self)[self.first : self.end]} - {"Linear"}
        self.norm = "LayerNorm" in kinds
        self.activation = "".join(kinds - {"LayerNorm"})
        self.fused = self.activation in native.ACTIVATIONS

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the output at `cat(inputs)` for inputs `[..., width]` whose leading dimensions broadcast.

        Where they differ, e.g. one observation `[batch, 1, width]` for many actions `[batch, samples, width]`, the
        first layer is computed block by block and what is shared is computed once; unless there are few rows.
        """
        return run_together([self], *self.entrance(*inputs))[0]

    def after_first(self, hidden: Tensor) -> Tensor:
        """Return the output where that of the first linear layer is `hidden`, `[..., width]`."""
        return run_together([self], self.first + 1, hidden)[0]

    def entrance(self, *inputs: Tensor) -> tuple[int, Tensor]:
        """Return the number of the module where to go on with `inputs`, as `forward` takes them, and its input."""
        inputs = side_by_side(*inputs)
        if len(inputs) == 1:
            return 0, inputs[0]
        first = cast(nn.Linear, self[self.first])
        weights = torch.split(first.weight, [each.shape[-1] for each in inputs], dim=1)
        products = [F.linear(each, weight) for each, weight in zip(inputs, weights, strict=True)]
        return self.first + 1, reduce(torch.add, sorted([*products, first.bias], key=Tensor.numel))  # small ones first


class Ensemble(nn.ModuleList):
    """MLPs that are alike, run together: as many at a time as there are threads, where they are one kernel."""

    def forward(self, *inputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs `[members, ..., width]`, where a member's inputs are as `MLP` takes them."""
        members = [cast(MLP, member) for member in self]
        starts, hidden = zip(*(member.entrance(*own) for member, own in zip(members, inputs, strict=True)), strict=True)
        return torch.stack(run_together(members, starts[0], *hidden))


def run_together(networks: Sequence[MLP], start: int, *x: Tensor) -> list[Tensor]:
    """Return outputs of networks that are alike, given the inputs of their modules number `start`.

    It is at most the one after the first linear layer.
    """
    one, modules = networks[0], [list(network) for network in networks]
    activated, middle = start > one.first, max(start, one.first)
    hidden = [_in_turn(own[start:middle], each) for own, each in zip(modules, x, strict=True)]
    if one.fused and native.take(hidden[0]):
        parameters = parameters_of(module for own in modules for module in own[middle : one.end])
        kernel = torch.ops.lit_offrl_native.mlp
        hidden, middle = kernel(hidden, parameters, one.activation, one.norm, activated, EPSILON), one.end
    return [_in_turn(own[middle:], each) for own, each in zip(modules, hidden, strict=True)]


def parameters_of(layers: Iterable[nn.Module]) -> list[Tensor]:
    """Return the parameters of layers that have no parts; `Module.parameters` takes ten times as long."""
    return [cast(Tensor, each) for layer in layers for each in layer._parameters.values()]


def _in_turn(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    return reduce(lambda x, module: module(x), modules, x)


def mlp(
    widths: Sequence[int],
    activation: Callable[[], nn.Module] = Mish,
    *,
    layer_norm: bool = False,
) -> MLP:
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
    return MLP(*layers)


def affine(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Return the map of a linear layer, for many calls on few rows: calling the module costs as much again as it."""
    return partial(F.linear, weight=layer.weight, bias=layer.bias)


def orthogonal_(module: nn.Module, gain: float) -> None:
    """Initialise every linear layer below `module` with an orthogonal weight and no bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
