"""The scalar network of a bottleneck diffusion model, with its gradient written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_offrl import native
from lit_offrl.networks.at_observations import AtObservations
from lit_offrl.networks.embeddings import FourierEmbedding
from lit_offrl.networks.mlp import EPSILON, parameters_of

FORWARD_ROWS, FORWARD_DIMENSIONS = 4, 5  # up to which `BottleneckNetwork._forward_mode` pays

Pullback = Callable[[Tensor], Tensor]  # from the gradient at an output to the gradient at the input


class _SiLUFunction(torch.autograd.Function):
    """SiLU and its slope, both differentiable: v = u s and v' = s + v (1 - s) with s = sigmoid(u)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(u)
        value = u * s
        slope = torch.addcmul(s, value, 1 - s)
        ctx.save_for_backward(value, slope, s)
        return value, slope

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, slope_gradient: Tensor) -> Tensor:
        value, slope, s = ctx.saved_tensors
        curvature = torch.addcmul(2 * s, value, 1 - 2 * s).mul_(1 - s)  # v'' = (1 - s) (2 s + v (1 - 2 s))
        return torch.addcmul(gradient * slope, slope_gradient, curvature)


def silu_with_pullback(u: Tensor) -> tuple[Tensor, Pullback]:
    """Return SiLU(u), and the map from a gradient at it to the gradient at u."""
    if torch.is_grad_enabled():
        value, slope = _SiLUFunction.apply(u)  # type: ignore[no-untyped-call]
        return value, lambda gradient: gradient * slope
    return F.silu(u), lambda gradient: torch.ops.aten.silu_backward(gradient, u)


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast: f matters in differences, and its gradient in multiples of up to 150."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class BottleneckBlock(nn.Module):
    """x + contract(SiLU(expand(LayerNorm(mask x)))): the mask, of dropout, comes before the normalisation.

    Args:
        width: Width of x; inside it is four times as wide.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., width]` to its like, without dropout."""
        output: Tensor = x + self.contract(F.silu(self.expand(self.norm(x))))
        return output

    def with_pullback(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Pullback]:
        """Return the output at `[batch, width]`, with dropout by a mask of its shape, and its pullback."""
        norm, expand, contract = self.norm, self.expand, self.contract
        masked = x if mask is None else x * mask
        normalised, mean, rstd = torch.native_layer_norm(
            masked, norm.normalized_shape, norm.weight, norm.bias, norm.eps
        )
        inside, pull_inside = silu_with_pullback(F.linear(normalised, expand.weight, expand.bias))

        def pullback(gradient: Tensor) -> Tensor:
            inner = pull_inside(gradient.mm(contract.weight)).mm(expand.weight)
            outer: Tensor = torch.ops.aten.native_layer_norm_backward(
                inner, masked, norm.normalized_shape, mean, rstd, norm.weight, norm.bias, [True, False, False]
            )[0]
            return gradient + (outer if mask is None else outer * mask)

        return x + F.linear(inside, contract.weight, contract.bias), pullback


class BottleneckNetwork(nn.Module):
    """f(a_t | s, t), whose gradient in a_t is a diffusion model's score (EDA, Eq. 9), as EDA's authors built it.

    Linear maps of action, time features and observation, side by side, and a linear layer on them: jointly linear, so
    the two are applied as one. Then residual blocks, SiLU, and a head whose `action_dim` outputs are summed. One
    output would do, but as Adam steps each by the learning rate, it would learn `action_dim` times more slowly. There
    is no bias in it: a constant has no gradient.

    The gradient is written out rather than left to autograd: training it then takes one backward pass through plain
    operations, not a second derivative, and sampling builds no graph.

    Args:
        action_dim: Width of an action.
        observation_dim: Width of an observation; 0 for a network that does not see it (2-D bandits).
        hidden_dim: Width of the blocks. An eighth of it is the time's; of the rest the action has four sevenths, all
            of it where there is no observation.
        blocks: Number of residual blocks.
    """

    def __init__(self, action_dim: int, observation_dim: int, hidden_dim: int = 256, blocks: int = 3) -> None:
        super().__init__()
        time_dim = hidden_dim // 8
        state_dim = 3 * hidden_dim // 8 if observation_dim else 0
        self.widths = (hidden_dim - time_dim - state_dim, time_dim, state_dim)
        self.action = nn.Linear(action_dim, self.widths[0])
        self.time = nn.Sequential(
            FourierEmbedding(), nn.Linear(FourierEmbedding.WIDTH, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        self.state = nn.Linear(observation_dim, state_dim) if observation_dim else None
        self.mix = nn.Linear(hidden_dim, hidden_dim)
        self.blocks = nn.ModuleList(BottleneckBlock(hidden_dim) for _ in range(blocks))
        self.head = nn.Linear(hidden_dim, action_dim, bias=False)

    def entrance(self, observations: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Fold the two linear layers of the input at fixed observations `[..., observation_dim]`.

        Returns:
            The map of the action, `[hidden_dim, action_dim]`, and what is added to it in the first hidden layer as a
            function of times `[...]`; leading dimensions broadcast.
        """
        action, time, state = torch.split(self.mix.weight, list(self.widths), dim=1)
        action_map = action @ self.action.weight
        shift = F.linear(self.action.bias, action, self.mix.bias)
        if self.state is not None:
            shift = shift + F.linear(self.state(observations), state)

        return action_map, lambda times: shift + F.linear(self.time(times), time)

    def forward(self, actions: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        """Return f, `[...]`, at `[..., action_dim]`, `[...]` and `[..., observation_dim]`, which broadcast."""
        with full_precision(observations):
            action_map, shift = self.entrance(observations)
            hidden = F.linear(actions, action_map) + shift(time)
            for block in self.blocks:
                hidden = block(hidden)
            value: Tensor = self.head(F.silu(hidden)).sum(-1)
        return value

    def gradient(self, observations: Tensor, masks: Tensor | None = None) -> AtObservations:
        """Return df/da as a function of actions and times at fixed observations, shapes as in `forward`.

        Args:
            observations: What depends on them alone is computed once.
            masks: Of dropout, one for each block, `[blocks, ..., hidden_dim]`.
        """
        with full_precision(observations):
            action_map, shift = self.entrance(observations)
            head = self.head.weight.sum(0)
        parameters = parameters_of(layer for block in self.blocks for layer in block.children())

        def prepare(time: Tensor) -> tuple[Tensor]:
            with full_precision(time):
                return (shift(time),)

        def gradient(actions: Tensor, shift: Tensor) -> Tensor:
            with full_precision(actions):
                if masks is None and self._forward_mode(actions):
                    kernel = torch.ops.lit_offrl_native.bottleneck_gradient
                    result: Tensor = kernel(actions, shift, action_map, head, parameters, EPSILON)
                    return result
                first = F.linear(actions, action_map) + shift
                hidden, pullbacks = first.flatten(0, -2), []
                for i, block in enumerate(self.blocks):
                    assert isinstance(block, BottleneckBlock)
                    hidden, pullback = block.with_pullback(hidden, None if masks is None else masks[i].flatten(0, -2))
                    pullbacks.append(pullback)
                _, pullback = silu_with_pullback(hidden)
                result = pullback(head.expand_as(hidden))
                for pullback in reversed(pullbacks):
                    result = pullback(result)
                return result.mm(action_map).view(*first.shape[:-1], -1)

        return AtObservations(observations, prepare, gradient)

    def _forward_mode(self, actions: Tensor) -> bool:
        """Return whether derivatives are to go forward, beside the values, all of them and as one kernel.

        Weights are then read once, not twice, but multiplied with `action_dim` + 1 numbers for each row: where there
        are few, it is reading that takes the time.
        """
        *shape, dimensions = actions.shape
        few = math.prod(shape) <= FORWARD_ROWS and dimensions <= FORWARD_DIMENSIONS
        return few and not torch.is_grad_enabled() and native.take(actions)
