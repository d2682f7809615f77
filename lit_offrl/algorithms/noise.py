"""The noise of training: one stream that all ranks share, saved with the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Draw(NamedTuple):
    """One draw of noise.

    Attributes:
        distribution: `torch.randn` or `torch.rand`.
        shape: Of this rank's noise; the first dimension counts rows of the batch.
        shared: Whether the noise belongs to no row of the batch and is the same on all ranks.
    """

    distribution: Callable[..., Tensor]
    shape: tuple[int, ...]
    shared: bool


class NoiseStream(nn.Module):
    """Draws noise for the rows of a batch that W ranks share.

    All ranks draw the noise of the whole batch from equal streams, and rank r keeps the rows r, r + W, ...: so W ranks
    train as one process does. The generator lives on the device that the algorithm is moved to.

    Args:
        seed: Seed of the stream.

    Attributes:
        rank: Number of this process.
        ranks: Number of processes that share each batch.
        gather: Returns the rows of all ranks in the order of the whole batch; None where there is one rank.
    """

    _device_anchor: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.rank, self.ranks = 0, 1
        self.gather: Callable[[Tensor], Tensor] | None = None
        self._generator: torch.Generator | None = None
        self._restored: Tensor | None = None
        self._replacement: Callable[[Draw], Tensor] | None = None
        self.register_buffer("_device_anchor", torch.empty(0), persistent=False)

    @property
    def generator(self) -> torch.Generator:
        """The stream of random numbers."""
        if self._generator is None:
            self._generator = torch.Generator(device=self._device_anchor.device).manual_seed(self.seed)
            if self._restored is not None:
                self._generator.set_state(self._restored)
        return self._generator

    # ---------------------------------------------------------------- drawing

    def normal(self, *shape: int, shared: bool = False) -> Tensor:
        """Draw standard normal noise.

        Args:
            *shape: Shape of the result; the first dimension counts rows of the batch.
            shared: The noise belongs to no row of the batch: it is the same on all ranks.
        """
        return self._draw(Draw(torch.randn, shape, shared))

    def uniform(self, *shape: int, shared: bool = False) -> Tensor:
        """Draw noise uniform in [0, 1), see `normal`."""
        return self._draw(Draw(torch.rand, shape, shared))

    def stratified(self, count: int) -> Tensor:
        """Draw one number uniformly from each of `count` equal parts of [0, 1), in their order, float64 `[count]`.

        The rows of a batch are exchangeable, so each row gets a uniform number. Numbers that are spread evenly over
        the batch reduce the variance of a loss.
        """
        parts = count * self.ranks
        parts_of_rank = self.own_rows(torch.arange(parts, device=self._device_anchor.device))
        return (parts_of_rank + self.uniform(1, shared=True).double()) / parts

    def dropout_masks(self, rate: float, rows: int, layers: int, width: int) -> Tensor | None:
        """Draw masks `[layers, rows, width]` that drop a share `rate` of hidden values and scale up the others.

        Nothing is drawn, and there are no masks, where the rate is 0 and in evaluation mode.
        """
        if not (rate and self.training):
            return None
        kept = self.uniform(rows, layers, width) >= rate
        return (kept / (1 - rate)).movedim(1, 0)

    def draw_from_stream(self, draw: Draw) -> Tensor:
        """Draw from the stream itself, also while `replaced_by` is active."""
        rows, *rest = draw.shape
        options = {"generator": self.generator, "device": self._device_anchor.device}
        if draw.shared or self.ranks == 1:
            return draw.distribution(rows, *rest, **options)
        return self.own_rows(draw.distribution(rows * self.ranks, *rest, **options))

    def _draw(self, draw: Draw) -> Tensor:
        return self.draw_from_stream(draw) if self._replacement is None else self._replacement(draw)

    # ---------------------------------------------------------------- rows of ranks

    def own_rows(self, rows: Tensor) -> Tensor:
        """Return this rank's rows of the rows `[batch, ...]` of all ranks."""
        return rows[self.rank :: self.ranks]

    def all_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, `[batch, ...]`, in the order of the whole batch; the same on each rank."""
        return rows if self.gather is None else self.gather(rows)

    # ---------------------------------------------------------------- recording, replaying, restoring

    @contextmanager
    def replaced_by(self, source: Callable[[Draw], Tensor]) -> Iterator[None]:
        """Answer every draw by `source` instead of the stream."""
        self._replacement = source
        try:
            yield
        finally:
            self._replacement = None

    @contextmanager
    def recording(self) -> Iterator[list[Draw]]:
        """Draw as usual, and yield the list that receives every draw."""
        draws: list[Draw] = []

        def record(draw: Draw) -> Tensor:
            draws.append(draw)
            return self.draw_from_stream(draw)

        with self.replaced_by(record):
            yield draws

    @contextmanager
    def replaying(self, noise: Sequence[Tensor]) -> Iterator[None]:
        """Answer the draws by `noise`, one after the other."""
        remaining = list(noise)
        with self.replaced_by(lambda draw: remaining.pop(0)):
            yield

    @contextmanager
    def independent(self, seed: int) -> Iterator[None]:
        """Draw from a stream of its own, and for all rows, as one process does; then go on as before."""
        device = self._device_anchor.device
        generator = torch.Generator(device=device).manual_seed(seed)
        ranks = self.rank, self.ranks, self.gather
        self.rank, self.ranks, self.gather = 0, 1, None
        try:
            with self.replaced_by(lambda draw: draw.distribution(*draw.shape, generator=generator, device=device)):
                yield
        finally:
            self.rank, self.ranks, self.gather = ranks

    def get_state(self) -> Tensor:
        """Return the position in the stream."""
        return self.generator.get_state()

    def set_state(self, state: Tensor) -> None:
        """Continue where `get_state` was called; the module may move to another device first."""
        self._generator, self._restored = None, state.cpu()
