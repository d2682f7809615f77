"""2-D bandits: a point is an action, its label is the reward, and the target distribution is known.

The sets of CEP, EDA and BDPO (`bandit/8gaussians`, `2spirals`, `checkerboard`, `moons`, `rings`, `swissroll`; Lu et al.
2023, arXiv 2304.12824) and of DTQL (`bandit/25gaussians-*`, `bandit/dtql-swissroll-*`; arXiv 2405.19690, Figures 3 and
6), by their authors' formulas, in their units. The names of DTQL's sets end in the reward: `-far` (distance from the
origin), `-near` (the opposite), `-hard` (like far, doubled in the upper left corner) or `-same` (0).

An episode is one terminal step, so Q(s, a) is the label of a. DTQL's authors bootstrap from the one dummy state
instead, which shifts Q by a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lit_offrl.data.sources.bandit import NAMESPACE
from lit_offrl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from lit_offrl.data.transitions import Transitions

Array = NDArray[np.float64]
Rng = np.random.Generator

# A sample farther from a mode, in standard deviations, is off the mode; so is exp(-4.5) = 1.1% of the data itself.
OFF_MODE_STDS = 3.0


@dataclass(frozen=True)
class BanditData:
    """Points and facts from their generation.

    Attributes:
        points: `[n, 2]`.
        labels: Reward of each point, `[n]`.
        modes: Index of the mode that each point was drawn from, `[n]`; 0 everywhere in a set without modes.
    """

    points: Array
    labels: Array
    modes: NDArray[np.int64]

    def target_weights(self, beta: float) -> Array:
        """Return the weight of each point under p*(x) ~ q(x) exp(beta label(x)), `[n]`, summing to 1.

        All modes have the same mass under q. Dividing by the number of points of a mode makes the weights of modes and
        the mean label exact for sets with one label per mode (8gaussians, rings, checkerboard, moons).
        """
        counts = np.bincount(self.modes)
        weights = np.exp(beta * (self.labels - self.labels.max())) / counts[self.modes]
        normalized: Array = weights / weights.sum()
        return normalized


@dataclass(frozen=True)
class Bandit:
    """One set.

    Attributes:
        generate: Draws n points.
        size: Number of points of the dataset.
        bound: Actions lie in [-bound, bound] in both dimensions, with room around the data: a tanh policy that
            saturates beside a mode would not learn to leave it.
        off_mode_distance: A sample is off-mode if it is farther than this from every center (or, in sets without
            centers, from every data point).
        mode_labels: Label of each mode, at its center if labels vary within it, `[modes]`; None in sets without modes.
        centers: Mean of each mode in sets with round modes, `[modes, 2]`.
    """

    generate: Callable[[int, Rng], BanditData]
    size: int
    bound: float
    off_mode_distance: float
    mode_labels: Array | None = None
    centers: Array | None = None

    def draw(self, n: int | None = None, seed: int = 0) -> BanditData:
        """Return `n` points, or the whole dataset, for a seed."""
        return self.generate(self.size if n is None else n, np.random.default_rng(seed))


def _without_modes(points: Array, labels: Array) -> BanditData:
    return BanditData(points, labels, np.zeros(len(points), np.int64))


# ---------------------------------------------------------------- CEP, EDA, BDPO

_ANGLES = np.pi / 2 + np.arange(8) * np.pi / 4
EIGHT_CENTERS: Array = 4 / 1.414 * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
EIGHT_STD = 0.5 / 1.414
EIGHT_LABELS: Array = np.arange(8) / 7
RING_RADII = np.array([3, 2.25, 1.5, 0.75])
RING_LABELS = np.array([0.667, 0.333, 1.0, 0.0])
SQUARE_LABELS = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])  # by columns, two squares each


def eight_gaussians(n: int, rng: Rng) -> BanditData:
    """Eight modes on a circle; the label rises with the mode's index, counterclockwise from the top."""
    modes = rng.integers(8, size=n)
    return BanditData(EIGHT_CENTERS[modes] + EIGHT_STD * rng.normal(size=(n, 2)), EIGHT_LABELS[modes], modes)


def two_spirals(n: int, rng: Rng) -> BanditData:
    """Two arms of one and a half turns, point-symmetric in pairs; the label falls with the distance along the arm."""
    half = -(-n // 2)
    r = np.sqrt(rng.random(half)) * 3 * np.pi
    arm = np.stack([-r * np.cos(r), r * np.sin(r)], axis=1) + 0.5 * rng.random((half, 2))
    points = np.concatenate([arm, -arm])[:n] / 3 + 0.1 * rng.normal(size=(n, 2))
    return _without_modes(points, np.clip(1 - np.tile(r, 2)[:n] / 10, 0, 1))


def checkerboard(n: int, rng: Rng) -> BanditData:
    """Eight squares of side 2; every second column has label 1."""
    x = rng.uniform(-2, 2, n)
    lower = rng.integers(2, size=n)
    column = np.floor(x).astype(np.int64) + 2
    points = 2 * np.stack([x, rng.random(n) - 2 * lower + column % 2], axis=1)
    modes = 2 * column + lower
    return BanditData(points, SQUARE_LABELS[modes], modes)


def moons(n: int, rng: Rng) -> BanditData:
    """Two interleaved half circles; the lower one has label 1."""
    upper, lower = (np.linspace(0, np.pi, size) for size in (n // 2, n - n // 2))
    points = np.concatenate(
        [
            np.stack([np.cos(upper), np.sin(upper)], axis=1),
            np.stack([1 - np.cos(lower), 0.5 - np.sin(lower)], axis=1),
        ]
    )
    modes = np.repeat([0, 1], [len(upper), len(lower)])
    order = rng.permutation(n)
    points = 2 * (points + 0.1 * rng.normal(size=(n, 2))) + np.array([-1, -0.2])
    return BanditData(points[order], modes[order].astype(np.float64), modes[order])


def rings(n: int, rng: Rng) -> BanditData:
    """Four concentric circles of equally spaced points, from the largest; the third one is best."""
    sizes = [n // 4] * 3 + [n - 3 * (n // 4)]
    modes = rng.permutation(np.repeat(np.arange(4), sizes))
    angles = np.empty(n)
    for mode, size in enumerate(sizes):
        angles[modes == mode] = rng.permutation(np.linspace(0, 2 * np.pi, size, endpoint=False))
    points = RING_RADII[modes, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return BanditData(points + 0.08 * rng.normal(size=(n, 2)), RING_LABELS[modes], modes)


def _roll(n: int, rng: Rng) -> Array:
    t = 1.5 * np.pi * (1 + 2 * rng.random(n))
    return np.stack([t * np.cos(t), t * np.sin(t)], axis=1)


def swiss_roll(n: int, rng: Rng) -> BanditData:
    """A spiral; the label is |x|^2 / 9 of the noisy point, at times above 1."""
    points = (_roll(n, rng) + rng.normal(size=(n, 2))) / 5
    return _without_modes(points, np.square(points).sum(axis=1) / 9)


# ---------------------------------------------------------------- DTQL

GRID_CENTERS = np.array(list(product([-10.0, -5.0, 0.0, 5.0, 10.0], repeat=2)))
GRID_STD = 0.3


def _far(points: Array) -> Array:
    distance: Array = np.hypot(points[:, 0], points[:, 1])
    return distance


def _near(points: Array) -> Array:
    distance = _far(points)
    nearness: Array = distance.max() - distance
    return nearness


def _hard(points: Array) -> Array:
    return np.where((points[:, 0] < -7.5) & (points[:, 1] > 7.5), 2, 1) * _far(points)


def _same(points: Array) -> Array:
    return np.zeros(len(points))


REWARDS: dict[str, Callable[[Array], Array]] = {"far": _far, "near": _near, "hard": _hard, "same": _same}


def grid_of_gaussians(n: int, rng: Rng, reward: Callable[[Array], Array]) -> BanditData:
    """A 5 x 5 grid of modes of equal size, one after the other."""
    modes = np.arange(n) * len(GRID_CENTERS) // n
    points = GRID_CENTERS[modes] + GRID_STD * rng.normal(size=(n, 2))
    return BanditData(points, reward(points), modes)


def large_swiss_roll(n: int, rng: Rng, reward: Callable[[Array], Array]) -> BanditData:
    """A spiral, not scaled."""
    points = _roll(n, rng) + 0.1 * rng.normal(size=(n, 2))
    return _without_modes(points, reward(points))


# ---------------------------------------------------------------- the sets by name

_small = partial(Bandit, size=100_000, bound=6.0, off_mode_distance=0.25)

BANDITS: dict[str, Bandit] = {
    "8gaussians": _small(
        eight_gaussians,
        off_mode_distance=OFF_MODE_STDS * EIGHT_STD,
        mode_labels=EIGHT_LABELS,
        centers=EIGHT_CENTERS,
    ),
    "2spirals": _small(two_spirals),
    "checkerboard": _small(checkerboard, mode_labels=SQUARE_LABELS),
    "moons": _small(moons, mode_labels=np.array([0.0, 1.0])),
    "rings": _small(rings, mode_labels=RING_LABELS),
    "swissroll": _small(swiss_roll),
    **{
        f"25gaussians-{name}": Bandit(
            partial(grid_of_gaussians, reward=reward),
            size=10_000,
            bound=16.0,
            off_mode_distance=OFF_MODE_STDS * GRID_STD,
            mode_labels=reward(GRID_CENTERS),
            centers=GRID_CENTERS,
        )
        for name, reward in REWARDS.items()
    },
    **{
        f"dtql-swissroll-{name}": Bandit(
            partial(large_swiss_roll, reward=reward), size=10_000, bound=20.0, off_mode_distance=0.5
        )
        for name, reward in REWARDS.items()
    },
}


def find_bandit(dataset: str) -> Bandit:
    """Return the set of an id, e.g. `bandit/8gaussians`.

    Raises:
        UserError: There is no such set.
    """
    name = dataset.removeprefix(NAMESPACE)
    if name not in BANDITS:
        completions = [each for each in BANDITS if each.startswith(name)]  # where only the reward is missing
        suggestion = did_you_mean(name, completions or BANDITS)
        raise UserError(f"data.dataset: no bandit '{name}'{suggestion}; there are {', '.join(BANDITS)}")
    return BANDITS[name]


def bandit_transitions(bandit: Bandit) -> Transitions:
    """Return a set as terminal episodes of one step from a dummy state 0: actions are points, rewards are labels."""
    from lit_offrl.data.transitions import Transitions  # needs torch, which `data list` must not import

    data = bandit.draw()
    n = len(data.points)
    states = np.zeros((n, 1), np.float32)
    return Transitions(
        observations=states,
        actions=data.points.astype(np.float32),
        rewards=data.labels.astype(np.float32),
        next_observations=states,
        terminals=np.ones(n, np.bool_),
        timeouts=np.zeros(n, np.bool_),
    )
