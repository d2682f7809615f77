"""Adam as algorithms use it: which networks it steps, when and how fast, and a step that takes its gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimizerSpec:
    """One Adam optimizer: which modules it owns and how fast it moves them.

    Attributes:
        modules: Modules whose parameters it steps.
        learning_rate: Adam's step size.
        cosine: Decay the learning rate by a half cosine in the optimizer's own steps, to 0 at as many of them as the
            main phase has gradient steps (constant before the main phase).
        clip_norm: Clip the gradient to this global norm; None leaves it alone.
        every: Gradient steps of the main phase from one of its own steps to the next.
        after: Gradient steps of the main phase before the first of its own.
    """

    modules: tuple[nn.Module, ...]
    learning_rate: float
    cosine: bool = False
    clip_norm: float | None = None
    every: int = 1
    after: int = 0

    def due(self, main_step: int) -> bool:
        """Return whether it steps at step `main_step` of the main phase, counted from 1."""
        return main_step > self.after and main_step % self.every == 0


class _State(NamedTuple):
    parameters: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    step: Tensor


class Adam(torch.optim.Adam):
    """Fused Adam (Kingma and Ba, 2015) whose step is a function of gradients and a learning rate, without Python state.

    So it can be traced by `torch.compile` and captured in a CUDA graph, which `step()` cannot, and costs one kernel.
    State and checkpoints are those of `torch.optim.Adam(fused=True)`.

    Args:
        parameters: What it steps.
        learning_rate: Initial step size; `apply` is given the present one.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
        super().__init__(parameters, lr=learning_rate, fused=True)
        self._cached: _State | None = None
        for parameter in self.parameters:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What it steps."""
        parameters: list[nn.Parameter] = self.param_groups[0]["params"]
        return parameters

    def apply(self, gradients: list[Tensor], learning_rate: Tensor) -> None:
        """Step the parameters.

        Args:
            gradients: Of each of `parameters`, contiguous.
            learning_rate: A scalar on their device.
        """
        if self._cached is None:
            states = [self.state[parameter] for parameter in self.parameters]
            means, squares = ([each[name] for each in states] for name in ("exp_avg", "exp_avg_sq"))
            # One count stands for all: to count for each parameter costs as much as half of the step itself.
            self._cached = _State([*self.parameters], means, squares, states[0]["step"])
        group = self.param_groups[0]
        kernel = adam if torch.compiler.is_compiling() else adam_kernel
        beta1, beta2 = group["betas"]
        kernel(*self._cached, gradients, learning_rate, beta1, beta2, group["eps"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the count of steps for each parameter."""
        first, *others = (self.state[parameter]["step"] for parameter in self.parameters)
        for each in others:
            each.copy_(first)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        super().load_state_dict(state_dict)
        self._cached = None


def adam_kernel(
    parameters: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    step: Tensor,
    gradients: list[Tensor],
    learning_rate: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> None:
    """Perform a step of Adam in place, in one kernel for all parameters."""
    step += 1
    torch._fused_adam_(
        parameters,
        gradients,
        means,
        squares,
        [],
        [step] * len(parameters),
        lr=learning_rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=epsilon,
        amsgrad=False,
        maximize=False,
    )


# The kernel has no meta implementation, which tracing needs; as an operator of its own it has, and is the same kernel.
adam = torch.library.custom_op(
    "lit_offrl::adam",
    adam_kernel,
    mutates_args=("parameters", "means", "squares", "step"),
    schema=(
        "(Tensor(a!)[] parameters, Tensor(b!)[] means, Tensor(c!)[] squares, Tensor(d!) step, Tensor[] gradients, "
        "Tensor learning_rate, float beta1, float beta2, float epsilon) -> ()"
    ),
)
adam.register_fake(lambda *arguments: None)


def clip_(gradients: list[Tensor], norm: float) -> None:
    """Scale `gradients` in place so that their common norm is at most `norm`, as `clip_grad_norm_` does."""
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (norm / (total + 1e-6)).clamp(max=1.0))
