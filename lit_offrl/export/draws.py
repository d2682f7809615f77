"""The noise of a policy, draw by draw: recorded while it acts, or given from outside.

Algorithms draw with `torch.randn` and `torch.multinomial`. In a graph, noise is an input: every program has random
numbers of its own, which could not be compared. `torch.multinomial` chooses the largest p / e with e ~ Exp(1): e is the
input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_offrl.errors import UserError

Distribution = Literal["normal", "exponential"]


@dataclass(frozen=True)
class NoiseInput:
    """An input of a graph that takes noise.

    Attributes:
        name: Name of the input.
        distribution: Standard normal, or exponential of rate 1; all numbers are independent.
        shape: Of the noise; None is the number of observations.
    """

    name: str
    distribution: Distribution
    shape: tuple[int | None, ...]

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return noise for some observations."""
        noise = torch.empty([rows if each is None else each for each in self.shape])
        if self.distribution == "normal":
            return noise.normal_(generator=generator)
        return noise.exponential_(generator=generator)

    @property
    def rows_dim(self) -> int:
        """The dimension that counts observations."""
        return self.shape.index(None)


class RecordedDraws(TorchFunctionMode):
    """Within, policies draw as usual, and `draws` receives the noise, each with its distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[tuple[Distribution, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, and record what it draws."""
        kwargs = kwargs or {}
        if func is torch.multinomial:
            generator: torch.Generator | None = kwargs.get("generator")
            ahead = (generator or torch.default_generator).clone_state()  # draws what `multinomial` is about to draw
            self.draws.append(("exponential", torch.empty_like(args[0]).exponential_(generator=ahead)))
        result = func(*args, **kwargs)
        if func is torch.randn:
            self.draws.append(("normal", result))
        return result


class GivenDraws(TorchFunctionMode):
    """Within, policies take the noise that is given, one after the other, instead of drawing."""

    def __init__(self, draws: Iterable[Tensor]) -> None:
        super().__init__()
        self.draws = iter(draws)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, or answer a draw."""
        if func is torch.randn:
            return next(self.draws)
        if func is torch.multinomial:
            weights, count = args
            scores = weights / next(self.draws)
            return scores.argmax(-1, keepdim=True) if count == 1 else scores.topk(count).indices
        if func is torch.split:
            return (args[0],)  # a batch stays in one piece: into how many it is cut depends on its size
        return func(*args, **(kwargs or {}))


def noise_inputs(act: Callable[[Tensor], object], observations: Tensor) -> list[NoiseInput]:
    """Return what a policy draws for each batch of observations.

    Args:
        act: Acts on a batch.
        observations: Some to act on, at least 3.

    Raises:
        UserError: What it draws does not depend on the number of observations alone.
    """
    recorded = []
    for rows in (2, 3):
        with RecordedDraws() as mode:
            act(observations[:rows])
        recorded.append(mode.draws)
    inputs: list[NoiseInput] = []
    for i, ((distribution, few), (_, more)) in enumerate(zip(*recorded, strict=True)):
        shape = tuple(None if one != other else one for one, other in zip(few.shape, more.shape, strict=True))
        if shape.count(None) != 1:
            raise UserError(f"export: draw {i} of the policy is not one for each observation: its shape is {shape}")
        kind = "noise" if distribution == "normal" else "choice"
        inputs.append(
            NoiseInput(kind if kind not in {each.name for each in inputs} else f"{kind}_{i}", distribution, shape)
        )
    return inputs
