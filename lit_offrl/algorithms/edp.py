"""Efficient Diffusion Policy (Kang, Ma, Du, Pang and Yan, 2023, arXiv 2305.20081).

The loss of the policy needs no chain: the action that is improved is the estimate of the clean action from the noisy
one that behavior cloning uses anyway. Only the critic's target samples actions, and not with `loss: iql`.

What the authors' code decides, and we with it:

1. The estimate is clipped to the box; it belongs to the same step and noise as the loss of behavior cloning.
2. `td3` takes one of the two Q networks at random, and scales it by its own mean |Q|; in Diffusion-QL the scale is the
   other one's.
3. `crr` and `iql` weight the log-likelihood of the data's action under a normal distribution around the estimate, with
   a deviation of 1 in every dimension. The value that `crr` subtracts is the mean of Q over ten actions of it.
4. The policy is trained with Q as it is before the critic's step. With `iql`, V comes first; Q follows the policy.
5. Candidates are compared by Q itself, not by the target Q. One is drawn by a softmax.
6. Of the table of settings for each task the code reads the norm of clipped gradients alone.

Ours: DPM-Solver++ of order 2 at whole steps, in the code DPM-Solver of order 3 at fractions of them; the gradients of
both Q networks are clipped by their common norm, in the code each by its own; with `iql` Q's loss is a mean over both
networks, in the code a sum; the initial weights and the sinusoids of a step are those of Diffusion-QL.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Info, OptimizerSpec
from lit_offrl.algorithms.critic_losses import advantage_weights, implicit_target_loss, implicit_v_loss
from lit_offrl.algorithms.dql import DQL
from lit_offrl.algorithms.options import ImplicitQ
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import x0_from_epsilon
from lit_offrl.diffusion.samplers import sample_dpm_singlestep
from lit_offrl.diffusion.schedules import DiscreteVP
from lit_offrl.errors import require
from lit_offrl.networks.critics import ValueNetwork
from lit_offrl.networks.policies import Gaussian
from lit_offrl.ranges import NonNegative, Positive, Range

VALUE_ACTIONS = 10  # actions of each state whose mean Q is the value of `crr` (code)
LARGEST_WEIGHTS = {"crr": 20.0, "iql": 100.0}
SOLVER_STEPS = 15  # evaluations of `dpm`


class EDP(DQL):
    """A diffusion policy that is improved at a one-step estimate of its action.

        a^    = clip((a_n - sigma_n epsilon_theta(a_n, n, s)) / alpha_n),  a_n = alpha_n a + sigma_n epsilon
        L     = E [ || epsilon - epsilon_theta(a_n, n, s) ||^2 / action_dim ] + L_loss

        L_td3 = - alpha E [ Q_i(s, a^) ] / mean|Q_i(s, a^)|,  i at random
        L_crr = - E [ min(exp(beta_crr (min_i Q_i(s, a) - E min_i Q_i(s, a^ + xi))), 20) log N(a; a^, 1) ]
        L_iql = - E [ min(exp(beta_iql (min_i Q'_i(s, a) - V(s))), 100) log N(a; a^, 1) ]

    With `td3` and `crr` the critic is that of `DQL`, with `iql` that of `IQL`.

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        loss: What improves the policy: `td3`, `crr` or `iql`.
        alpha: Weight of Q in `td3`; 0 clones the behavior.
        beta_crr: Inverse temperature of the weights of `crr`.
        beta_iql: Inverse temperature of the weights of `iql`.
        diffusion_steps: Steps N of the diffusion; the authors give `dpm` 1000.
        sampler: How an action is sampled: `ddpm`, by the whole chain, or `dpm`, by DPM-Solver++ in 15 evaluations. All
            of these are part of a compiled update with `td3` and `crr`, so that compiling it takes minutes;
            `--compile=false` avoids that.
        critic: The critic, with three hidden layers; `expectile` is that of `iql`.
        clip: Bound of the estimate of the clean action, and so of the actions.
        **options: The other options of `DQL`, without `eta`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        loss: Literal["td3", "crr", "iql"] = "td3",
        alpha: NonNegative = 2.0,
        beta_crr: NonNegative = 1.0,
        beta_iql: NonNegative = 3.0,
        diffusion_steps: Annotated[int, Range(1, 1000)] = 100,
        sampler: Literal["ddpm", "dpm"] = "ddpm",
        critic: ImplicitQ = ImplicitQ(),
        clip: Positive = 1.0,
        **options: Any,
    ) -> None:
        enough = sampler == "ddpm" or diffusion_steps > SOLVER_STEPS
        require(
            enough, "model.init_args.diffusion_steps", f"above {SOLVER_STEPS} with the sampler dpm", diffusion_steps
        )
        super().__init__(
            observation_dim,
            action_dim,
            eta=1.0,
            diffusion_steps=diffusion_steps,
            clip=clip,
            critic=critic,
            **options,
        )
        self.loss = loss
        self.alpha = alpha
        self.betas = {"crr": beta_crr, "iql": beta_iql}
        self.expectile = critic.expectile
        self.schedule = DiscreteVP(diffusion_steps, kind="linear")
        self.levels = self.schedule.levels()
        self.sampler = sampler
        if sampler == "dpm":
            # evenly spaced from the last step to the first
            at = [round(i * (diffusion_steps - 1) / SOLVER_STEPS) for i in range(SOLVER_STEPS + 1)]
            self.levels = tuple(self.levels[i] for i in at)
            self.noises_per_action = 1
        if loss == "iql":
            self.v = ValueNetwork(observation_dim, (critic.hidden_dim,) * 3)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """Those of `DQL`, and with `iql` one for V."""
        specs = super().optimizer_specs()
        if self.loss == "iql":
            specs["v"] = OptimizerSpec((self.v,), self.critic_options.learning_rate, clip_norm=self.clip_norm)
        return specs

    def denoise(self, actor: nn.Module, observations: Tensor, noise: Tensor) -> Tensor:
        """Return the actions that the sampler makes of noise, see `DQL.denoise`."""
        if self.sampler == "ddpm":
            return super().denoise(actor, observations, noise)
        denoise = self.denoiser(actor, observations[:, None])
        actions = sample_dpm_singlestep(
            lambda noisy_actions, level: self.bounded(denoise(noisy_actions, level)), noise[:, 0], self.levels
        )
        return self.bounded(actions)

    def bounded(self, actions: Tensor) -> Tensor:
        """Return actions clipped to the box."""
        return actions.clamp(-self.clip, self.clip)

    # ---------------------------------------------------------------- losses

    def v_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Expectile regression of V, with `iql`."""
        return implicit_v_loss(self.v, self.target_critic, batch, self.expectile)

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Bootstrapping from the target actor, or with `iql` from V."""
        if self.loss == "iql":
            return implicit_target_loss(self.critic, self.v, batch, self.critic_options.discount)
        return super().critic_loss(batch)

    def approximate(self, noisy_actions: Tensor, step: Tensor, epsilon: Tensor) -> Tensor:
        """Return a^ of the noise that is predicted at the integers `step`, `[batch]`."""
        alpha, sigma = self.schedule.alpha(step)[:, None], self.schedule.sigma(step)[:, None]
        return self.bounded(x0_from_epsilon(noisy_actions, epsilon, alpha, sigma))

    def q_loss(self, observations: Tensor, actions: Tensor) -> Tensor:
        """One Q network at a^, on its own scale (`td3`)."""
        one, other = self.critic(observations, actions).unbind(0)
        q = torch.where(self.noise.uniform(1, shared=True) > 0.5, one, other)
        return -self.alpha * q.mean() / self.noise.all_rows(q.detach().abs()).mean()

    @torch.no_grad()
    def weights(self, batch: Batch, actions: Tensor) -> Tensor:
        """Return the weights of the data's actions, `[batch]`, with `crr` for the policy's estimates a^."""
        observations = batch.observations
        if self.loss == "iql":
            advantages = self.target_critic(observations, batch.actions).amin(0) - self.v(observations)
        else:
            noise = self.noise.normal(len(actions), VALUE_ACTIONS, self.action_dim)
            values = self.critic(observations[:, None], actions[:, None] + noise).amin(0).mean(-1)
            advantages = self.critic(observations, batch.actions).amin(0) - values
        return advantage_weights(advantages, self.betas[self.loss], LARGEST_WEIGHTS[self.loss])

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Behavior cloning, and the improvement at a^."""
        step, noisy_actions, epsilon = self.noised(batch)
        predicted = self.actor(noisy_actions, step, batch.observations)
        bc_loss = (predicted - epsilon).square().mean()
        actions = self.approximate(noisy_actions, step, predicted)
        info = {"bc_loss": bc_loss.detach()}
        if self.loss == "td3":
            improvement = self.q_loss(batch.observations, actions)
        else:
            weights = self.weights(batch, actions)
            likelihood = Gaussian(actions, torch.ones_like(actions))
            improvement = (weights * likelihood.cloning_loss(batch.actions)).mean()
            info["weight_mean"] = weights.mean()
        loss = bc_loss + improvement
        return loss, {"actor_loss": loss.detach(), "improvement_loss": improvement.detach(), **info}

    def validation_losses(self, batch: Batch) -> Info:
        """All losses."""
        v_info = self.v_loss(batch)[1] if self.loss == "iql" else {}
        return {**v_info, **super().validation_losses(batch)}

    def update(self, batch: Batch) -> Info:
        """V where there is one, the actor, the critic; `EMATargets` moves the targets."""
        losses = {"actor": self.actor_loss, "critic": self.critic_loss}
        if self.loss == "iql":
            losses = {"v": self.v_loss, **losses}
        return self.minimize_in_turn(losses, batch)

    # ---------------------------------------------------------------- acting

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller Q."""
        q: Tensor = self.critic(observations, actions).amin(0)
        return q
