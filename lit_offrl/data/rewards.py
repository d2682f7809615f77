"""Reward rules by name: what the learner sees of the recorded rewards. Evaluation always reports raw returns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import UserError, did_you_mean


def _raw(transitions: Transitions) -> NDArray[np.float32]:
    return transitions.rewards


def _minus_one(transitions: Transitions) -> NDArray[np.float32]:
    return transitions.rewards - np.float32(1)


REWARD_RULES: dict[str, Callable[[Transitions], NDArray[np.float32]]] = {
    "raw": _raw,
    "minus_one": _minus_one,  # sparse mazes in IQL, DTQL: -1 per step, 0 at the goal
}


def check_rule(rule: str) -> None:
    """Raise `UserError` if there is no reward rule of this name."""
    if rule not in REWARD_RULES:
        raise UserError(
            f"data.reward: no rule '{rule}'{did_you_mean(rule, REWARD_RULES)}; there are {', '.join(REWARD_RULES)}"
        )


def shaped_rewards(transitions: Transitions, rule: str) -> NDArray[np.float32]:
    """Return the rewards `[n]` that the rule of this name makes of the recorded ones.

    Raises:
        UserError: There is no such rule.
    """
    check_rule(rule)
    return REWARD_RULES[rule](transitions)
