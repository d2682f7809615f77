"""Reward rules: how training transforms the recorded rewards. Evaluation always reports recorded returns."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import UserError, did_you_mean

RewardRule = Callable[[Transitions], NDArray[np.float32]]
AFFINE = "affine"


def _affine(scale: float, bias: float) -> RewardRule:
    return lambda transitions: transitions.rewards * np.float32(scale) + np.float32(bias)


def _return_range(transitions: Transitions) -> NDArray[np.float32]:
    returns = transitions.episode_returns()
    span = returns.max() - returns.min()
    if span == 0:
        raise UserError(
            f"data.reward: return_range divides by the range of the episodes' returns, but all are {returns[0]:g}; "
            "use raw or standardize"
        )
    return transitions.rewards * np.float32(1000 / span)


def _standardize(transitions: Transitions) -> NDArray[np.float32]:
    rewards = transitions.rewards
    std = rewards.std(dtype=np.float64)
    if std == 0:
        raise UserError(
            f"data.reward: standardize divides by the deviation of the rewards, but all are {rewards[0]:g}; use raw"
        )
    standardized: NDArray[np.float32] = ((rewards - rewards.mean(dtype=np.float64)) / std).astype(np.float32)
    return standardized


REWARD_RULES: dict[str, RewardRule] = {
    "raw": _affine(1, 0),
    "minus_one": _affine(1, -1),  # sparse mazes in IQL and DTQL: -1 per step, 0 at the goal
    "cql_antmaze": _affine(4, -2),  # 4 (r - 0.5): sparse mazes in CQL and EDA
    "times_100": _affine(100, 0),
    "sparse": lambda transitions: np.where(transitions.rewards == 0, 0, -1).astype(np.float32),  # OGBench in QC
    "return_range": _return_range,  # r * 1000 / (largest - smallest return): locomotion in IQL
    "standardize": _standardize,  # mean 0, deviation 1
}


def reward_rule(name: str) -> RewardRule:
    """Return the rule of this name, or `r * SCALE + BIAS` for `affine:SCALE:BIAS`.

    Raises:
        UserError: There is no rule of this name, or scale or bias is no number that a reward can have.
    """
    kind, *numbers = name.split(":")
    if kind == AFFINE:
        try:
            scale, bias = (float(number) for number in numbers)
        except ValueError:
            raise UserError(f"data.reward: '{name}' is not affine:SCALE:BIAS, e.g. affine:5:-1") from None
        if not (math.isfinite(scale) and math.isfinite(bias) and scale):
            raise UserError(f"data.reward: '{name}' needs a finite scale other than 0 and a finite bias")
        return _affine(scale, bias)
    if name not in REWARD_RULES:
        raise UserError(
            f"data.reward: no rule '{name}'{did_you_mean(name, REWARD_RULES)}; "
            f"there are {', '.join(REWARD_RULES)}, {AFFINE}:SCALE:BIAS"
        )
    return REWARD_RULES[name]
