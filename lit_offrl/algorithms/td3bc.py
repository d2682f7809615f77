"""TD3+BC (Fujimoto and Gu, 2021, arXiv 2106.06860).

What the authors' code decides, and we with it: the mean |Q| that scales the policy's loss takes no gradients; the
distance to the data is a mean over dimensions; the policy moves at every second step, and all target networks with it
and no others; the noise of target actions and its bound are in units of the largest action, which is 1 here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Info, OfflineAlgorithm, OptimizerSpec, Target, frozen_copy
from lit_offrl.algorithms.critic_losses import bootstrapped, ensemble_loss
from lit_offrl.algorithms.options import CriticOptions
from lit_offrl.batch import Batch
from lit_offrl.networks.critics import EnsembleQ
from lit_offrl.networks.policies import DeterministicPolicy
from lit_offrl.ranges import Count, NonNegative, Positive, Width


class TD3BC(OfflineAlgorithm):
    """TD3 with the squared distance to the data's actions in the policy's loss.

        y     = r + discount min_i Q'_i(s', clip(pi'(s') + clip(epsilon)))
        L_Q   = sum_i E [ (y - Q_i(s, a))^2 ]
        L_pi  = E [ - alpha Q_1(s, pi(s)) / mean|Q_1| + (pi(s) - a)^2 ]                                       (Eq. 3)

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        alpha: Weight of Q against the distance to the data; 0 clones the behavior.
        target_noise: Standard deviation of the noise of target actions.
        target_noise_limit: Bound of that noise.
        policy_every: The policy and the targets move at every so many gradient steps.
        critic: The critic, with two hidden layers.
        learning_rate: Step size of the policy.
        hidden_dim: Width of the policy's two hidden layers.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        alpha: NonNegative = 2.5,
        target_noise: NonNegative = 0.2,
        target_noise_limit: NonNegative = 0.5,
        policy_every: Count = 2,
        critic: CriticOptions = CriticOptions(),
        learning_rate: Positive = 3e-4,
        hidden_dim: Width = 256,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, 0, **common)
        self.alpha = alpha
        self.target_noise, self.target_noise_limit = target_noise, target_noise_limit
        self.policy_every = policy_every
        self.critic_options = critic
        self.learning_rate = learning_rate
        self.critic, self.policy = self.make_critic(critic.hidden_dim), self.make_policy(hidden_dim)
        self.target_critic, self.target_policy = frozen_copy(self.critic), frozen_copy(self.policy)

    def make_critic(self, width: int) -> EnsembleQ:
        """Return two Q networks of two hidden layers."""
        return EnsembleQ(self.observation_dim, self.action_dim, (width,) * 2, layer_norm=False, activation=nn.ReLU)

    def make_policy(self, width: int) -> DeterministicPolicy:
        """Return a policy of two hidden layers."""
        return DeterministicPolicy(self.observation_dim, self.action_dim, (width,) * 2, nn.ReLU)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for the critic, one for the policy."""
        return {
            "critic": OptimizerSpec((self.critic,), self.critic_options.learning_rate),
            "policy": OptimizerSpec((self.policy,), self.learning_rate, every=self.policy_every),
        }

    def targets(self) -> tuple[Target, ...]:
        """Critic and policy, which move when the policy does."""
        rate, every = self.critic_options.target_rate, self.policy_every
        return (
            Target(self.critic, self.target_critic, rate, every),
            Target(self.policy, self.target_policy, rate, every),
        )

    def target_actions(self, observations: Tensor) -> Tensor:
        """Return actions of the target policy with bounded noise, `[batch, action_dim]`."""
        actions: Tensor = self.target_policy(observations).action
        noise = self.target_noise * self.noise.normal(*actions.shape)
        return self.units.clamp(actions + noise.clamp(-self.target_noise_limit, self.target_noise_limit))

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Bootstrapping from the smaller target Q of a smoothed target action."""
        with torch.no_grad():
            actions = self.target_actions(batch.next_observations)
            next_q = self.target_critic(batch.next_observations, actions).amin(0)
            goal = bootstrapped(batch, next_q, self.critic_options.discount)
        q = self.critic(batch.observations, batch.actions)
        loss = ensemble_loss(q, goal)
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}

    def policy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Q on its own scale, and the distance to the data (Eq. 3)."""
        actions = self.policy(batch.observations).action
        q = self.critic(batch.observations, actions)[0]
        distance = (actions - batch.actions).square().mean()
        loss = -self.alpha * q.mean() / self.noise.all_rows(q.detach().abs()).mean() + distance
        return loss, {"policy_loss": loss.detach(), "distance": distance.detach()}

    def validation_losses(self, batch: Batch) -> Info:
        """Both losses."""
        return {**self.critic_loss(batch)[1], **self.policy_loss(batch)[1]}

    def update(self, batch: Batch) -> Info:
        """Step the critic, and at every second step the policy; `EMATargets` moves the targets."""
        policy = {"policy": self.policy_loss} if "policy" in self.active else {}
        return self.minimize_in_turn({"critic": self.critic_loss, **policy}, batch)

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the policy's action."""
        action: Tensor = self.policy(observations).action
        return action

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller Q."""
        q: Tensor = self.critic(observations, actions).amin(0)
        return q
