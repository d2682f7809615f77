"""The critic of implicit Q-learning (Kostrikov, Nair and Levine, 2022, arXiv 2110.06169), which several papers share.

Free functions: which networks there are, and when targets follow, is each algorithm's own affair.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Info
from lit_offrl.batch import Batch


def expectile_loss(residual: Tensor, expectile: float) -> Tensor:
    """Return the mean of |tau - 1(u < 0)| u^2 over the residuals u, for the expectile tau (Eqs. 3 and 5)."""
    weight = torch.where(residual > 0, expectile, 1 - expectile)
    return (weight * residual.square()).mean()


def bootstrapped(batch: Batch, next_values: Tensor, discount: float) -> Tensor:
    """Return r + discount V(s'), without V where the episode ended in a terminal state (Eq. 6), `[batch]`."""
    return batch.rewards + discount * (1 - batch.terminals) * next_values


def critic_loss(
    q: nn.Module, v: nn.Module, target_q: nn.Module, batch: Batch, expectile: float, discount: float
) -> tuple[Tensor, Info]:
    """Return the sum of V's loss and Q's, each from the weights before the step.

        L_V = E[ L_tau( min_i Q'_i(s, a) - V(s) ) ]                                                          (Eq. 5)
        L_Q = mean_i E[ (r + discount V(s') - Q_i(s, a))^2 ]                                                 (Eq. 6)

    Args:
        q: Maps observations and actions to `[members, batch]`.
        v: Maps observations to `[batch]`.
        target_q: Slowly following copy Q' of `q`.
        batch: Transitions.
        expectile: tau.
        discount: Discount factor.
    """
    with torch.no_grad():
        best = target_q(batch.observations, batch.actions).amin(0)
        goal = bootstrapped(batch, v(batch.next_observations), discount)
    values, state_values = q(batch.observations, batch.actions), v(batch.observations)
    v_loss = expectile_loss(best - state_values, expectile)
    q_loss = (values - goal).square().mean()
    return v_loss + q_loss, {
        "v_loss": v_loss.detach(),
        "q_loss": q_loss.detach(),
        "v_mean": state_values.detach().mean(),
        "q_mean": values.detach().mean(),
    }
