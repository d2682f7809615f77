"""Behavior actions at the states of a dataset, and the critics that learn from them (QGPO's backup, CQL's penalty)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.critic_losses import conservative_penalty, implicit_q_loss, in_support_q_loss
from lit_offrl.algorithms.loop import Info
from lit_offrl.algorithms.noise import NoiseStream
from lit_offrl.algorithms.options import SupportedCritic
from lit_offrl.algorithms.vp_diffusion import SAMPLED_AT_ONCE, for_all_rows
from lit_offrl.batch import Batch

if TYPE_CHECKING:
    from lit_offrl.algorithms.base import OfflineAlgorithm

SUPPORT_STREAM = 2_000_003  # added to the seed: support actions must not repeat the noise of the training
NEXT_SUPPORT_STREAM = 3_000_017


class Support(NamedTuple):
    """Behavior actions at every transition of the dataset, or of a batch, for critics that need them.

    Attributes:
        actions: At its observation, `[n, K, action_dim]`; None where they are not needed.
        next_actions: At its next observation, `[n, K, action_dim]`.
    """

    actions: Tensor | None
    next_actions: Tensor

    def of(self, batch: Batch) -> Support:
        """Return the behavior actions at the transitions of a batch."""
        assert batch.rows is not None
        return Support(None if self.actions is None else self.actions[batch.rows], self.next_actions[batch.rows])


class SampleBehavior(Protocol):
    """Samples `count` actions of the behavior model at each of `[batch, observation_dim]`."""

    def __call__(self, observations: Tensor, *, count: int, generator: torch.Generator | None) -> Tensor: ...  # noqa: D102


def make_support(algorithm: OfflineAlgorithm, sample: SampleBehavior, count: int, *, everywhere: bool) -> Support:
    """Sample behavior actions at all transitions of the dataset that an algorithm trains on.

    They are a function of the seed and of the behavior model alone: a resumed run, whose checkpoint has no room for
    them, samples the same again.

    Args:
        algorithm: Knows the dataset and the seed.
        sample: Its behavior model.
        count: Actions K at each observation.
        everywhere: Whether actions are needed at observations, too, not only at next ones.
    """
    observations, next_observations = algorithm.dataset_observations, algorithm.dataset_next_observations
    assert observations is not None, "support actions need the observations of a dataset"
    assert next_observations is not None

    def at(states: Tensor, stream: int, description: str) -> Tensor:
        generator = torch.Generator(states.device).manual_seed(algorithm.seed + stream)
        rows_at_once = SAMPLED_AT_ONCE // count
        with torch.no_grad():
            return for_all_rows(
                lambda rows: sample(rows, count=count, generator=generator),
                states,
                rows_at_once,
                description,
                show_progress=algorithm.shows_progress,
            )

    actions = at(observations, SUPPORT_STREAM, "support actions") if everywhere else None
    return Support(actions, at(next_observations, NEXT_SUPPORT_STREAM, "next support actions"))


def actions_of_the_batch(batch: Batch, noise: NoiseStream, count: int) -> Tensor:
    """Return `count` actions for each transition of a batch without observations, `[batch, count, action_dim]`.

    On 2-D sets all data actions are actions at the same state: a transition's are its own and those of the transitions
    after it in the batch, over all ranks.
    """
    actions = noise.all_rows(batch.actions)
    order = torch.arange(len(actions), device=actions.device)
    return actions[(noise.own_rows(order)[:, None] + order[:count]) % len(actions)]


def supported_q_loss(
    critic: Mapping[str, nn.Module] | nn.ModuleDict,
    target_q: nn.Module,
    batch: Batch,
    support: Support | None,
    options: SupportedCritic,
    beta: float,
    noise: NoiseStream,
    limit: Tensor | float,
) -> tuple[Tensor, Info]:
    """Return the loss of a critic by its kind: IQL, the softmax backup over behavior actions, or that backup and CQL.

    Args:
        critic: The networks `q` and, for IQL, `v`.
        target_q: Target network of `q`.
        batch: Transitions.
        support: Behavior actions at the batch; None for IQL.
        options: Kind and settings.
        beta: Inverse temperature of the backup where `options` has none.
        noise: Where the uniform actions of CQL's penalty come from.
        limit: Largest absolute action.
    """
    q = critic["q"]
    if options.kind == "implicit":
        return implicit_q_loss(q, critic["v"], target_q, batch, options.expectile, options.discount)
    assert support is not None
    beta = beta if options.backup_beta is None else options.backup_beta
    loss, values = in_support_q_loss(q, target_q, batch, support.next_actions, beta, options.discount)
    info = {"q_loss": loss.detach(), "q_mean": values.detach().mean()}
    if options.kind == "conservative":
        assert support.actions is not None
        uniform = limit * (2 * noise.uniform(*support.actions.shape) - 1)  # as many as support actions
        others = q(batch.observations[:, None], torch.cat([support.actions, uniform], dim=1))
        penalty = conservative_penalty(values, others).mean()
        loss = loss + options.conservatism * penalty
        info["penalty"] = penalty.detach()
    return loss, info
