"""Q-chunking (Li, Zhou and Levine, 2025, arXiv 2507.07969): QC and QC-FQL.

What the authors' code decides, and we with it:

1. A chunk is one long action: networks and losses are those of FQL, with h actions in the place of one.
2. A window that the end of its episode cuts has no part in the critic's loss. Its flow loss has the actions before the
   end only. Both are still divided by the size of the whole batch.
3. The policy's loss is taken at every window, also at a cut one.
4. The best of N chunks has the highest online Q, also in the target, where the target networks then value it. Q is the
   mean or the minimum of the networks, as `aggregation` says; in the loss of `distilled` it is the mean.
5. A chunk is played to its end without looking at the observations between.

Ours: windows begin at every transition; the code leaves out the last h - 1 of the dataset. Online training and the
n-step variants without chunks are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lit_offrl.algorithms.base import (
    Actor,
    Info,
    Memory,
    OfflineAlgorithm,
    OptimizerSpec,
    Target,
    draw_noise,
    frozen_copy,
    select,
)
from lit_offrl.algorithms.critic_losses import bootstrapped
from lit_offrl.algorithms.flow_policy import (
    LAYERS,
    Aggregation,
    aggregate,
    flow_loss,
    make_q,
    one_step_loss,
    sample_flow,
)
from lit_offrl.algorithms.options import CriticOptions
from lit_offrl.batch import Batch
from lit_offrl.errors import UserError
from lit_offrl.networks.policies import NoiseToAction, VelocityField
from lit_offrl.ranges import Count, NonNegative, Positive, Width


def as_long_transitions(segments: Batch, discount: float) -> Batch:
    """Return windows of h steps as transitions of one long action each.

    The rewards are sums of h discounted rewards, a terminal state is one within the window, the actions are
    `[batch, h action_dim]`, those of the first step first, and the mask is `[batch, h]`.

    Args:
        segments: Segments `[batch, h, ...]`; or transitions `[batch, ...]` for h = 1.
        discount: Discount factor of one step.
    """
    if segments.mask is None:
        return segments._replace(mask=torch.ones_like(segments.rewards)[:, None])
    discounts = discount ** torch.arange(segments.rewards.shape[1], device=segments.rewards.device)
    return segments._replace(
        observations=segments.observations[:, 0],
        actions=segments.actions.flatten(1),
        rewards=(discounts * segments.rewards).sum(1),
        next_observations=segments.next_observations[:, -1],
        terminals=segments.terminals.amax(1),
    )


class QC(OfflineAlgorithm):
    """Q-learning of chunks A = (a_t, .., a_{t+h-1}), which a flow model of the behavior proposes.

        L_flow = E [ m_i (v(x_u, u, s) - (A - x_0))_i^2 ],  x_u = (1 - u) x_0 + u A,  mean over the h d numbers i
        y      = sum_{i<h} discount^i r_{t+i} + discount^h mean_j Q'_j(s_{t+h}, A')
        L_Q    = mean_j E [ m_{h-1} (y - Q_j(s_t, A))^2 ]
        L_mu   = E [ alpha (mu(s, z) - A_flow(s, z))^2 - mean_j Q_j(s, mu(s, z)) ]          `distilled` (QC-FQL) only

    m_i is 1 where step i belongs to the episode of step 0. A', and what acts, is the best of N chunks of the flow by Q
    (`best_of_n`, QC), or mu(s', z') (`distilled`).

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        policy: `best_of_n` chunks of the flow, or one chunk of a policy that is `distilled` from it.
        chunk_length: Actions h of a chunk.
        candidates: Chunks N of which `best_of_n` takes the best.
        alpha: Weight of the distance between policy and flow where `distilled`.
        aggregation: Whether the critic's target, and the choice among chunks, have the `mean` of the networks, or
            their `min`.
        flow_steps: Euler steps of the flow.
        critic: The critic, with four hidden layers.
        learning_rate: Step size of the flow and of the policy.
        hidden_dim: Width of their four hidden layers.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    has_memory = True  # the rest of a chunk

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        policy: Literal["best_of_n", "distilled"] = "best_of_n",
        chunk_length: Count = 5,
        candidates: Count = 32,
        alpha: NonNegative = 100.0,
        aggregation: Aggregation = "mean",
        flow_steps: Count = 10,
        critic: CriticOptions = CriticOptions(hidden_dim=512),
        learning_rate: Positive = 3e-4,
        hidden_dim: Width = 512,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, 0, **common)
        self.segment_length = chunk_length
        self.chunk_dim = chunk_length * action_dim
        self.candidates = candidates
        self.alpha = alpha
        self.aggregation: Aggregation = aggregation
        self.flow_steps = flow_steps
        self.critic_options = critic
        self.learning_rate = learning_rate
        hidden = (hidden_dim,) * LAYERS
        self.critic = make_q(observation_dim, self.chunk_dim, critic.hidden_dim)
        self.target_critic = frozen_copy(self.critic)
        self.behavior = VelocityField(observation_dim, self.chunk_dim, hidden)
        self.policy = NoiseToAction(observation_dim, self.chunk_dim, hidden) if policy == "distilled" else None

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for each network."""
        policy = {} if self.policy is None else {"policy": OptimizerSpec((self.policy,), self.learning_rate)}
        return {
            **policy,
            "behavior": OptimizerSpec((self.behavior,), self.learning_rate),
            "critic": OptimizerSpec((self.critic,), self.critic_options.learning_rate),
        }

    def targets(self) -> tuple[Target, ...]:
        """The critic."""
        return (Target(self.critic, self.target_critic, self.critic_options.target_rate),)

    def begin_main(self) -> None:
        """Check that some episode of the data holds a whole chunk.

        Raises:
            UserError: None does.
        """
        assert self.dataset_episode_ends is not None, "chunks need the ends of the episodes"
        last_rows = self.dataset_episode_ends.nonzero()[:, 0]
        longest = int(last_rows.diff(prepend=last_rows.new_full((1,), -1)).max())
        if longest < self.segment_length:
            raise UserError(
                f"model.init_args.chunk_length: {self.segment_length} actions are more than the longest episode of the "
                f"data has, {longest}"
            )

    # ---------------------------------------------------------------- chunks

    def flow_chunks(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Return the chunks to which the flow carries `noise` `[batch, ..., h action_dim]`, clamped to the box."""
        return sample_flow(self.behavior, observations, noise, self.flow_steps, self.units)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise of one state from which the policy makes a chunk."""
        return (self.candidates, self.chunk_dim) if self.policy is None else (self.chunk_dim,)

    def policy_chunks(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Return chunks `[batch, h action_dim]` of the policy from noise `[batch, *noise_shape]`."""
        if self.policy is not None:
            return self.units.clamp(self.policy(observations, noise))
        observations = observations[:, None]
        chunks = self.flow_chunks(observations, noise)
        return select(chunks, aggregate(self.critic(observations, chunks), self.aggregation), 0.0, None)

    # ---------------------------------------------------------------- losses

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Bootstrapping from the target Q of the policy's chunk after h steps."""
        discount = self.critic_options.discount
        batch = as_long_transitions(batch, discount)
        assert batch.mask is not None
        with torch.no_grad():
            noise = self.noise.normal(len(batch.rewards), *self.noise_shape)
            chunks = self.policy_chunks(batch.next_observations, noise)
            next_q = aggregate(self.target_critic(batch.next_observations, chunks), self.aggregation)
            goal = bootstrapped(batch, next_q, discount**self.segment_length)
        q = self.critic(batch.observations, batch.actions)
        loss = (batch.mask[:, -1] * (q - goal).square()).mean()
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}

    def flow_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Flow matching of the steps that belong to the episode."""
        batch = as_long_transitions(batch, self.critic_options.discount)
        assert batch.mask is not None
        mask = batch.mask.repeat_interleave(self.action_dim, dim=1)
        return flow_loss(self.behavior, batch.observations, batch.actions, self.noise, mask)

    def policy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Distance to the flow of the same noise, and Q."""
        assert self.policy is not None
        observations = as_long_transitions(batch, self.critic_options.discount).observations
        noise = self.noise.normal(len(observations), self.chunk_dim)
        with torch.no_grad():
            flow_chunks = self.flow_chunks(observations, noise)
        return one_step_loss(self.policy, self.critic, observations, noise, flow_chunks, self.alpha, self.units)

    def losses(self, batch: Batch) -> dict[str, tuple[Tensor, Info]]:
        """Return the loss of each network and what to log, all from the same weights."""
        critic, behavior = self.critic_loss(batch), self.flow_loss(batch)
        policy = {} if self.policy is None else {"policy": self.policy_loss(batch)}
        return {**policy, "behavior": behavior, "critic": critic}

    def validation_losses(self, batch: Batch) -> Info:
        """The same losses."""
        return {name: value for _, info in self.losses(batch).values() for name, value in info.items()}

    def update(self, batch: Batch) -> Info:
        """Step all networks, the policy before the critic through which its gradient passes."""
        info: Info = {}
        for name, (loss, network_info) in self.losses(batch).items():
            self.minimize(name, loss)
            info |= network_info
        return info

    # ---------------------------------------------------------------- acting

    def play(self, sample: Callable[[Tensor], Tensor], observations: Tensor, memories: Sequence[Memory]) -> Tensor:
        """Return the next action of each row's chunk, `[batch, action_dim]`, and keep the rest in its memory.

        Args:
            sample: Returns chunks `[rows, h action_dim]` at `[rows, observation_dim]`, for rows that have none left.
            observations: `[batch, observation_dim]`.
            memories: One per row; without any, every row begins a chunk.
        """
        memories = memories or [{} for _ in observations]
        due = [row for row, memory in enumerate(memories) if not memory.get("chunk")]
        if due:
            chunks = sample(observations[due]).view(-1, self.segment_length, self.action_dim)
            for row, chunk in zip(due, chunks, strict=True):
                memories[row]["chunk"] = [*chunk]
        return torch.stack([memory["chunk"].pop(0) for memory in memories])

    def sample_actions(
        self, observations: Tensor, generator: torch.Generator | None, memories: Sequence[Memory] = ()
    ) -> Tensor:
        """Return the next actions of the policy's chunks."""

        def sample(states: Tensor) -> Tensor:
            return self.policy_chunks(states, draw_noise(states, *self.noise_shape, generator=generator))

        return self.play(sample, observations, memories)

    def sample_behavior(
        self, observations: Tensor, generator: torch.Generator | None, memories: Sequence[Memory] = ()
    ) -> Tensor:
        """Return the next actions of chunks of the flow."""

        def sample(states: Tensor) -> Tensor:
            return self.flow_chunks(states, draw_noise(states, self.chunk_dim, generator=generator))

        return self.play(sample, observations, memories)

    def actors(self) -> dict[str, Actor]:
        """The policy, and the flow."""
        return {"policy": self.sample_actions, "behavior": self.sample_behavior}

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor | None:
        """Q, as the choice among chunks sees it; None where a chunk has more than one action."""
        return aggregate(self.critic(observations, actions), self.aggregation) if self.segment_length == 1 else None
