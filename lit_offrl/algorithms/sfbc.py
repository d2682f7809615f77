"""Selecting from Behavior Candidates (Chen, Lu, Ying, Su and Zhu, 2023, arXiv 2209.14548).

What the authors' code decides, and what we do:

1. A planned return is max(r + discount R_next, V(s)), where R_next is 0 at the end of an episode, also at a time limit.
   V is that of the critic of the round before. So V(s) is a lower bound for every action that the data took at s.
2. There are two rounds. Before the second the critic's weights and its optimizer start again as they did.
3. The critic sees returns standardized over the dataset, anew in each round, with a deviation of at least 0.1. The two
   inverse temperatures, 20 in planning and 100 in acting, belong to standardized values.
4. Acting draws `average_of` of 32 candidates without replacement and takes their mean; logits are capped at 40 above
   the last of so many largest, so that as many have a probability above 0.
5. Behavior actions of the planning are sampled once at each state. Ours are sampled again in each round, from the same
   noise: they are the same.

Ours differs in some details. The solver is DPM-Solver++ of order 2 in 15 evaluations, in the code it is DPM-Solver of
order 3. The behavior model is trained on times from 1e-3, where sampling ends, in the code from 1e-5. Times of a batch
are stratified, and the random frequencies of the time features are quantiles of their distribution. Rewards are those
of the data module's rule, in the code raw. The code's repairs of AntMaze data are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Actor, Info, OfflineAlgorithm, OptimizerSpec, Phase, frozen_copy
from lit_offrl.algorithms.critic_losses import in_support_value
from lit_offrl.algorithms.energy_guided import check_width, sample_behavior
from lit_offrl.algorithms.options import DiffusionOptions
from lit_offrl.algorithms.support import SUPPORT_STREAM
from lit_offrl.algorithms.vp_diffusion import SAMPLED_AT_ONCE, VPDiffusion, for_all_rows
from lit_offrl.batch import Batch
from lit_offrl.errors import require
from lit_offrl.networks.energy_guidance import NoiseNetwork
from lit_offrl.networks.mlp import concatenate, mlp
from lit_offrl.ranges import Count, NonNegative, Positive, Steps, UnitInterval, Width

SMALLEST_STD = 0.1
LARGEST_LEAD = 40.0  # of a logit over the last that must be drawn


@dataclass(frozen=True)
class PlannedReturns:
    """A critic of returns that are planned in rounds.

    Attributes:
        rounds: Rounds K; the first has Monte-Carlo returns, each further one plans with the critic of the one before.
        steps: Gradient steps of each round but the last, which has what remains of `max_steps`.
        discount: Discount factor.
        alpha: Inverse temperature of Q in V.
        behavior_actions: Behavior actions at each state from which V is estimated.
        learning_rate: Step size.
        hidden_dims: Widths of the hidden layers.
    """

    rounds: Count = 2
    steps: Steps = 24_400
    discount: UnitInterval = 0.99
    alpha: NonNegative = 20.0
    behavior_actions: Count = 16
    learning_rate: Positive = 1e-3
    hidden_dims: Sequence[Width] = (256, 256)


@dataclass(frozen=True)
class Resampling:
    """How an action is chosen.

    Attributes:
        candidates: Behavior actions sampled per state.
        alpha: Inverse temperature of Q in the choice; 0 is the behavior model.
        average_of: How many of them are drawn, of which the action is the mean.
    """

    candidates: Count = 32
    alpha: NonNegative = 100.0
    average_of: Count = 4


class ReturnCritic(nn.Module):
    """Q(s, a) in units of standardized returns.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        hidden: Widths of the hidden layers.

    Attributes:
        mean: Mean of the returns that it is trained on.
        std: Their deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, observation_dim: int, action_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.layers = mlp((observation_dim + action_dim, *hidden, 1), nn.SiLU)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return standardized values `[...]` of `[..., observation_dim]` and `[..., action_dim]`, which broadcast."""
        values: Tensor = self.layers(concatenate(observations, actions)).squeeze(-1)
        return values

    def restore(self, values: Tensor) -> Tensor:
        """Return standardized values in units of returns."""
        return self.mean + self.std * values

    def standardize(self, returns: Tensor) -> Tensor:
        """Take the units of `returns` `[n]`, and return them standardized."""
        self.mean.copy_(returns.mean())
        self.std.copy_(returns.std(correction=0).clamp(min=SMALLEST_STD))
        return (returns - self.mean) / self.std


def planned_returns(rewards: Tensor, episode_ends: Tensor, values: Tensor | None, discount: float) -> Tensor:
    """Return R_n = max(r_n + discount R_{n+1}, V(s_n)), where nothing follows the end of an episode, `[n]`.

    Args:
        rewards: `[n]`, one episode after another.
        episode_ends: Whether each transition is the last of its episode, `[n]`.
        values: V of each state, `[n]`; None for Monte-Carlo returns.
        discount: Discount factor.
    """
    floors = torch.full_like(rewards, -torch.inf) if values is None else values
    returns, following = [], 0.0
    backwards = (each.flip(0).tolist() for each in (rewards, episode_ends, floors))
    for reward, is_last, floor in zip(*backwards, strict=True):
        following = max(reward + (0.0 if is_last else discount * following), floor)
        returns.append(following)
    return torch.tensor(returns[::-1], dtype=rewards.dtype, device=rewards.device)


class SfBC(OfflineAlgorithm):
    """A diffusion model of the behavior, among whose samples a critic of planned returns draws.

        L_mu    = E || epsilon(a_t, t, s) - epsilon ||^2
        V^k(s)  = sum_j softmax_j(alpha Q^k(s, a_j)) Q^k(s, a_j),  a_j ~ mu(. | s)
        R^k_n   = max(r_n + discount R^k_{n+1}, V^{k-1}(s_n)),  R^1 without V
        L_Q     = E [ (Q^k(s_n, a_n) - R^k_n)^2 ]
        pi(s)   : a_j with probability softmax_j(alpha' Q(s, a_j)),  a_j ~ mu(. | s)

    The behavior model is followed by a phase for each round k.

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        diffusion: The behavior model.
        critic: The critic and its rounds.
        acting: How an action is chosen; outside of locomotion one action is drawn, not the mean of four.
        pretrain_steps: Gradient steps that train the behavior model; `max_steps` includes them.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        diffusion: DiffusionOptions = DiffusionOptions(hidden_dim=512, learning_rate=1e-4),
        critic: PlannedReturns = PlannedReturns(),
        acting: Resampling = Resampling(),
        pretrain_steps: Steps = 586_000,
        **common: Any,
    ) -> None:
        check_width(diffusion.hidden_dim)
        option, largest = "model.init_args.acting.average_of", acting.candidates
        require(acting.average_of <= largest, option, f"at most acting.candidates, {largest}", acting.average_of)
        super().__init__(observation_dim, action_dim, pretrain_steps, **common)
        self.critic_options = critic
        self.acting = acting
        self.learning_rates = {"behavior": diffusion.learning_rate, "critic": critic.learning_rate}
        self.returns: Tensor | None = None  # standardized, of all transitions; a resumed run plans them again

        self.process = VPDiffusion(diffusion.solver_steps)
        seen = observation_dim if diffusion.conditional else 0
        self.behavior = NoiseNetwork(action_dim, seen, diffusion.hidden_dim)
        self.critic = ReturnCritic(observation_dim, action_dim, critic.hidden_dims)
        self.first_critic = frozen_copy(self.critic)  # as it starts in each round
        self.planning_critic = frozen_copy(self.critic)  # as it ended in the round before

    def phases(self) -> tuple[Phase, ...]:
        """The behavior model, and the rounds of the critic."""
        steps = self.critic_options.steps
        return (
            Phase("behavior", self.pretrain_update, self.pretrain_steps),
            *(
                Phase(f"round {k}", self.update, steps, partial(self.begin_round, k), partial(self.prepare_returns, k))
                for k in range(1, self.critic_options.rounds + 1)
            ),
        )

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for each network."""
        return {name: OptimizerSpec((getattr(self, name),), rate) for name, rate in self.learning_rates.items()}

    # ---------------------------------------------------------------- planning

    def begin_round(self, number: int) -> None:
        """Keep the critic of the round before, and start it again."""
        self.returns = None
        if number > 1:
            self.planning_critic.load_state_dict(self.critic.state_dict())
            self.critic.load_state_dict(self.first_critic.state_dict())
            self.optimizer_set.adams["critic"].reset()

    @torch.no_grad()
    def state_values(self) -> Tensor:
        """Return V of all states of the dataset by the critic of the round before, `[n]`."""
        observations, options = self.dataset_observations, self.critic_options
        assert observations is not None, "planning needs the observations of a dataset"
        generator = torch.Generator(observations.device).manual_seed(self.seed + SUPPORT_STREAM)

        def values(states: Tensor) -> Tensor:
            actions = self.sample(states, options.behavior_actions, generator)
            q = self.planning_critic(states[:, None], actions)
            return self.planning_critic.restore(in_support_value(q, options.alpha))

        at_once = SAMPLED_AT_ONCE // options.behavior_actions
        return for_all_rows(values, observations, at_once, "planning", show_progress=self.shows_progress)

    def prepare_returns(self, number: int, batch: Batch) -> None:
        """Plan the returns of a round before its first update, and in a resumed run.

        They are a function of the dataset, the seed and networks that the round leaves alone.
        """
        if self.returns is None:
            rewards, ends, terminals = self.dataset_rewards, self.dataset_episode_ends, self.dataset_terminals
            assert rewards is not None, "returns need the rewards of a dataset"
            assert ends is not None, "returns need the ends of the episodes"
            if terminals is not None:  # nothing counts after them, also where the episode goes on
                ends = ends | terminals.bool()
            values = self.state_values() if number > 1 else None
            returns = planned_returns(rewards, ends, values, self.critic_options.discount)
            self.returns = self.critic.standardize(returns)

    # ---------------------------------------------------------------- losses

    def behavior_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Noise prediction at a random time, a sum over the action's dimensions."""
        time, noisy_actions, noise = self.process.noised(batch.actions, self.noise)
        loss: Tensor = (self.behavior(noisy_actions, time, batch.observations) - noise).square().sum(-1).mean()
        return loss, {"behavior_loss": loss.detach()}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Regression on standardized planned returns."""
        assert batch.rows is not None
        assert self.returns is not None
        q = self.critic(batch.observations, batch.actions)
        loss = (q - self.returns[batch.rows]).square().mean()
        return loss, {"critic_loss": loss.detach(), "q_mean": self.critic.restore(q.detach()).mean()}

    # ---------------------------------------------------------------- the algorithm

    def pretrain_update(self, batch: Batch) -> Info:
        """Train the behavior model."""
        loss, info = self.behavior_loss(batch)
        self.minimize("behavior", loss)
        return info

    def update(self, batch: Batch) -> Info:
        """Train the critic."""
        loss, info = self.critic_loss(batch)
        self.minimize("critic", loss)
        return info

    def validation_losses(self, batch: Batch) -> Info:
        """The loss of the behavior model."""
        return self.behavior_loss(batch)[1]

    # ---------------------------------------------------------------- acting

    def sample(self, observations: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """Return `count` actions of the behavior model at each of `[batch, observation_dim]`."""
        return sample_behavior(self.process, self.behavior, observations, count, self.action_dim, generator)

    def resample(self, actions: Tensor, q: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw some of `[batch, candidates, action_dim]` by their Q `[batch, candidates]`, and return their mean."""
        logits, count = self.acting.alpha * q, self.acting.average_of
        logits = logits.minimum(logits.topk(count).values[:, -1:] + LARGEST_LEAD)
        chosen = torch.multinomial(logits.softmax(-1), count, generator=generator)  # without replacement
        return actions.gather(1, chosen[..., None].expand(-1, -1, self.action_dim)).mean(1)

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample candidates, and draw among them."""
        actions = self.sample(observations, self.acting.candidates, generator)
        return self.resample(actions, self.critic(observations[:, None], actions), generator)

    def sample_behavior(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample the behavior model once: behavior cloning."""
        return self.sample(observations, 1, generator)[:, 0]

    def actors(self) -> dict[str, Actor]:
        """The policy and, to compare with, the behavior model."""
        return {"policy": self.sample_actions, "behavior": self.sample_behavior}

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q in units of returns."""
        return self.critic.restore(self.critic(observations, actions))
