"""Diffusion Actor-Critic (Fang, Liu, Zhang, Yang and Zhang, 2025, arXiv 2405.20555).

What the authors' code decides, and we with it:

1. Both terms of the actor's loss are means over the dimensions of the action, too. The gradient of Q is that of the
   mean of the target critics, taken at the noisy action, and is divided by the mean |Q| of all target critics at the
   data's actions.
2. Acting samples from the online actor and takes the highest mean of the target critics; the critic's target samples
   from the averaged actor.
3. Step sizes decay to 0 by a cosine; gradients are clipped to norm 1.

The weight eta follows the cloning loss of the present step, as in flow-rl's port; the authors' code computes that loss
once more with the new actor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_offrl.algorithms.base import Info, OfflineAlgorithm, OptimizerSpec, Target, frozen_copy, select
from lit_offrl.algorithms.critic_losses import bootstrapped, lower_confidence_bound
from lit_offrl.algorithms.options import Acting, EnsembleCritic
from lit_offrl.algorithms.vp_diffusion import noised_at_steps
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import as_denoiser
from lit_offrl.diffusion.samplers import sample_ddpm
from lit_offrl.diffusion.schedules import DiscreteVP
from lit_offrl.networks.critics import EnsembleQ
from lit_offrl.networks.embeddings import StepEmbedding
from lit_offrl.networks.gradients import action_gradient
from lit_offrl.networks.policies import StepDenoisingMLP
from lit_offrl.ranges import Count, Finite, NonNegative, Positive, Width

SMALLEST_ETA, LARGEST_ETA = 1e-3, 100.0
ACTOR_TARGET_EVERY, ACTOR_TARGET_AFTER = 5, 1000


class DAC(OfflineAlgorithm):
    """A diffusion policy whose noise prediction is pushed along the gradient of Q at the noisy action.

        L_pi  = eta E [ |e(a_t, t, s) - epsilon|^2 ] + E [ sigma_t e(a_t, t, s) . grad_a Q'(s, a_t) ] / mean|Q'(s, a)|
        y     = r + discount LCB_k [ mean_a' Q'_k(s', a') ],  LCB_k = mean_k - rho std_k,  a' ~ pi'(. | s')
        L_Q   = mean_k E [ (y - Q_k(s, a))^2 ]
        eta  <- eta + eta_rate (|e - epsilon|^2 - threshold), the cloning loss held near the threshold

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        eta: Initial weight of the cloning loss.
        eta_rate: Step size of that weight; 0 keeps it.
        threshold: The cloning loss that the weight aims at.
        rho: Deviations of the critics below their mean at which values are taken.
        max_backup: The target takes the largest of the sampled actions' values instead of their mean (AntMaze).
        samples: Actions that the target samples at a next observation.
        diffusion_steps: Length of the chain.
        critic: The critics, with three hidden layers.
        acting: How an action is chosen.
        learning_rate: Step size of the actor.
        clip_norm: Bound of the norm of gradients.
        hidden_dim: Width of the actor's three hidden layers.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    eta: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        eta: Positive = 1.0,
        eta_rate: NonNegative = 1e-3,
        threshold: Finite = 1.0,
        rho: NonNegative = 0.0,
        max_backup: bool = False,
        samples: Count = 10,
        diffusion_steps: Count = 5,
        critic: EnsembleCritic = EnsembleCritic(),
        acting: Acting = Acting(candidates=10),
        learning_rate: Positive = 3e-4,
        clip_norm: Positive = 1.0,
        hidden_dim: Width = 256,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, 0, **common)
        self.eta_rate, self.threshold = eta_rate, threshold
        self.rho, self.max_backup, self.samples = rho, max_backup, samples
        self.critic_options, self.acting = critic, acting
        self.learning_rate, self.clip_norm = learning_rate, clip_norm
        self.register_buffer("eta", torch.tensor(float(eta)))
        self.schedule = DiscreteVP(diffusion_steps)
        self.levels = self.schedule.levels()
        embedding = StepEmbedding(diffusion_steps, (16, 32, 32), activate_last=False)
        self.actor = StepDenoisingMLP(observation_dim, action_dim, diffusion_steps, (hidden_dim,) * 3, embedding)
        self.critic = EnsembleQ(
            observation_dim, action_dim, (critic.hidden_dim,) * 3, members=critic.members, layer_norm=False
        )
        self.target_actor, self.target_critic = frozen_copy(self.actor), frozen_copy(self.critic)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for the critics, one for the actor."""
        rates = {"critic": self.critic_options.learning_rate, "actor": self.learning_rate}
        return {
            name: OptimizerSpec((getattr(self, name),), rate, cosine=True, clip_norm=self.clip_norm)
            for name, rate in rates.items()
        }

    def targets(self) -> tuple[Target, ...]:
        """The critics at every step, the actor at some."""
        rate = self.critic_options.target_rate
        return (
            Target(self.critic, self.target_critic, rate),
            Target(self.actor, self.target_actor, rate, ACTOR_TARGET_EVERY, ACTOR_TARGET_AFTER),
        )

    def sample(self, actor: StepDenoisingMLP, observations: Tensor, noise: Tensor) -> Tensor:
        """Return actions `[batch, samples, action_dim]` of an actor, of noise `[steps, *actions]`."""
        denoise = as_denoiser(lambda x, step: actor(x, step, observations[:, None]))
        return self.units.clamp(sample_ddpm(denoise, noise[0], self.levels, noise[1:], clip=1.0))

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Bootstrapping from a lower bound of the value of the averaged actor's actions."""
        with torch.no_grad():
            shape = len(batch.rewards), self.schedule.steps, self.samples, self.action_dim
            actions = self.sample(self.target_actor, batch.next_observations, self.noise.normal(*shape).movedim(1, 0))
            next_q = self.target_critic(batch.next_observations[:, None], actions)
            values = next_q.amax(-1) if self.max_backup else next_q.mean(-1)
            goal = bootstrapped(batch, lower_confidence_bound(values, self.rho), self.critic_options.discount)
        q = self.critic(batch.observations, batch.actions)
        loss = (q - goal).square().mean()
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the actor's loss, and the cloning loss in it over the rows of all ranks."""
        step, noisy_actions, noise = noised_at_steps(self.schedule, batch.actions, self.noise)
        sigma = self.schedule.sigma(step)[:, None]
        with torch.no_grad():
            slope = action_gradient(lambda a, s: self.target_critic(s, a).mean(0), noisy_actions, batch.observations)
            sizes = self.target_critic(batch.observations, batch.actions).abs().mean(0)
            scale = self.noise.all_rows(sizes).mean()
        epsilon = self.actor(noisy_actions, step, batch.observations)
        errors = (epsilon - noise).square().mean(-1)
        loss = self.eta * errors.mean() + (sigma * epsilon * slope).mean() / scale
        return loss, self.noise.all_rows(errors.detach()).mean()

    def validation_losses(self, batch: Batch) -> Info:
        """The critics' loss and the cloning loss."""
        return {**self.critic_loss(batch)[1], "cloning_loss": self.actor_loss(batch)[1]}

    def update(self, batch: Batch) -> Info:
        """Step the critics, the actor, and the weight of cloning; `EMATargets` moves the targets."""
        critic_loss, info = self.critic_loss(batch)
        self.minimize("critic", critic_loss)
        actor_loss, cloning = self.actor_loss(batch)
        self.minimize("actor", actor_loss)
        if self.eta_rate:
            excess = (cloning - self.threshold).clamp(-1, 1)
            self.eta.add_(self.eta_rate * excess).clamp_(SMALLEST_ETA, LARGEST_ETA)
        return {**info, "actor_loss": actor_loss.detach(), "cloning_loss": cloning, "eta": self.eta.clone()}

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample candidates from the actor, select the one of the highest mean Q."""
        shape = self.schedule.steps, observations.shape[0], self.acting.candidates, self.action_dim
        noise = torch.randn(*shape, generator=generator, device=observations.device)
        actions = self.sample(self.actor, observations, noise)
        if self.acting.candidates == 1:
            return actions[:, 0]
        q = self.target_critic(observations[:, None], actions).mean(0)
        return select(actions, q, self.acting.selection_temperature, generator)

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The mean of the target critics."""
        q: Tensor = self.target_critic(observations, actions).mean(0)
        return q
