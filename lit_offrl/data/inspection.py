"""What `data info` and `data check` say about a table of transitions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lit_offrl.data.transitions import Transitions


def findings(transitions: Transitions) -> Iterator[str]:
    """Yield a line for everything that looks wrong, and what training does about it.

    Broken tables (NaN, shapes) do not get this far: `Transitions` refuses them.
    """
    outside = np.abs(transitions.actions) > 1 + 1e-4
    if outside.any():
        rows = int(outside.any(axis=1).sum())
        largest = float(np.abs(transitions.actions).max())
        yield f"{rows} transitions have actions outside [-1, 1] (largest {largest:.3g}): they are clipped"
    constant = np.flatnonzero(np.ptp(transitions.observations, axis=0) == 0)
    if len(constant):
        yield f"observation dimensions {constant.tolist()} are constant: harmless, but useless"
    if not transitions.terminals.any():
        yield "no transition is terminal: values bootstrap through every episode's end"
    if np.ptp(transitions.rewards) == 0:
        yield f"every reward is {transitions.rewards[0]:g}: nothing distinguishes good from bad"
    ends = transitions.episode_ends
    jumps = ~ends[:-1] & (transitions.next_observations[:-1] != transitions.observations[1:]).any(axis=1)
    if jumps.any():
        first = int(np.flatnonzero(jumps)[0])
        yield f"{int(jumps.sum())} transitions do not lead to the next one's observation (first: {first})"


def histogram(values: NDArray[np.floating], bins: int = 10, width: int = 40) -> Iterator[str]:
    """Yield the lines of a histogram for the terminal."""
    counts, edges = np.histogram(values, bins=bins)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * round(width * count / max(counts.max(), 1))
        yield f"{low:10.3g} .. {high:10.3g}  {count:7d}  {bar}"
