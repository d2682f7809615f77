"""Implicit Q-learning (Kostrikov, Nair and Levine, 2022, arXiv 2110.06169).

What the authors' code decides, and what we do:

1. In an update V comes first, by the target critics; the policy and Q follow, both with the new V (code).
2. The mean of the policy passes through a tanh; its deviation is one parameter for each dimension of the action,
   between e^-5 and e^2; the action is the mean (code).
3. The policy's learning rate decays by a cosine over the training, the critic's do not (both).
4. Q's loss is a mean over both networks; in the code it is their sum, which Adam does not notice.
5. All layers begin orthogonal, with gain sqrt(2) (code).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Info, OfflineAlgorithm, OptimizerSpec, Target, frozen_copy
from lit_offrl.algorithms.critic_losses import advantage_weights, implicit_target_loss, implicit_v_loss
from lit_offrl.algorithms.options import ImplicitQ
from lit_offrl.batch import Batch
from lit_offrl.networks.critics import EnsembleQ, ValueNetwork
from lit_offrl.networks.mlp import orthogonal_
from lit_offrl.networks.policies import Gaussian, GaussianPolicy
from lit_offrl.ranges import NonNegative, Positive, ProperFraction, Width

LARGEST_WEIGHT = 100.0


class IQL(OfflineAlgorithm):
    """A Gaussian policy by regression on the data's actions, weighted by how much better they are than V.

        L_V   = E [ L_tau( min_i Q'_i(s, a) - V(s) ) ],  L_tau(u) = |tau - 1(u < 0)| u^2                      (Eq. 5)
        L_Q   = E [ (r + discount V(s') - Q_i(s, a))^2 ]                                                      (Eq. 6)
        L_pi  = - E [ min(exp(beta (min_i Q'_i(s, a) - V(s))), 100) log pi(a | s) ]                           (Eq. 7)

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        beta: Inverse temperature of the weights; 0 clones the behavior.
        dropout: Share of the policy's hidden values that is dropped in training.
        critic: The critic, Q and V.
        learning_rate: Step size of the policy.
        hidden_dim: Width of the policy's two hidden layers.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        beta: NonNegative = 3.0,
        dropout: ProperFraction = 0.0,
        critic: ImplicitQ = ImplicitQ(),
        learning_rate: Positive = 3e-4,
        hidden_dim: Width = 256,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, 0, **common)
        self.beta = beta
        self.dropout = dropout
        self.critic_options = critic
        self.learning_rate = learning_rate
        self.hidden_dim = hidden_dim
        hidden = (critic.hidden_dim,) * 2
        q = EnsembleQ(observation_dim, action_dim, hidden, layer_norm=False, activation=nn.ReLU)
        self.critic = nn.ModuleDict({"q": q, "v": ValueNetwork(observation_dim, hidden, nn.ReLU)})
        self.policy = GaussianPolicy(observation_dim, action_dim, (hidden_dim,) * 2, nn.ReLU, std="free")
        for network in (self.critic, self.policy):
            orthogonal_(network, gain=math.sqrt(2))
        self.target_q = frozen_copy(q)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for each network."""
        rate = self.critic_options.learning_rate
        return {
            "v": OptimizerSpec((self.critic["v"],), rate),
            "q": OptimizerSpec((self.critic["q"],), rate),
            "policy": OptimizerSpec((self.policy,), self.learning_rate, cosine=True),
        }

    def targets(self) -> tuple[Target, ...]:
        """The Q networks that V is regressed on."""
        return (Target(self.critic["q"], self.target_q, self.critic_options.target_rate),)

    def v_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Expectile regression (Eq. 5)."""
        return implicit_v_loss(self.critic["v"], self.target_q, batch, self.critic_options.expectile)

    def q_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Bootstrapping from V (Eq. 6)."""
        return implicit_target_loss(self.critic["q"], self.critic["v"], batch, self.critic_options.discount)

    def policy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Advantage-weighted regression (Eq. 7)."""
        with torch.no_grad():
            best = self.target_q(batch.observations, batch.actions).amin(0)
            weights = advantage_weights(best - self.critic["v"](batch.observations), self.beta, LARGEST_WEIGHT)
        masks = self.noise.dropout_masks(self.dropout, len(weights), 2, self.hidden_dim)
        distribution: Gaussian = self.policy(batch.observations, masks)
        loss = (weights * distribution.cloning_loss(batch.actions)).mean()
        return loss, {"policy_loss": loss.detach(), "weight_mean": weights.mean()}

    def validation_losses(self, batch: Batch) -> Info:
        """The three losses."""
        return {**self.v_loss(batch)[1], **self.q_loss(batch)[1], **self.policy_loss(batch)[1]}

    def update(self, batch: Batch) -> Info:
        """V, the policy, Q; `EMATargets` moves the target."""
        return self.minimize_in_turn({"v": self.v_loss, "policy": self.policy_loss, "q": self.q_loss}, batch)

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the mean."""
        mean: Tensor = self.policy(observations).mean
        return mean

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller Q."""
        q: Tensor = self.critic["q"](observations, actions).amin(0)
        return q
