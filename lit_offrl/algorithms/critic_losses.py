"""Critic losses that several papers share, as free functions of networks that each algorithm owns."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.loop import Info
from lit_offrl.batch import Batch


def expectile_loss(residual: Tensor, expectile: float) -> Tensor:
    """Return the mean of |tau - 1(u < 0)| u^2 over the residuals u, for the expectile tau (IQL, Eqs. 3 and 5)."""
    weight = torch.where(residual > 0, expectile, 1 - expectile)
    return (weight * residual.square()).mean()


def bootstrapped(batch: Batch, next_values: Tensor, discount: float) -> Tensor:
    """Return r + discount V(s'), without V where the episode ended in a terminal state, `[batch]`."""
    return batch.rewards + discount * (1 - batch.terminals) * next_values


def ensemble_loss(q: Tensor, goal: Tensor) -> Tensor:
    """Return the sum over the members of the mean squared errors of `q` `[members, batch]` to `goal` `[batch]`."""
    return (q - goal).square().mean(1).sum()


def lower_confidence_bound(values: Tensor, rho: float) -> Tensor:
    """Return the mean less `rho` biased deviations over the members of `values` `[members, ...]` (BDPO, Eq. 17)."""
    mean = values.mean(0)
    return mean - rho * values.std(0, correction=0) if rho else mean


def advantage_weights(advantages: Tensor, temperature: float, largest: float = 100.0) -> Tensor:
    """Return min(exp(temperature * advantage), largest), without gradients: weights of a policy regression (AWR)."""
    return (temperature * advantages.detach()).clamp_max(math.log(largest)).exp()


def implicit_v_loss(v: nn.Module, target_q: nn.Module, batch: Batch, expectile: float) -> tuple[Tensor, Info]:
    """Return E[ L_tau( min_i Q'_i(s, a) - V(s) ) ] and what to log (IQL, Eq. 5); see `implicit_q_loss`."""
    with torch.no_grad():
        best = target_q(batch.observations, batch.actions).amin(0)
    values = v(batch.observations)
    loss = expectile_loss(best - values, expectile)
    return loss, {"v_loss": loss.detach(), "v_mean": values.detach().mean()}


def implicit_target_loss(q: nn.Module, v: nn.Module, batch: Batch, discount: float) -> tuple[Tensor, Info]:
    """Return mean_i E[ (r + discount V(s') - Q_i(s, a))^2 ] and what to log (IQL, Eq. 6); see `implicit_q_loss`."""
    with torch.no_grad():
        goal = bootstrapped(batch, v(batch.next_observations), discount)
    values = q(batch.observations, batch.actions)
    loss = (values - goal).square().mean()
    return loss, {"q_loss": loss.detach(), "q_mean": values.detach().mean()}


def implicit_q_loss(
    q: nn.Module, v: nn.Module, target_q: nn.Module, batch: Batch, expectile: float, discount: float
) -> tuple[Tensor, Info]:
    """Return the sum of V's loss and Q's, each from the weights before the step, and what to log.

    Implicit Q-learning (Kostrikov, Nair and Levine, 2022, arXiv 2110.06169).

    Args:
        q: Maps observations and actions to `[members, batch]`.
        v: Maps observations to `[batch]`.
        target_q: Target network Q' of `q`.
        batch: Transitions.
        expectile: tau.
        discount: Discount factor.
    """
    q_loss, q_info = implicit_target_loss(q, v, batch, discount)
    v_loss, v_info = implicit_v_loss(v, target_q, batch, expectile)
    return v_loss + q_loss, {**v_info, **q_info}


def in_support_value(q: Tensor, beta: float) -> Tensor:
    """Return sum_k softmax_k(beta Q_k) Q_k, `[batch]`, of `[batch, K]`: E[Q] under mu exp(beta Q) (QGPO)."""
    return ((beta * q).softmax(-1) * q).sum(-1)


def in_support_q_loss(
    q: nn.Module, target_q: nn.Module, batch: Batch, next_actions: Tensor, beta: float, discount: float
) -> tuple[Tensor, Tensor]:
    """Return the loss of Q with the softmax backup over behavior actions, and Q of the data, `[members, batch]`.

        L_Q = mean_i E[ ( r + discount sum_k softmax_k(beta Q'(s', a'_k)) Q'(s', a'_k) - Q_i(s, a) )^2 ]     (QGPO)

    Q' is the smaller target Q.

    Args:
        q: See `implicit_q_loss`.
        target_q: See `implicit_q_loss`.
        batch: Transitions.
        next_actions: Behavior actions a'_k at the next observations, `[batch, K, action_dim]`.
        beta: Inverse temperature.
        discount: Discount factor.
    """
    with torch.no_grad():
        next_q = target_q(batch.next_observations[:, None], next_actions).amin(0)
        goal = bootstrapped(batch, in_support_value(next_q, beta), discount)
    values: Tensor = q(batch.observations, batch.actions)
    return (values - goal).square().mean(), values


def conservative_penalty(q_data: Tensor, q_others: Tensor) -> Tensor:
    """Return log(exp Q(s, a) + sum_j exp Q(s, a_j)) - Q(s, a), `[members, batch]` (CQL, Kumar et al. 2020, Eq. 4).

    The log-sum-exp is over the data action and others, unweighted: the second version in CQL's code. Never negative.

    Args:
        q_data: Q at the data actions, `[members, batch]`.
        q_others: Q at other actions of the same states, `[members, batch, actions]`.
    """
    return torch.cat([q_others, q_data[..., None]], dim=-1).logsumexp(-1) - q_data
