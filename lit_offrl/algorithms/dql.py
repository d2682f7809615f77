"""Diffusion-QL (Wang, Hunt and Zhou, 2023, arXiv 2208.06193).

What the authors' code decides, and we with it:

1. The estimate of the clean action is clipped at every step of the chain, and the noise of a step has the posterior
   variance. The gradient of Q goes back through all steps; clipped estimates pass none on.
2. Q's loss takes one of the two Q networks and scales it by the mean |Q| of the other. Which one is drawn at every
   gradient step; the scale takes no gradients.
3. With `max_q_backup` each target Q takes its own maximum over the actions, and the smaller of the two is the target.
4. The target actor does not move in the first 1000 steps, and then at every fifth.
5. Candidates for an action come from the actor itself, not from the target actor. One of them is drawn by a softmax
   over the smaller target Q.
6. The learning rates are constant: the code's decay ends at 0.999 of the first rate. Only the actor's depends on the
   task. The gradients of both networks are clipped.

Ours: the steps of the chain are counted from 1, the code's from 0; the target actor moves at the steps 1005, 1010, ...,
in the code at 1001, 1006, ....
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Info, OfflineAlgorithm, OptimizerSpec, Target, frozen_copy, select
from lit_offrl.algorithms.critic_losses import bootstrapped, ensemble_loss
from lit_offrl.algorithms.options import Acting, CriticOptions
from lit_offrl.algorithms.vp_diffusion import noised_at_steps
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import Denoise, as_denoiser
from lit_offrl.diffusion.samplers import sample_ddpm
from lit_offrl.diffusion.schedules import DiscreteVP
from lit_offrl.networks.critics import EnsembleQ
from lit_offrl.networks.embeddings import StepEmbedding
from lit_offrl.networks.policies import StepDenoisingMLP
from lit_offrl.ranges import Count, Fraction, NonNegative, Positive, Range, Steps, Width

BACKUP_ACTIONS = 10  # actions of each next state over which `max_q_backup` takes the maximum (code)


class DQL(OfflineAlgorithm):
    """A diffusion policy that clones the behavior and maximizes Q through its whole chain of denoising.

        y        = r + discount min_i Q'_i(s', a'^0),  a'^0 ~ pi'(s')
        L_Q      = sum_i E [ (y - Q_i(s, a))^2 ]
        L_d      = E [ || epsilon - epsilon_theta(alpha_n a + sigma_n epsilon, n, s) ||^2 / action_dim ]
        L_actor  = L_d - eta E [ Q_i(s, a^0) ] / mean|Q_j(s, a^0)|,  a^0 ~ pi_theta(s), i and j in random order

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        eta: Weight of Q; 0 clones the behavior.
        diffusion_steps: Steps N of the diffusion.
        clip: Bound of the estimate of the clean action in the chain, and so of the actions.
        max_q_backup: Let the target of Q take the maximum over ten actions.
        critic: The critic, with three hidden layers.
        acting: How an action is chosen; one candidate is D-QL@1 of later papers.
        learning_rate: Step size of the actor.
        clip_norm: Norm to which each optimizer's gradient is clipped.
        ema_rate: Rate at which the target actor moves.
        ema_every: The target actor moves at every so many gradient steps.
        ema_after: Gradient steps before the first move of the target actor.
        hidden_dim: Width of the actor's three hidden layers.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        eta: NonNegative = 1.0,
        diffusion_steps: Annotated[int, Range(1, 1000)] = 5,
        clip: Positive = 1.0,
        max_q_backup: bool = False,
        critic: CriticOptions = CriticOptions(),
        acting: Acting = Acting(candidates=50, selection_temperature=1.0),
        learning_rate: Positive = 3e-4,
        clip_norm: Positive = 9.0,
        ema_rate: Fraction = 0.005,
        ema_every: Count = 5,
        ema_after: Steps = 1000,
        hidden_dim: Width = 256,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, 0, **common)
        self.eta = eta
        self.clip = clip
        self.backup_actions = BACKUP_ACTIONS if max_q_backup else 1
        self.critic_options = critic
        self.acting = acting
        self.learning_rate = learning_rate
        self.clip_norm = clip_norm
        self.ema = ema_rate, ema_every, ema_after
        self.schedule = DiscreteVP(diffusion_steps, beta_min=0.1, beta_max=10.0)
        self.levels = self.schedule.levels()
        self.noises_per_action = diffusion_steps
        self.critic = EnsembleQ(observation_dim, action_dim, (critic.hidden_dim,) * 3, layer_norm=False)
        embedding = StepEmbedding(diffusion_steps, (16, 32, 16), activate_last=False)
        self.actor = StepDenoisingMLP(observation_dim, action_dim, diffusion_steps, (hidden_dim,) * 3, embedding)
        self.target_critic, self.target_actor = frozen_copy(self.critic), frozen_copy(self.actor)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for the critic, one for the actor."""
        return {
            "critic": OptimizerSpec((self.critic,), self.critic_options.learning_rate, clip_norm=self.clip_norm),
            "actor": OptimizerSpec((self.actor,), self.learning_rate, clip_norm=self.clip_norm),
        }

    def targets(self) -> tuple[Target, ...]:
        """The critic, and the actor that bootstraps."""
        return (
            Target(self.critic, self.target_critic, self.critic_options.target_rate),
            Target(self.actor, self.target_actor, *self.ema),
        )

    # ---------------------------------------------------------------- the diffusion policy

    def denoiser(self, actor: nn.Module, observations: Tensor) -> Denoise:
        """Return the estimate of the clean action at `[batch, ..., observation_dim]`, as samplers take it."""
        return as_denoiser(lambda noisy_actions, step: actor(noisy_actions, step, observations))

    def denoise(self, actor: nn.Module, observations: Tensor, noise: Tensor) -> Tensor:
        """Return the actions that the chain makes of noise, in the box, `[batch, samples, action_dim]`.

        The last step of the chain returns the clipped estimate of the clean action itself.

        Args:
            actor: Network of the policy.
            observations: `[batch, observation_dim]`.
            noise: Standard normal noise, `[batch, noises_per_action, samples, action_dim]`.
        """
        noise = noise.movedim(1, 0)
        denoise = self.denoiser(actor, observations[:, None])
        return sample_ddpm(denoise, noise[0], self.levels, noise[1:], clip=self.clip, variance="posterior")

    def sample(self, actor: nn.Module, observations: Tensor, samples: int) -> Tensor:
        """Sample actions in training, `[batch, samples, action_dim]`."""
        noise = self.noise.normal(len(observations), self.noises_per_action, samples, self.action_dim)
        return self.denoise(actor, observations, noise)

    def noised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return steps n, uniform on 1 .. N, `[batch]`, the batch's actions at them, and the noise in these."""
        return noised_at_steps(self.schedule, batch.actions, self.noise, stratified=False)

    # ---------------------------------------------------------------- losses

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Bootstrapping from the smaller target Q of an action of the target actor."""
        with torch.no_grad():
            actions = self.sample(self.target_actor, batch.next_observations, self.backup_actions)
            next_q = self.target_critic(batch.next_observations[:, None], actions).amax(-1).amin(0)
            goal = bootstrapped(batch, next_q, self.critic_options.discount)
        q = self.critic(batch.observations, batch.actions)
        loss = ensemble_loss(q, goal)
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}

    def bc_loss(self, batch: Batch) -> Tensor:
        """Noise prediction at a random step, L_d."""
        step, noisy_actions, epsilon = self.noised(batch)
        loss: Tensor = (self.actor(noisy_actions, step, batch.observations) - epsilon).square().mean()
        return loss

    def q_loss(self, observations: Tensor, actions: Tensor) -> Tensor:
        """One Q network, on the scale of the other."""
        q = self.critic(observations, actions)
        one, other = torch.where(self.noise.uniform(1, shared=True) > 0.5, q, q.flip(0)).unbind(0)
        return -one.mean() / self.noise.all_rows(other.detach().abs()).mean()

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Behavior cloning, and Q of an action of the whole chain."""
        bc_loss = self.bc_loss(batch)
        actions = self.sample(self.actor, batch.observations, 1)[:, 0]
        q_loss = self.q_loss(batch.observations, actions)
        loss = bc_loss + self.eta * q_loss
        return loss, {"actor_loss": loss.detach(), "bc_loss": bc_loss.detach(), "q_loss": q_loss.detach()}

    def validation_losses(self, batch: Batch) -> Info:
        """Both losses."""
        return {**self.critic_loss(batch)[1], **self.actor_loss(batch)[1]}

    def update(self, batch: Batch) -> Info:
        """The critic, then the actor; `EMATargets` moves the targets."""
        return self.minimize_in_turn({"critic": self.critic_loss, "actor": self.actor_loss}, batch)

    # ---------------------------------------------------------------- acting

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample candidates from the actor, select one by a softmax over Q."""
        shape = (observations.shape[0], self.noises_per_action, self.acting.candidates, self.action_dim)
        noise = torch.randn(shape, generator=generator, device=observations.device)
        actions = self.denoise(self.actor, observations, noise)
        if self.acting.candidates == 1:
            return actions[:, 0]
        q = self.value_of(observations[:, None], actions)
        return select(actions, q, self.acting.selection_temperature, generator)

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller target Q."""
        q: Tensor = self.target_critic(observations, actions).amin(0)
        return q
