"""Flow models of the behavior and the one-step policy that is distilled from one: what FQL, IFQL and QC share."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lit_offrl.algorithms.acting import Units
from lit_offrl.algorithms.loop import Info
from lit_offrl.algorithms.noise import NoiseStream
from lit_offrl.diffusion.flow import interpolate, sample_euler
from lit_offrl.networks.critics import EnsembleQ, ValueNetwork
from lit_offrl.networks.mlp import tanh_gelu, xavier_uniform_

LAYERS = 4  # hidden layers of all networks

Aggregation = Literal["mean", "min"]


def aggregate(q: Tensor, by: Aggregation) -> Tensor:
    """Return the mean or the minimum over the members of `q` `[members, ...]`."""
    return q.mean(0) if by == "mean" else q.amin(0)


def make_q(observation_dim: int, action_dim: int, hidden_dim: int) -> EnsembleQ:
    """Return two Q networks: GELU, then LayerNorm; Glorot initialization."""
    hidden = (hidden_dim,) * LAYERS
    q = EnsembleQ(observation_dim, action_dim, hidden, norm_last=True, activation=tanh_gelu)
    xavier_uniform_(q)
    return q


def make_v(observation_dim: int, hidden_dim: int) -> ValueNetwork:
    """Return a value network of the same kind."""
    v = ValueNetwork(observation_dim, (hidden_dim,) * LAYERS, tanh_gelu, layer_norm=True, norm_last=True)
    xavier_uniform_(v)
    return v


def flow_loss(
    field: nn.Module, observations: Tensor, actions: Tensor, stream: NoiseStream, mask: Tensor | None = None
) -> tuple[Tensor, Info]:
    """Return E[ (v(x_t, t, s) - (a - x_0))^2 ], a mean over batch and dimensions, and what to log.

    Even the best field has a loss: for actions of a normal distribution of deviation s it is pi s / 2.

    Args:
        field: v, see `VelocityField`.
        observations: `[batch, observation_dim]`.
        actions: Actions or chunks of actions, `[batch, dim]`.
        stream: Where x_0 and t come from.
        mask: Weight of each number, `[batch, dim]`; the mean still counts all numbers.
    """
    noise, time = stream.normal(*actions.shape), stream.uniform(len(actions))
    x, velocity = interpolate(noise, actions, time)
    errors = (field(x, time, observations) - velocity).square()
    loss = (errors if mask is None else mask * errors).mean()
    return loss, {"flow_loss": loss.detach()}


def sample_flow(field: nn.Module, observations: Tensor, noise: Tensor, steps: int, units: Units) -> Tensor:
    """Return the actions to which a flow carries `noise` `[batch, ..., dim]`; clamped to the box at the end only."""
    return units.clamp(sample_euler(lambda x, time: field(x, time, observations), noise, steps))


def one_step_loss(
    policy: nn.Module,
    q: nn.Module,
    observations: Tensor,
    noise: Tensor,
    flow_actions: Tensor,
    alpha: float,
    units: Units,
    stream: NoiseStream | None = None,
) -> tuple[Tensor, Info]:
    """Return E[ alpha (mu(s, z) - a_flow(s, z))^2 - mean_i Q_i(s, mu(s, z)) ] and what to log (FQL).

    The square is a mean over dimensions. Q sees the clamped action, the square the one that is not: beyond the box Q
    has no gradient, and the flow draws the action back.

    Args:
        policy: mu, see `NoiseToAction`.
        q: Maps observations and actions to `[members, batch]`.
        observations: `[batch, observation_dim]`.
        noise: z, `[batch, dim]`.
        flow_actions: The actions to which the flow carries the same z, `[batch, dim]`.
        alpha: Weight of the distance.
        units: Knows the box.
        stream: Knows the rows of all ranks, over which |mean_i Q_i| is averaged to divide Q by; None for Q as it is.
    """
    actions = policy(observations, noise)
    distance = (actions - flow_actions).square().mean()
    values = q(observations, units.clamp(actions)).mean(0)
    improvement = values.mean()
    if stream is not None:
        improvement = improvement / stream.all_rows(values.detach()).abs().mean()
    loss = alpha * distance - improvement
    info = {"policy_loss": loss.detach(), "distance": distance.detach(), "policy_q": values.detach().mean()}
    return loss, info
