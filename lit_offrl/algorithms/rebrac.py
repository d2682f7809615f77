"""ReBRAC (Tarasov et al., 2023, arXiv 2305.09836): TD3+BC with a critic that is penalized too, and deeper networks.

What the authors' code decides, and we with it:

1. Distances to the data are sums over dimensions; the policy's loss has the smaller Q, on the scale of its mean.
2. LayerNorm comes after the ReLU, in the critic only. Weights begin uniform within 1 / sqrt(inputs), biases at 0.1; the
   last layers within 1e-3 (policy) and 3e-3 (critic).

Ours: the target policy moves to the new policy, in the code to the one before the step. Where a time limit cut an
episode, so that the data do not hold the next action, the critic has no penalty; the code leaves such transitions out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Info
from lit_offrl.algorithms.critic_losses import bootstrapped, ensemble_loss
from lit_offrl.algorithms.options import CriticOptions
from lit_offrl.algorithms.td3bc import TD3BC
from lit_offrl.batch import Batch
from lit_offrl.networks.critics import EnsembleQ
from lit_offrl.networks.mlp import fan_in_uniform_
from lit_offrl.networks.policies import DeterministicPolicy
from lit_offrl.ranges import NonNegative, Width


class ReBRAC(TD3BC):
    """TD3 with a penalty on the distance to the data, in the policy's loss and in the critic's target.

        y     = r + discount ( min_i Q'_i(s', a~) - beta_critic |a~ - a'|^2 ),  a~ = clip(pi'(s') + clip(epsilon))
        L_Q   = sum_i E [ (y - Q_i(s, a))^2 ]
        L_pi  = E [ beta_actor |pi(s) - a|^2 - min_i Q_i(s, pi(s)) / mean|min_i Q_i| ]

    a' is the action that the data took at s'.

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        beta_actor: Weight of the distance in the policy's loss.
        beta_critic: Weight of the distance in the critic's target.
        critic: The critic, with three hidden layers.
        hidden_dim: Width of the policy's three hidden layers.
        **options: The other options of `TD3BC`, without `alpha`.
    """

    segment_length = 2  # the next action is the second of a segment

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        beta_actor: NonNegative = 0.01,
        beta_critic: NonNegative = 0.01,
        critic: CriticOptions = CriticOptions(learning_rate=1e-3),
        hidden_dim: Width = 256,
        **options: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, alpha=1.0, critic=critic, hidden_dim=hidden_dim, **options)
        self.beta_actor, self.beta_critic = beta_actor, beta_critic

    def make_critic(self, width: int) -> EnsembleQ:
        """Return two Q networks of three hidden layers with LayerNorm."""
        critic = EnsembleQ(self.observation_dim, self.action_dim, (width,) * 3, norm_last=True, activation=nn.ReLU)
        for member in critic.members:
            fan_in_uniform_(member, bias=0.1, last=3e-3)
        return critic

    def make_policy(self, width: int) -> DeterministicPolicy:
        """Return a policy of three hidden layers."""
        policy = DeterministicPolicy(self.observation_dim, self.action_dim, (width,) * 3, nn.ReLU)
        fan_in_uniform_(policy.layers, bias=0.1, last=1e-3)
        return policy

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Bootstrapping from the smaller target Q, less the distance of the target action to the data's."""
        assert batch.mask is not None
        now, knows_next_action = batch.at(0), batch.mask[:, 1]
        with torch.no_grad():
            actions = self.target_actions(now.next_observations)
            distance = knows_next_action * (actions - batch.actions[:, 1]).square().sum(-1)
            next_q = self.target_critic(now.next_observations, actions).amin(0)
            goal = bootstrapped(now, next_q - self.beta_critic * distance, self.critic_options.discount)
        q = self.critic(now.observations, now.actions)
        loss = ensemble_loss(q, goal)
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean(), "next_distance": distance.mean()}

    def policy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """The distance to the data, and Q on its own scale."""
        now = batch.at(0)
        actions = self.policy(now.observations).action
        q = self.critic(now.observations, actions).amin(0)
        distance = (actions - now.actions).square().sum(-1).mean()
        loss = self.beta_actor * distance - q.mean() / self.noise.all_rows(q.detach().abs()).mean()
        return loss, {"policy_loss": loss.detach(), "distance": distance.detach()}
