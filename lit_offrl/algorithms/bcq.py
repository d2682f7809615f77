"""BCQ, batch-constrained deep Q-learning (Fujimoto, Meger and Precup, 2019, arXiv 1812.02900), for continuous actions.

What the authors' code decides, and we with it:

1. The reconstruction error is a mean over the dimensions of the action, the divergence a mean over those of the latent
   variable, with weight 0.5. The deviation of the encoder is between e^-4 and e^15.
2. Latent variables of the prior are clipped to [-0.5, 0.5] wherever actions are sampled.
3. The best of ten candidates backs up, each valued by the soft minimum of the target Q, after the target perturbation.
4. The perturbation climbs Q_1, and acting takes the best of 100 candidates by Q_1.
5. An update steps the autoencoder, the critic and the perturbation, each with those before it already moved.

The authors' batches have 100 transitions (`data.batch_size`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import (
    Actor,
    Info,
    OfflineAlgorithm,
    OptimizerSpec,
    Target,
    draw_noise,
    frozen_copy,
    select,
)
from lit_offrl.algorithms.critic_losses import bootstrapped, ensemble_loss
from lit_offrl.algorithms.options import Acting, CriticOptions
from lit_offrl.batch import Batch
from lit_offrl.networks.critics import EnsembleQ
from lit_offrl.networks.mlp import concatenate, mlp
from lit_offrl.networks.vae import ActionVAE
from lit_offrl.ranges import Count, NonNegative, Positive, UnitInterval, Width

DIVERGENCE_WEIGHT = 0.5
LATENT_LIMIT = 0.5


def narrowing(hidden_dim: int) -> tuple[int, int]:
    """Return the widths of two hidden layers, the second of three quarters: 400 and 300 in the paper."""
    return hidden_dim, math.ceil(0.75 * hidden_dim)


def soft_minimum(q: Tensor, weight: float) -> Tensor:
    """Return weight min_i Q_i + (1 - weight) max_i Q_i, `[...]`, of `[members, ...]`."""
    return weight * q.amin(0) + (1 - weight) * q.amax(0)


class BCQ(OfflineAlgorithm):
    """The best of several actions of a behavior model, each perturbed a little toward a larger Q.

        L_mu  = E [ |a - mu(s, z)|^2 / dim(a) + KL(q(z | s, a) || N(0, I)) / dim(z) ],  z ~ q(. | s, a)
        a_k   = clip(a~_k + phi tanh(xi(s, a~_k))),  a~_k = mu(s, z_k),  z_k ~ clip(N(0, I))
        y     = r + discount max_k ( lambda min_i Q'_i(s', a_k) + (1 - lambda) max_i Q'_i(s', a_k) )
        L_Q   = sum_i E [ (y - Q_i(s, a))^2 ]
        L_xi  = - E [ Q_1(s, a_1) ]
        pi(s) = argmax_{a_k} Q_1(s, a_k)

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        phi: Largest perturbation of each dimension of an action; 0 for none.
        soft_minimum_weight: lambda, the weight of the smaller target Q.
        target_candidates: Actions at each next observation, of which the best backs up.
        acting: How an action is chosen.
        critic: The critic, with two hidden layers, the second of three quarters of `hidden_dim`.
        learning_rate: Step size of the autoencoder and of the perturbation.
        vae_hidden_dim: Width of the hidden layers of the autoencoder.
        hidden_dim: Width of the first hidden layer of the perturbation; the second has three quarters.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        phi: NonNegative = 0.05,
        soft_minimum_weight: UnitInterval = 0.75,
        target_candidates: Count = 10,
        acting: Acting = Acting(candidates=100),
        critic: CriticOptions = CriticOptions(learning_rate=1e-3, hidden_dim=400),
        learning_rate: Positive = 1e-3,
        vae_hidden_dim: Width = 750,
        hidden_dim: Width = 400,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, 0, **common)
        self.phi = phi
        self.soft_minimum_weight = soft_minimum_weight
        self.target_candidates = target_candidates
        self.acting = acting
        self.critic_options = critic
        self.learning_rate = learning_rate
        self.latent_dim = 2 * action_dim
        self.behavior = ActionVAE(observation_dim, action_dim, self.latent_dim, vae_hidden_dim)
        self.critic = EnsembleQ(
            observation_dim, action_dim, narrowing(critic.hidden_dim), layer_norm=False, activation=nn.ReLU
        )
        self.perturbation = mlp((observation_dim + action_dim, *narrowing(hidden_dim), action_dim), nn.ReLU)
        self.target_critic, self.target_perturbation = frozen_copy(self.critic), frozen_copy(self.perturbation)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for each network."""
        return {
            "behavior": OptimizerSpec((self.behavior,), self.learning_rate),
            "critic": OptimizerSpec((self.critic,), self.critic_options.learning_rate),
            "perturbation": OptimizerSpec((self.perturbation,), self.learning_rate),
        }

    def targets(self) -> tuple[Target, ...]:
        """Critic and perturbation."""
        rate = self.critic_options.target_rate
        return (
            Target(self.critic, self.target_critic, rate),
            Target(self.perturbation, self.target_perturbation, rate),
        )

    # ---------------------------------------------------------------- candidates

    def decode(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Return behavior actions `[batch, count, action_dim]` of normal noise `[batch, count, latent_dim]`."""
        return self.behavior.decode(observations[:, None], noise.clamp(-LATENT_LIMIT, LATENT_LIMIT))

    def perturbed(self, perturbation: nn.Module, observations: Tensor, actions: Tensor) -> Tensor:
        """Return behavior actions `[batch, count, action_dim]`, each moved by at most phi and clamped to the box."""
        change = torch.tanh(perturbation(concatenate(observations[:, None], actions)))
        return self.units.clamp(actions + self.phi * change)

    def sample_behavior_in_training(self, observations: Tensor, count: int) -> Tensor:
        """Return behavior actions at each observation, `[batch, count, action_dim]`."""
        return self.decode(observations, self.noise.normal(len(observations), count, self.latent_dim))

    # ---------------------------------------------------------------- losses

    def behavior_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """The negative evidence bound of the autoencoder, with weights of the authors."""
        mean, std = self.behavior.encode(batch.observations, batch.actions)
        latents = mean + std * self.noise.normal(*mean.shape)
        error = (self.behavior.decode(batch.observations, latents) - batch.actions).square().mean()
        divergence = -0.5 * (1 + 2 * std.log() - mean.square() - std.square()).mean()
        loss = error + DIVERGENCE_WEIGHT * divergence
        return loss, {"behavior_loss": loss.detach(), "reconstruction_error": error.detach()}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Bootstrapping from the best candidate by the soft minimum."""
        observations = batch.next_observations
        with torch.no_grad():
            candidates = self.sample_behavior_in_training(observations, self.target_candidates)
            candidates = self.perturbed(self.target_perturbation, observations, candidates)
            next_q = soft_minimum(self.target_critic(observations[:, None], candidates), self.soft_minimum_weight)
            goal = bootstrapped(batch, next_q.amax(-1), self.critic_options.discount)
        q = self.critic(batch.observations, batch.actions)
        loss = ensemble_loss(q, goal)
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}

    def perturbation_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Q_1 of a perturbed behavior action."""
        with torch.no_grad():
            actions = self.sample_behavior_in_training(batch.observations, 1)
        actions = self.perturbed(self.perturbation, batch.observations, actions)
        loss = -self.critic(batch.observations[:, None], actions)[0].mean()
        return loss, {"perturbation_loss": loss.detach()}

    def validation_losses(self, batch: Batch) -> Info:
        """The three losses."""
        return {**self.behavior_loss(batch)[1], **self.critic_loss(batch)[1], **self.perturbation_loss(batch)[1]}

    # ---------------------------------------------------------------- the algorithm

    def update(self, batch: Batch) -> Info:
        """The behavior model, the critic, the perturbation; `EMATargets` moves the targets."""
        losses = {
            "behavior": self.behavior_loss,
            "critic": self.critic_loss,
            "perturbation": self.perturbation_loss,
        }
        return self.minimize_in_turn(losses, batch)

    def sample_candidates(self, observations: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """Return behavior actions at each observation, `[batch, count, action_dim]`."""
        noise = draw_noise(observations, count, self.latent_dim, generator=generator)
        return self.decode(observations, noise)

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the candidate of the largest Q_1."""
        candidates = self.sample_candidates(observations, self.acting.candidates, generator)
        candidates = self.perturbed(self.perturbation, observations, candidates)
        q = self.value_of(observations[:, None], candidates)
        return select(candidates, q, self.acting.selection_temperature, generator)

    def sample_behavior(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample the behavior model itself."""
        return self.sample_candidates(observations, 1, generator)[:, 0]

    def actors(self) -> dict[str, Actor]:
        """The policy and, to compare with, the behavior model."""
        return {"policy": self.sample_actions, "behavior": self.sample_behavior}

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q_1, which selects."""
        q: Tensor = self.critic(observations, actions)[0]
        return q
