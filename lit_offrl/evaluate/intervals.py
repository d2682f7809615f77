"""Bootstrap intervals of a mean over episodes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
RESAMPLES_AT_A_TIME = 100  # to save memory where there are many episodes
COVERAGE = 0.95


def interval_of_mean(values: NDArray[np.floating], seed: int = 0) -> tuple[float, float] | None:
    """Return the 95% percentile interval of the mean over episodes, drawn with replacement; None for a single one.

    Args:
        values: One per episode, `[episodes]`.
        seed: Seed of the draws.
    """
    n = len(values)
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    rounds = range(RESAMPLES // RESAMPLES_AT_A_TIME)
    means = [values[rng.integers(n, size=(RESAMPLES_AT_A_TIME, n))].mean(axis=1) for _ in rounds]
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
