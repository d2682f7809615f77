"""Behavior cloning: the control of every method. A method whose improvement weighs nothing must fall back to it.

The settings are those of CORL (Tarasov et al., 2022, arXiv 2210.07105); the clone of the best episodes alone, "10% BC",
is `data.best_episodes 0.1`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Info, OfflineAlgorithm, OptimizerSpec
from lit_offrl.batch import Batch
from lit_offrl.networks.policies import DeterministicPolicy, Gaussian, GaussianPolicy
from lit_offrl.ranges import Positive, Width


class BC(OfflineAlgorithm):
    """A policy that repeats the actions of the data.

        L = E [ (pi(s) - a)^2 ]                               deterministic, mean over the dimensions of the action
        L = - E [ log N(a; mu(s), sigma^2) ]                  gaussian, sigma does not depend on the state

    Both act by their mean.

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        policy: `deterministic`, or `gaussian`.
        learning_rate: Step size.
        hidden_dim: Width of the two hidden layers.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        policy: Literal["deterministic", "gaussian"] = "deterministic",
        learning_rate: Positive = 3e-4,
        hidden_dim: Width = 256,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, 0, **common)
        self.learning_rate = learning_rate
        shape = observation_dim, action_dim, (hidden_dim,) * 2, nn.ReLU
        self.policy = GaussianPolicy(*shape, std="free") if policy == "gaussian" else DeterministicPolicy(*shape)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam."""
        return {"policy": OptimizerSpec((self.policy,), self.learning_rate)}

    def policy_loss(self, batch: Batch) -> Tensor:
        """Regression of the data's actions."""
        distribution = self.policy(batch.observations)
        if isinstance(distribution, Gaussian):
            return distribution.cloning_loss(batch.actions).mean()
        loss: Tensor = (distribution.action - batch.actions).square().mean()
        return loss

    def validation_losses(self, batch: Batch) -> Info:
        """The same loss."""
        return {"policy_loss": self.policy_loss(batch)}

    def update(self, batch: Batch) -> Info:
        """Step the policy."""
        loss = self.policy_loss(batch)
        self.minimize("policy", loss)
        return {"policy_loss": loss.detach()}

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the mean."""
        distribution = self.policy(observations)
        actions: Tensor = distribution.mean if isinstance(distribution, Gaussian) else distribution.action
        return actions
