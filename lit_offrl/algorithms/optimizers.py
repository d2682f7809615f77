"""Optimizers of an algorithm: which networks each Adam steps, when and how fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        every: The optimizer steps at every so many gradient steps of the main phase.
        after: Number of gradient steps of the main phase before the first of its own.
        early_cosine: Decay the learning rate by a half cosine to 0 over the last so many gradient steps before the main
            phase, instead of in it; 0 for no such decay.
        warmup: The learning rate grows linearly from 0 over the first so many gradient steps of the main phase.
        weight_decay: Decoupled weight decay: every step shrinks the weights by this times the learning rate (AdamW).
    """

    modules: tuple[nn.Module, ...]
    learning_rate: float
    cosine: bool = False
    clip_norm: float | None = None
    every: int = 1
    after: int = 0
    early_cosine: int = 0
    warmup: int = 0
    weight_decay: float = 0.0

    def steps_at(self, main_step: int) -> bool:
        """Return whether it steps at step `main_step` of the main phase, counted from 1."""
        return main_step > self.after and main_step % self.every == 0

    def rate_at(self, main_step: int, main_steps: int | None) -> float:
        """Return the learning rate after `main_step` of `main_steps` gradient steps of the main phase.

        Before the main phase `main_step` is negative.
        """
        if self.warmup and main_step < self.warmup:
            return self.learning_rate * max(main_step + 1, 0) / self.warmup
        if self.early_cosine:
            progress = 1 + main_step / self.early_cosine
        elif self.cosine and main_steps:
            progress = (main_step - self.after) / self.every / main_steps
        else:
            return self.learning_rate
        progress = min(max(progress, 0.0), 1.0)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizers:
    """The optimizers of one algorithm, by name.

    Args:
        specs: What `OfflineAlgorithm.optimizer_specs` returns.

    Attributes:
        adams: One `Adam` per spec.
        average: Averages gradients over the ranks; None where there is one rank.
    """

    def __init__(self, specs: Mapping[str, OptimizerSpec]) -> None:
        self.specs = dict(specs)
        self.adams = {
            name: Adam(
                [p for module in spec.modules for p in module.parameters()], spec.learning_rate, spec.weight_decay
            )
            for name, spec in self.specs.items()
        }
        self.average: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None
        # On the device, where a captured or compiled update reads them.
        self._rates = {
            name: torch.tensor(self.specs[name].learning_rate, device=adam.parameters[0].device)
            for name, adam in self.adams.items()
        }

    def minimize(self, name: str, loss: Tensor) -> None:
        """Step one optimizer on `loss`, with gradients for its own parameters and no others."""
        adam, clip_norm = self.adams[name], self.specs[name].clip_norm
        gradients: Sequence[Tensor] = torch.autograd.grad(loss, adam.parameters)
        if self.average is not None:
            gradients = self.average(gradients)
        # An expanded gradient (of a sum) has less memory than elements: the fused Adam would read past its end.
        gradients = [each.contiguous() for each in gradients]
        if clip_norm is not None:
            clip_(gradients, clip_norm)
        for parameter, gradient in zip(adam.parameters, gradients, strict=True):
            parameter.grad = gradient
        adam.apply(gradients, self._rates[name])

    def set_rates(self, main_step: int, main_steps: int | None) -> None:
        """Set the learning rates for the update after `main_step` gradient steps of the main phase."""
        for name, spec in self.specs.items():
            if spec.cosine or spec.early_cosine or spec.warmup:
                self._rates[name].fill_(spec.rate_at(main_step, main_steps))

    def stepping_at(self, main_step: int) -> tuple[str, ...]:
        """Return the names of the optimizers that step at step `main_step` of the main phase, counted from 1."""
        return tuple(name for name, spec in self.specs.items() if spec.steps_at(main_step))


class _State(NamedTuple):
    parameters: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    step: Tensor


class Adam(torch.optim.Adam):
    """Fused Adam (Kingma and Ba, 2015), or AdamW, whose step is a function of gradients and a learning rate alone.

    So it can be traced by `torch.compile` and captured in a CUDA graph, which `step()` cannot, and costs one kernel.
    State and checkpoints are those of `torch.optim.Adam(fused=True)`.

    Args:
        parameters: What it steps.
        learning_rate: Initial step size; `apply` is given the present one.
        weight_decay: Decoupled weight decay (Loshchilov and Hutter, 2019).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
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
        kernel(*self._cached, gradients, learning_rate, beta1, beta2, group["eps"], group["weight_decay"])

    def reset(self) -> None:
        """Forget the moments of the gradients and the count of steps, in place."""
        for state in self.state.values():
            for each in state.values():
                each.zero_()

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
    weight_decay: float,
) -> None:
    """Perform a step of AdamW in place, which without weight decay is Adam, in one kernel for all parameters."""
    step += 1
    torch._fused_adamw_(
        parameters,
        gradients,
        means,
        squares,
        [],
        [step] * len(parameters),
        lr=learning_rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
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
        "Tensor learning_rate, float beta1, float beta2, float epsilon, "
        "float weight_decay) -> ()"
    ),
)
adam.register_fake(lambda *arguments: None)


def clip_(gradients: list[Tensor], norm: float) -> None:
    """Scale `gradients` in place so that their common norm is at most `norm`, as `clip_grad_norm_` does."""
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (norm / (total + 1e-6)).clamp(max=1.0))
