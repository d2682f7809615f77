"""Flow Q-learning (Park, Li and Levine, 2025, arXiv 2502.02538).

What the authors' code decides, and we with it:

1. The distance of the policy to the flow is a mean over dimensions. The values of alpha belong to it.
2. The policy is not bounded. Q sees its actions clamped; the distance sees them as they are.
3. The policy's loss has the mean of the Q networks, whatever the critic's target has.
4. The flow's actions are clamped at the end of the ten Euler steps, not on the way.
5. Only the critic has a target network; target actions are those of the present policy, with noise of their own.
6. The three losses come from the same weights; one Adam steps all networks, which is the same as one for each.
7. LayerNorm comes after the activation, in the critic only; GELU is the approximation by a tanh.
8. The policy acts by one sample in evaluations as well.

Ours: LayerNorm has torch's epsilon, 1e-5, where flax has 1e-6. The target critic follows the critic after its step, in
the code the one before it.

The paper has no results on locomotion; the default of alpha is the one of the code. The tasks of the paper take 3 to
30,000, because Q is on the scale of the returns. For tasks of another scale the authors advise `normalize_q` with alpha
from 0.03 to 10.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_offrl.algorithms.base import Actor, Info, OfflineAlgorithm, OptimizerSpec, Target, draw_noise, frozen_copy
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
from lit_offrl.networks.policies import NoiseToAction, VelocityField
from lit_offrl.ranges import Count, NonNegative, Positive, Width


class FQL(OfflineAlgorithm):
    """A one-step policy that maximizes Q and is distilled from a flow model of the behavior.

        L_flow = E [ (v(x_t, t, s) - (a - x_0))^2 ],  x_t = (1 - t) x_0 + t a
        y      = r + discount mean_i Q'_i(s', mu(s', z'))
        L_Q    = mean_i E [ (y - Q_i(s, a))^2 ]
        L_mu   = E [ alpha (mu(s, z) - a_flow(s, z))^2 - mean_i Q_i(s, mu(s, z)) ]

    a_flow(s, z) is where the flow carries the noise z.

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        alpha: Weight of the distance between policy and flow; large values clone the behavior.
        aggregation: Whether the critic's target has the `mean` of the target networks, or their `min`.
        normalize_q: Divide Q in the policy's loss by its mean absolute value.
        flow_steps: Euler steps of the flow.
        critic: The critic, with four hidden layers.
        learning_rate: Step size of the flow and of the policy.
        hidden_dim: Width of their four hidden layers.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        alpha: NonNegative = 10.0,
        aggregation: Aggregation = "mean",
        normalize_q: bool = False,
        flow_steps: Count = 10,
        critic: CriticOptions = CriticOptions(hidden_dim=512),
        learning_rate: Positive = 3e-4,
        hidden_dim: Width = 512,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, 0, **common)
        self.alpha = alpha
        self.aggregation: Aggregation = aggregation
        self.normalize_q = normalize_q
        self.flow_steps = flow_steps
        self.critic_options = critic
        self.learning_rate = learning_rate
        hidden = (hidden_dim,) * LAYERS
        self.critic = make_q(observation_dim, action_dim, critic.hidden_dim)
        self.target_critic = frozen_copy(self.critic)
        self.behavior = VelocityField(observation_dim, action_dim, hidden)
        self.policy = NoiseToAction(observation_dim, action_dim, hidden)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for each network."""
        return {
            "policy": OptimizerSpec((self.policy,), self.learning_rate),
            "behavior": OptimizerSpec((self.behavior,), self.learning_rate),
            "critic": OptimizerSpec((self.critic,), self.critic_options.learning_rate),
        }

    def targets(self) -> tuple[Target, ...]:
        """The critic."""
        return (Target(self.critic, self.target_critic, self.critic_options.target_rate),)

    def one_step_actions(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Return the policy's actions, clamped to the box."""
        return self.units.clamp(self.policy(observations, noise))

    def flow_actions(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Return the actions to which the flow carries `noise`, clamped to the box."""
        return sample_flow(self.behavior, observations, noise, self.flow_steps, self.units)

    # ---------------------------------------------------------------- losses

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Bootstrapping from the target Q of an action of the policy."""
        with torch.no_grad():
            actions = self.one_step_actions(batch.next_observations, self.noise.normal(*batch.actions.shape))
            next_q = aggregate(self.target_critic(batch.next_observations, actions), self.aggregation)
            goal = bootstrapped(batch, next_q, self.critic_options.discount)
        q = self.critic(batch.observations, batch.actions)
        loss = (q - goal).square().mean()
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}

    def flow_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Flow matching."""
        return flow_loss(self.behavior, batch.observations, batch.actions, self.noise)

    def policy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Distance to the flow of the same noise, and Q."""
        noise = self.noise.normal(*batch.actions.shape)
        with torch.no_grad():
            flow_actions = self.flow_actions(batch.observations, noise)
        scale = self.noise if self.normalize_q else None
        return one_step_loss(
            self.policy, self.critic, batch.observations, noise, flow_actions, self.alpha, self.units, scale
        )

    def losses(self, batch: Batch) -> dict[str, tuple[Tensor, Info]]:
        """Return the loss of each network and what to log, all from the same weights."""
        critic, behavior, policy = self.critic_loss(batch), self.flow_loss(batch), self.policy_loss(batch)
        return {"policy": policy, "behavior": behavior, "critic": critic}

    def validation_losses(self, batch: Batch) -> Info:
        """The three losses."""
        return {name: value for _, info in self.losses(batch).values() for name, value in info.items()}

    def update(self, batch: Batch) -> Info:
        """Step all networks, the policy before the critic through which its gradient passes."""
        info: Info = {}
        for name, (loss, network_info) in self.losses(batch).items():
            self.minimize(name, loss)
            info |= network_info
        return info

    # ---------------------------------------------------------------- acting

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return a sample of the policy."""
        return self.one_step_actions(observations, draw_noise(observations, self.action_dim, generator=generator))

    def sample_behavior(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return a sample of the flow."""
        return self.flow_actions(observations, draw_noise(observations, self.action_dim, generator=generator))

    def actors(self) -> dict[str, Actor]:
        """The one-step policy and the flow."""
        return {"policy": self.sample_actions, "behavior": self.sample_behavior}

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The mean Q, which the policy maximizes."""
        q: Tensor = self.critic(observations, actions).mean(0)
        return q
