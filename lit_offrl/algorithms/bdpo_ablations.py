"""BDPO with one-step policies: the ablations of its Section 5.3 and Appendix B.3.

There is no published code of them. Eqs. 19 and 20 print a discount in front of Q in the policy's objective and leave
the penalty in the target without one; ours are BDPO's own, y = r + discount (Q - eta D) and max E[Q] - eta D. Samples
of the Gaussian policy may lie outside of the box of actions: Q, selection and the environment see them clamped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Info
from lit_offrl.algorithms.bdpo import BDPO
from lit_offrl.batch import Batch
from lit_offrl.networks.policies import DeterministicPolicy, GaussianPolicy


class OneStepBDPO(BDPO):
    """BDPO without paths: one network call makes an action, and there is no V.

    Policies are networks that return a distribution with `sample`, `divergence` and `cloning_loss`.
    """

    has_path = False

    def __init__(self, observation_dim: int, action_dim: int, **options: Any) -> None:
        super().__init__(observation_dim, action_dim, diffusion_steps=1, clip=None, **options)

    def behavior_loss(self, batch: Batch) -> Tensor:
        """Behavior cloning."""
        loss: Tensor = self.behavior(batch.observations).cloning_loss(batch.actions).mean()
        return loss

    def rollout(self, observations: Tensor, *, penalized: bool) -> tuple[Tensor, Tensor]:
        """Sample actions `[batch, samples, action_dim]` of the target actor; the penalty D is `[batch]`."""
        policy = self.target_actor(observations)
        noise = self.noise.normal(len(observations), self.samples, self.action_dim)
        actions = self.units.clamp(policy.sample(noise))
        if penalized:
            return actions, policy.divergence(self.target_behavior(observations))
        return actions, torch.zeros_like(observations[:, 0])

    def policy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Maximise the lower bound of Q less the penalty (Eq. 20)."""
        policy = self.actor(batch.observations)
        with torch.no_grad():
            behavior = self.target_behavior(batch.observations)
        actions = self.units.clamp(policy.sample(self.noise.normal(len(batch.actions), self.samples, self.action_dim)))
        q = self.lower_bound(self.target_critic["q"](batch.observations[:, None], actions).mean(-1))
        penalty = policy.divergence(behavior)
        return -(q - self.eta * penalty).mean(), {"policy_divergence": penalty.detach().mean()}

    def critic_losses(self) -> dict[str, Any]:
        """There is only Q."""
        return {"q": self.q_loss}

    def sample_policy(
        self, policy: nn.Module, observations: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """Return actions `[batch, samples, action_dim]` of a policy's network."""
        noise = torch.randn(
            observations.shape[0], samples, self.action_dim, generator=generator, device=observations.device
        )
        actions: Tensor = policy(observations).sample(noise)
        return self.units.clamp(actions)

    def figure_maps(self, observations: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """Q."""
        return {"Q": self.value_of(observations, actions)}

    def figure_paths(self, observations: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """There are no paths."""
        return {}


class BDPOGaussian(OneStepBDPO):
    """BDPO with a Gaussian policy, kept to a Gaussian behavior model by the KL divergence in closed form (Eq. 22).

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        **options: See `BDPO`.
    """

    def make_policy(self, hidden: tuple[int, ...]) -> nn.Module:
        """Return a network for the mean and the deviation."""
        return GaussianPolicy(self.observation_dim, self.action_dim, hidden)


class BDPODeterministic(OneStepBDPO):
    """BDPO with a deterministic policy, kept to a regression of the data's actions by their distance (Eq. 21).

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        **options: See `BDPO`. One sample and one candidate are enough.
    """

    def make_policy(self, hidden: tuple[int, ...]) -> nn.Module:
        """Return a network for the action."""
        return DeterministicPolicy(self.observation_dim, self.action_dim, hidden)
