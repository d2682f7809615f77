"""AWAC, advantage-weighted actor-critic (Nair et al., 2020, arXiv 2006.09359), the offline part.

The settings are those of CORL (Tarasov et al., 2022, arXiv 2210.07105), which decides, and we with it:

1. Q's target has the action of the present policy at the next state, and no target policy.
2. The advantage compares Q of the data's action with Q of one action of the policy, both by the networks that are being
   trained, after their step. Weights end at 100 and are not normalized over the batch.
3. The mean of the policy passes through no tanh; its deviation is one parameter for each dimension of the action,
   between e^-20 and e^2. Sampled actions are clamped to the box; the action of the evaluation is the mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Info, OfflineAlgorithm, OptimizerSpec, Target, frozen_copy
from lit_offrl.algorithms.critic_losses import advantage_weights, bootstrapped, ensemble_loss
from lit_offrl.algorithms.options import CriticOptions
from lit_offrl.batch import Batch
from lit_offrl.networks.critics import EnsembleQ
from lit_offrl.networks.policies import Gaussian, GaussianPolicy
from lit_offrl.ranges import Positive, Width

LARGEST_WEIGHT = 100.0


class AWAC(OfflineAlgorithm):
    """A Gaussian policy by regression on the data's actions, weighted by how much better they are than its own.

        y     = r + discount min_i Q'_i(s', a'),  a' ~ pi(. | s')
        L_Q   = sum_i E [ (y - Q_i(s, a))^2 ]
        A     = min_i Q_i(s, a) - min_i Q_i(s, a~),  a~ ~ pi(. | s)
        L_pi  = - E [ min(exp(A / lambda), 100) log pi(a | s) ]

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        temperature: lambda; the larger, the closer to a clone of the behavior.
        critic: The critic, with three hidden layers.
        learning_rate: Step size of the policy.
        hidden_dim: Width of the policy's three hidden layers.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        temperature: Positive = 1 / 3,
        critic: CriticOptions = CriticOptions(),
        learning_rate: Positive = 3e-4,
        hidden_dim: Width = 256,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, 0, **common)
        self.temperature = temperature
        self.critic_options = critic
        self.learning_rate = learning_rate
        self.critic = EnsembleQ(
            observation_dim, action_dim, (critic.hidden_dim,) * 3, layer_norm=False, activation=nn.ReLU
        )
        self.policy = GaussianPolicy(
            observation_dim,
            action_dim,
            (hidden_dim,) * 3,
            nn.ReLU,
            tanh_mean=False,
            std="free",
            log_std_range=(-20.0, 2.0),
        )
        self.target_critic = frozen_copy(self.critic)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for the critic, one for the policy."""
        return {
            "critic": OptimizerSpec((self.critic,), self.critic_options.learning_rate),
            "policy": OptimizerSpec((self.policy,), self.learning_rate),
        }

    def targets(self) -> tuple[Target, ...]:
        """The critic."""
        return (Target(self.critic, self.target_critic, self.critic_options.target_rate),)

    def sample_policy(self, observations: Tensor) -> Tensor:
        """Return one action of the policy at each observation, `[batch, action_dim]`."""
        distribution: Gaussian = self.policy(observations)
        noise = self.noise.normal(len(observations), 1, self.action_dim)
        return self.units.clamp(distribution.sample(noise)[:, 0])

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Bootstrapping from the smaller target Q of the policy's action."""
        with torch.no_grad():
            actions = self.sample_policy(batch.next_observations)
            next_q = self.target_critic(batch.next_observations, actions).amin(0)
            goal = bootstrapped(batch, next_q, self.critic_options.discount)
        q = self.critic(batch.observations, batch.actions)
        loss = ensemble_loss(q, goal)
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}

    def policy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Advantage-weighted regression."""
        with torch.no_grad():
            values = self.value_of(batch.observations, self.sample_policy(batch.observations))
            advantages = self.value_of(batch.observations, batch.actions) - values
            weights = advantage_weights(advantages, 1 / self.temperature, LARGEST_WEIGHT)
        distribution: Gaussian = self.policy(batch.observations)
        loss = (weights * distribution.cloning_loss(batch.actions)).mean()
        info = {"policy_loss": loss, "weight_mean": weights.mean(), "policy_std": distribution.std.mean()}
        return loss, {name: value.detach() for name, value in info.items()}

    def validation_losses(self, batch: Batch) -> Info:
        """Both losses."""
        return {**self.critic_loss(batch)[1], **self.policy_loss(batch)[1]}

    def update(self, batch: Batch) -> Info:
        """The critic, then the policy; `EMATargets` moves the target."""
        return self.minimize_in_turn({"critic": self.critic_loss, "policy": self.policy_loss}, batch)

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the mean."""
        mean: Tensor = self.policy(observations).mean
        return mean

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller Q."""
        q: Tensor = self.critic(observations, actions).amin(0)
        return q
