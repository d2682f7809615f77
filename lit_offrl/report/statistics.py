"""Statistics over seeds and datasets, after Agarwal et al. (2021), "Deep RL at the Edge of the Statistical Precipice".

The scores of one algorithm are a sequence of arrays, one array per dataset ("task") and one score per seed. Intervals
are percentile intervals of a stratified bootstrap, which draws seeds with replacement within each task. An interval
needs at least 2 seeds in every task and is None otherwise. The random seed is fixed: the same scores give the same
interval.

The authors' package rliable is not used: it needs the same number of seeds in every task.

The curve of policy selection is that of Jackson et al. (2025), "A Clean Slate for Offline RL" (arXiv 2504.11453).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 10_000
PICTURE_RESAMPLES = 1_000  # for bands, whose edges move by less than a line is wide
COVERAGE = 0.95
SEED = 0
SELECTIONS = 1000  # draws of policies and of their episodes
EXPLORATION = 2.0  # of the UCB bandit, as in the authors' code


def interquartile_mean(scores: Array) -> Array:
    """Return the mean along the last axis without the floor(n/4) lowest and the floor(n/4) highest of n scores."""
    n = scores.shape[-1]
    return np.asarray(np.sort(scores, axis=-1)[..., n // 4 : n - n // 4].mean(axis=-1))


def mean(scores: Array) -> Array:
    """Return the mean along the last axis."""
    return np.asarray(scores.mean(axis=-1))


def bootstrap_interval(tasks: Sequence[Array], statistic: Callable[[Array], Array]) -> Interval | None:
    """Return the interval of a statistic of the scores of all tasks together.

    Args:
        tasks: Scores by task.
        statistic: Reduces the last axis, `[..., n] -> [...]`.
    """
    if not _have_several_seeds(tasks):
        return None
    drawn = [task[seeds] for task, seeds in zip(tasks, _drawn_seeds(*map(len, tasks)), strict=True)]
    low, high = _interval(statistic(np.concatenate(drawn, axis=1)))
    return float(low), float(high)


def intervals_of_means(scores: Array) -> Array | None:
    """Return the interval of the mean along the last axis, `[k, n] -> [2, k]`; None for fewer than 2 seeds.

    All k means are of the same resampled seeds, e.g. the evaluations of a learning curve; it is for pictures.
    """
    n = scores.shape[-1]
    if n < 2:
        return None
    (weights,) = _resampling_weights(n)
    return _interval(weights[:PICTURE_RESAMPLES] @ scores.T)


@dataclass(frozen=True)
class Summary:
    """Statistics of the scores of one algorithm on one task, one per seed; None where they need more than one seed.

    Attributes:
        std: Sample standard deviation over seeds (divisor n - 1).
        standard_error: std / sqrt(n).
        iqm: Interquartile mean.
        interval: 95% bootstrap interval of the interquartile mean.
        seeds: Number of seeds n.
    """

    mean: float
    std: float | None
    standard_error: float | None
    iqm: float
    interval: Interval | None
    seeds: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> Summary:
        """Summarize scores, one per seed."""
        values = np.asarray(scores, dtype=np.float64)
        n = len(values)
        std = float(values.std(ddof=1)) if n > 1 else None
        return cls(
            mean=float(values.mean()),
            std=std,
            standard_error=None if std is None else std / n**0.5,
            iqm=float(interquartile_mean(values)),
            interval=bootstrap_interval([values], interquartile_mean),
            seeds=n,
        )


def performance_profile(tasks: Sequence[Array], thresholds: Array) -> tuple[Array, Array | None]:
    """Return the share of runs that score above each threshold, `[thresholds]`, and its interval, `[2, thresholds]`.

    The share is computed per task and averaged over tasks, so that every task counts the same.
    """
    above = [(task[:, None] > thresholds).astype(np.float64) for task in tasks]
    share = np.mean([each.mean(axis=0) for each in above], axis=0)
    if not _have_several_seeds(tasks):
        return share, None
    weights = np.concatenate(_resampling_weights(*map(len, tasks)), axis=1)[:PICTURE_RESAMPLES]
    return share, _interval(weights @ np.concatenate(above) / len(tasks))


def probability_of_improvement(x: Sequence[Array], y: Sequence[Array]) -> tuple[float, Interval | None]:
    """Return the probability P(X > Y) that a run of x scores higher than a run of y on the same task, and its interval.

    It is the share of pairs of seeds in which x scores higher (a tie counts half), averaged over tasks (Mann-Whitney).

    Args:
        x: Scores of one algorithm, by task.
        y: Scores of the other algorithm on the same tasks in the same order; the numbers of seeds may differ.
    """
    # [seeds of x, seeds of y] per task: 1 where x scores higher, 1/2 for a tie
    wins = [(a[:, None] > b) + 0.5 * (a[:, None] == b) for a, b in zip(x, y, strict=True)]
    probability = float(np.mean([each.mean() for each in wins]))
    if not (_have_several_seeds(x) and _have_several_seeds(y)):
        return probability, None
    weights = _resampling_weights(*(n for each in wins for n in each.shape))
    drawn = [
        np.einsum("rj,rj->r", left @ each, right)
        for each, left, right in zip(wins, weights[::2], weights[1::2], strict=True)
    ]
    low, high = _interval(np.mean(drawn, axis=0))
    return probability, (float(low), float(high))


def expected_best(scores: Array, k: int) -> float:
    """Return the expected maximum of `k` of the n scores `[n]`, drawn without replacement."""
    n = len(scores)
    # The (i + 1)-th lowest is the maximum if the other k - 1 are among the i that are lower.
    weights = np.array([comb(i, k - 1) / comb(n, k) for i in range(n)])
    return float(np.sort(scores) @ weights)


def selection_curve(policies: Sequence[Array], k: int, budget: int) -> tuple[Array, Array]:
    """Return the score of the best of `k` policies, chosen by online evaluation, after 1, ..., `budget` episodes.

    Each draw takes `k` of the policies, without replacement. A UCB bandit plays one episode after the other, and the
    policy of the highest mean so far is the choice; its score is the mean of all its episodes. The authors give the
    bandit's bonus in units of the score; here it is in units of the range of all episodes, so that it depends on no
    scale.

    Args:
        policies: Scores of the episodes of each policy; a played episode is drawn from them with replacement.
        k: Number of policies to choose from.
        budget: Largest number of episodes, over all of the `k` policies.

    Returns:
        Mean over the draws, `[budget]`, and the interval that holds 95% of them, `[2, budget]`.
    """
    rng = np.random.default_rng(SEED)
    lengths = np.array([len(each) for each in policies])
    episodes = np.array([np.resize(each, lengths.max()) for each in policies])  # what is beyond the length is not drawn
    means = np.array([each.mean() for each in policies])
    span = np.ptp(np.concatenate(policies))
    rows = np.arange(SELECTIONS)
    arms = rng.random((SELECTIONS, len(policies))).argsort(axis=1)[:, :k]  # in random order, which breaks ties
    counts, sums = np.zeros((2, SELECTIONS, k))
    chosen = np.empty((SELECTIONS, budget))
    for played in range(budget):
        with np.errstate(divide="ignore", invalid="ignore"):
            bonus = span * np.sqrt(EXPLORATION * np.log(played + 1) / counts)
            arm = np.where(counts > 0, sums / counts + bonus, np.inf).argmax(axis=1)
        policy = arms[rows, arm]
        counts[rows, arm] += 1
        sums[rows, arm] += episodes[policy, (rng.random(SELECTIONS) * lengths[policy]).astype(np.int64)]
        best = np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf).argmax(axis=1)
        chosen[:, played] = means[arms[rows, best]]
    return chosen.mean(axis=0), _interval(chosen)


def _have_several_seeds(tasks: Sequence[Array]) -> bool:
    return bool(tasks) and all(len(task) > 1 for task in tasks)


# Cached: the rows and pairs of a report mostly have the same numbers of seeds, and drawing takes longest.
@lru_cache(maxsize=8)
def _drawn_seeds(*seeds: int) -> list[NDArray[np.int64]]:
    """Return the seeds drawn for each task, `[RESAMPLES, n]` of n."""
    rng = np.random.default_rng(SEED)
    return [rng.integers(n, size=(RESAMPLES, n)) for n in seeds]


@lru_cache(maxsize=8)
def _resampling_weights(*seeds: int) -> list[Array]:
    """Return the share of draws of each of n seeds per task, `[RESAMPLES, n]`; times the scores: the resampled mean."""
    rng = np.random.default_rng(SEED)
    return [np.asarray(rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n) for n in seeds]


def _interval(drawn: Array) -> Array:
    tail = (1 - COVERAGE) / 2
    return np.asarray(np.quantile(drawn, [tail, 1 - tail], axis=0))
