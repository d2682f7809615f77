"""Implicit Diffusion Q-learning (Hansen-Estruch et al., 2023, arXiv 2304.10573).

What the authors' code decides in the class that its scripts use, and what we do:

1. The actor is a diffusion model of the behavior. Q enters only when acting: of N actions the one with the largest
   min_i Q'_i is chosen, Q' being the target networks. The paper's resampling by expectile weights is not in that class.
2. An update steps the actor, V and Q once each, in this order, all on the whole batch of 512.
3. Actions are sampled by the moving average of the actor. The chain, not the estimate of the clean action, is clipped
   to the box after every step; the noise of a step has variance beta_n, and the last step adds none.
4. The noise prediction error is a sum over the action's dimensions.
5. V has a LayerNorm on its input and none after its hidden layers; Q has none.
6. The actor is stepped by AdamW with a cosine decay over the training, Q and V by Adam at a constant rate.

Ours differs in three details. Steps count from 1 to N, in the code from 0, and the steps of a batch are stratified. All
linear layers begin as Xavier's, in the code all but those inside the residual blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Actor, Info, OfflineAlgorithm, OptimizerSpec, Target, frozen_copy, select
from lit_offrl.algorithms.critic_losses import implicit_target_loss, implicit_v_loss
from lit_offrl.algorithms.options import Acting, ImplicitQ
from lit_offrl.algorithms.vp_diffusion import noised_at_steps
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import as_denoiser
from lit_offrl.diffusion.samplers import sample_ddpm
from lit_offrl.diffusion.schedules import DiscreteVP
from lit_offrl.networks.critics import EnsembleQ, ValueNetwork
from lit_offrl.networks.embeddings import LearnedFourierEmbedding
from lit_offrl.networks.mlp import mlp, xavier_uniform_
from lit_offrl.networks.policies import ResidualDenoiser
from lit_offrl.ranges import Count, Fraction, NonNegative, Positive, ProperFraction, Width

TIME_WIDTH = 128  # of the Fourier features; the layers after them are twice as wide


class IDQL(OfflineAlgorithm):
    """A diffusion model of the behavior, from whose samples the critic of implicit Q-learning selects.

        L_V   = E [ L_tau( min_i Q'_i(s, a) - V(s) ) ],  L_tau(u) = |tau - 1(u < 0)| u^2
        L_Q   = E [ (r + discount V(s') - Q_i(s, a))^2 ]
        L_mu  = E || epsilon(a^n, n, s) - epsilon ||^2,  a^n = alpha_n a + sigma_n epsilon
        pi(s) = argmax_k min_i Q'_i(s, a_k),  a_1 .. a_N ~ mu(. | s)

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        diffusion_steps: Length of the diffusion.
        clip: Bound to which actions are clipped after every step of sampling; null leaves them unbounded.
        dropout: Share of the actor's hidden values that is dropped in training.
        critic: The critic, Q and V, with two hidden layers each.
        acting: How an action is chosen; the paper compares 16, 64 and 256 candidates.
        learning_rate: Step size of the actor.
        weight_decay: Weight decay of the actor.
        actor_target_rate: Rate at which the moving average of the actor moves.
        hidden_dim: Width of the actor's three residual blocks.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        diffusion_steps: Count = 5,
        clip: Positive | None = 1.0,
        dropout: ProperFraction = 0.1,
        critic: ImplicitQ = ImplicitQ(),
        acting: Acting = Acting(candidates=64),
        learning_rate: Positive = 3e-4,
        weight_decay: NonNegative = 1e-4,
        actor_target_rate: Fraction = 1e-3,
        hidden_dim: Width = 256,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, 0, **common)
        self.clip = clip
        self.dropout = dropout
        self.critic_options = critic
        self.acting = acting
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.actor_target_rate = actor_target_rate
        self.hidden_dim = hidden_dim
        self.schedule = DiscreteVP(diffusion_steps)
        self.levels = self.schedule.levels()

        features = 2 * TIME_WIDTH
        time = nn.Sequential(LearnedFourierEmbedding(TIME_WIDTH), *mlp((TIME_WIDTH, features, features), nn.SiLU))
        self.actor = ResidualDenoiser(observation_dim, action_dim, time, features, hidden_dim)
        hidden = (critic.hidden_dim,) * 2
        q = EnsembleQ(observation_dim, action_dim, hidden, layer_norm=False, activation=nn.ReLU)
        v = nn.Sequential(nn.LayerNorm(observation_dim), ValueNetwork(observation_dim, hidden, nn.ReLU))
        self.critic = nn.ModuleDict({"q": q, "v": v})
        xavier_uniform_(self)
        self.target_actor, self.target_q = frozen_copy(self.actor), frozen_copy(q)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """AdamW for the actor, one Adam for each part of the critic."""
        rate = self.critic_options.learning_rate
        return {
            "actor": OptimizerSpec((self.actor,), self.learning_rate, cosine=True, weight_decay=self.weight_decay),
            "v": OptimizerSpec((self.critic["v"],), rate),
            "q": OptimizerSpec((self.critic["q"],), rate),
        }

    def targets(self) -> tuple[Target, ...]:
        """The actor that is sampled, and the Q networks that V is regressed on and that select."""
        return (
            Target(self.actor, self.target_actor, self.actor_target_rate),
            Target(self.critic["q"], self.target_q, self.critic_options.target_rate),
        )

    # ---------------------------------------------------------------- losses

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Noise prediction at a random step of the diffusion."""
        step, noisy_actions, epsilon = noised_at_steps(self.schedule, batch.actions, self.noise)
        masks = self.noise.dropout_masks(self.dropout, len(epsilon), len(self.actor.blocks), self.hidden_dim)
        error = self.actor(noisy_actions, step, batch.observations, masks) - epsilon
        loss: Tensor = error.square().sum(-1).mean()
        return loss, {"behavior_loss": loss.detach()}

    def v_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Expectile regression on the smaller target Q."""
        return implicit_v_loss(self.critic["v"], self.target_q, batch, self.critic_options.expectile)

    def q_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Bootstrapping from V."""
        return implicit_target_loss(self.critic["q"], self.critic["v"], batch, self.critic_options.discount)

    # ---------------------------------------------------------------- the algorithm

    def validation_losses(self, batch: Batch) -> Info:
        """The three losses."""
        return {**self.actor_loss(batch)[1], **self.v_loss(batch)[1], **self.q_loss(batch)[1]}

    def update(self, batch: Batch) -> Info:
        """Step the actor, V and Q; `EMATargets` moves the targets."""
        return self.minimize_in_turn({"actor": self.actor_loss, "v": self.v_loss, "q": self.q_loss}, batch)

    # ---------------------------------------------------------------- acting

    @torch.no_grad()
    def sample(self, observations: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """Return `count` actions of the averaged actor at each of `[batch, observation_dim]`."""
        shape, like = (self.schedule.steps, observations.shape[0], count, self.action_dim), observations
        noise = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
        denoise = as_denoiser(lambda x, step: self.target_actor(x, step, observations[:, None]))
        return sample_ddpm(denoise, noise[0], self.levels, noise[1:], clip_path=self.clip, variance="forward")

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample candidates, and select the one of the largest target Q."""
        actions = self.sample(observations, self.acting.candidates, generator)
        q = self.value_of(observations[:, None], actions)
        return select(actions, q, self.acting.selection_temperature, generator)

    def sample_behavior(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample the averaged actor once: behavior cloning."""
        return self.sample(observations, 1, generator)[:, 0]

    def actors(self) -> dict[str, Actor]:
        """The policy and, to compare with, the behavior model."""
        return {"policy": self.sample_actions, "behavior": self.sample_behavior}

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller target Q."""
        q: Tensor = self.target_q(observations, actions).amin(0)
        return q
