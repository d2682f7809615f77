"""Whether an exported policy acts as the policy itself does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_offrl.errors import RunFailure
from lit_offrl.export.draws import RecordedDraws
from lit_offrl.export.formats import Act
from lit_offrl.policy import Policy

STATES = 1000
TOLERANCE = 1e-5  # of half the range of the actions
ROUNDED_SHARE = 0.01  # of states where rounding may change the action of a policy that samples


@dataclass(frozen=True)
class Parity:
    """The difference between an exported policy and `Policy.act`, with the same noise.

    Attributes:
        states: Number of observations.
        max_difference: Largest difference of an action, in halves of its range (of [-1, 1], the difference itself).
        states_beyond: Observations at which the difference is more than 1e-5.
    """

    states: int
    max_difference: float
    states_beyond: int

    def __str__(self) -> str:
        beyond = f", above {TOLERANCE:g} at {self.states_beyond}" if self.states_beyond else ""
        return f"largest difference from policy.act {self.max_difference:.1e} at {self.states} states{beyond}"


def typical_observations(policy: Policy, count: int = STATES) -> Tensor:
    """Return normal observations `[count, observation_dim]` of the mean and deviation that the policy normalizes by."""
    units = policy.algorithm.units
    noise = torch.randn(count, policy.spec.observation_dim, generator=torch.Generator().manual_seed(0))
    return units.observation_mean + units.observation_std * noise


def check_parity(policy: Policy, act: Act, observations: Tensor) -> Parity:
    """Compare an exported policy with the policy.

    A deterministic policy must agree at all states. One that samples must agree at 99% of them: two candidates may be
    equally good up to rounding, and the first steps of an unclamped solver enlarge rounding errors by 1 / alpha = 150.

    Args:
        policy: The policy.
        act: The exported policy.
        observations: `[n, observation_dim]`.

    Raises:
        RunFailure: They differ.
    """
    with RecordedDraws() as mode:
        expected = policy.act(observations)
    actions = act(observations, *(noise for _, noise in mode.draws))
    half_range = torch.from_numpy(policy.spec.action_high - policy.spec.action_low) / 2
    differences = ((actions - expected) / half_range).abs().amax(1)
    parity = Parity(len(observations), float(differences.max()), int((differences > TOLERANCE).sum()))
    if parity.states_beyond > (ROUNDED_SHARE * parity.states if mode.draws else 0):
        raise RunFailure(f"export: the file does not act as the policy does ({parity}): nothing was written")
    return parity
