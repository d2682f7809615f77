"""Facts about a table of transitions for `data info` and `data check`."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_offrl.data.transitions import Transitions

LARGEST_REWARD = 1e4  # far above what a step pays in the benchmarks; a squared error of such values rules a loss
_USUAL_RULES = (  # dataset ids of a family, the reward rule that the papers train with
    (re.compile("ogbench/"), "raw"),  # already -1 per step, or per part that is not solved, and 0 when all is solved
    (re.compile("maze"), "minus_one"),
    (re.compile("hopper|halfcheetah|walker2d"), "return_range"),
)


def usual_reward_rule(dataset: str) -> str:
    """Return the reward rule of IQL and later papers for datasets of this family."""
    return next((rule for pattern, rule in _USUAL_RULES if pattern.search(dataset)), "raw")


def findings(transitions: Transitions, action_bounds: tuple[ArrayLike, ArrayLike] | None = None) -> Iterator[str]:
    """Yield a line for everything that looks wrong, with the consequence for training.

    `Transitions` has already refused broken tables (NaN, wrong shapes).

    Args:
        transitions: The table.
        action_bounds: Lowest and highest action, numbers or `[action_dim]`; None for -1 and 1.
    """
    ends = transitions.episode_ends
    yield from clipped_actions(transitions, action_bounds)
    largest = float(np.abs(transitions.rewards).max())
    if largest > LARGEST_REWARD:
        yield (
            f"rewards reach {largest:.3g}: values of this size train badly; scale them, e.g. --data.reward standardize "
            f"or affine:{1 / largest:.0e}:0"
        )
    # In a bandit every step is terminal and there is one state; constant observations are expected there.
    bandit = transitions.terminals.all() and not np.ptp(transitions.observations, axis=0).any()
    for name, table in (("observation", transitions.observations), ("action", transitions.actions)):
        constant = np.flatnonzero(np.ptp(table, axis=0) == 0)
        if len(constant) and not (bandit and name == "observation"):
            yield f"{name} dimensions {constant.tolist()} are constant: harmless, but nothing is learned from them"
    if not transitions.terminals.any():
        yield "no transition is terminal: values bootstrap through every episode's end"
    if len(transitions.episode_starts) == 1:
        yield "the whole table is one episode: mark its cuts with 'timeouts' if it is not"
    if np.ptp(transitions.rewards) == 0:
        yield f"every reward is {transitions.rewards[0]:g}: nothing distinguishes good from bad"
    single = ends & np.concatenate([[True], ends[:-1]])
    if single.any() and not bandit:
        yield f"episodes of one step: {_count(single)}; are 'timeouts' marked twice? They are kept"
    successors = transitions.next_observations[:-1] == transitions.observations[1:]
    jumps = np.append(~ends[:-1] & ~successors.all(axis=1), False)
    if jumps.any():
        yield f"jumps to an observation that did not follow: {_count(jumps)}; is an episode's end not marked there?"
    frozen = (transitions.next_observations == transitions.observations).all(axis=1) & ~transitions.terminals
    if frozen.any():
        yield f"standing still: {_count(frozen)}; was the last observation of an episode stored twice?"


def clipped_actions(
    transitions: Transitions, action_bounds: tuple[ArrayLike, ArrayLike] | None = None
) -> Iterator[str]:
    """Yield a line if actions lie outside of the bounds; see `findings`."""
    actions = transitions.actions
    low, high = (np.asarray(bound, np.float32) for bound in action_bounds or (-1, 1))
    outside = (np.maximum(low - actions, actions - high) > 1e-4 * (high - low)).any(axis=1)
    if outside.any():
        yield (
            f"actions outside [{low.min():g}, {high.max():g}] in {_count(outside)}, from {actions.min():.3g} to "
            f"{actions.max():.3g}: they are clipped; give the environment's own bounds with --data.action_bounds"
        )


def _count(rows: NDArray[np.bool_]) -> str:
    return f"{int(rows.sum()):,} of {len(rows):,} transitions (first: {int(np.argmax(rows))})"


def histogram(values: NDArray[np.floating], bins: int = 10, width: int = 40) -> Iterator[str]:
    """Yield the lines of a histogram for the terminal."""
    counts, edges = np.histogram(values, bins=bins)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * round(width * count / max(counts.max(), 1))
        yield f"{low:10.3g} .. {high:10.3g}  {count:7d}  {bar}"
