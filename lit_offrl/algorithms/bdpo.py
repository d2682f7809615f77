"""Behavior-Regularized Diffusion Policy Optimization (Gao et al., 2025, arXiv 2502.04778).

Where the authors' code differs from the paper, and which we follow:

1. sigma_n^2 is beta_n, in sampling and in the penalty (code): with the posterior variance of Eq. 8 and Appendix D the
   penalty at n = 1 is infinite. At n = 1 the sampler adds no noise, but the penalty is still weighted with beta_1.
2. eta: the code's is 5 to 10 times smaller than Table 3. Ours is the code's, whose scale of penalty we share;
   conf/tasks/bdpo.yaml has both.
3. The penalty compares raw noise predictions; the mean that is sampled from has its estimate of a^0 clipped (code).
4. The penalty is summed over action dimensions and diffusion steps and averaged over the sampled paths, also where
   the backup takes the maximum of Q over them (code).
5. The behavior model goes on learning, one step for each of the actor's, at a constant rate (code); frozen in
   Algorithm 1 and in the code's first version, in which its rate decayed over pretraining: an option.
6. Networks are 256 wide on locomotion, 512 on AntMaze (code); 512 everywhere in Table 2.
7. V always has LayerNorm, Q only on AntMaze; all layers start orthogonal with gain sqrt(2); gradients of all networks
   are clipped to norm 1 (code; the paper is silent, or speaks of the actor alone).
8. The actor too maximises the lower confidence bound (code); Eq. 15 has the plain value.
9. Losses are means over the ensemble (code); Eq. 18 is a sum. It matters to the clipping.
10. The actor's cosine schedule counts its own steps, so that its learning rate hardly falls (code).

Ours differs from both in three details that change no expectation. The diffusion steps of a batch are stratified, so
that the number of rows with n = 1 is known beforehand. Target networks are updated after a complete update, so that the
actor uses the target critics before their last averaging step. Minibatches are drawn with replacement, as in the other
algorithms; the code scans a permutation of the data, and shuffles again at its end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Actor, Info, OfflineAlgorithm, OptimizerSpec, Target, frozen_copy, select
from lit_offrl.algorithms.critic_losses import lower_confidence_bound
from lit_offrl.algorithms.options import Acting, EnsembleCritic
from lit_offrl.algorithms.vp_diffusion import noised_at_steps
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import AtLevel, Denoise, as_denoiser, x0_from_epsilon
from lit_offrl.diffusion.samplers import sample_ddim, sample_ddpm
from lit_offrl.diffusion.schedules import DiscreteVP, Level
from lit_offrl.errors import require
from lit_offrl.networks.critics import DiffusionValue, EnsembleQ
from lit_offrl.networks.mlp import orthogonal_
from lit_offrl.networks.policies import StepDenoisingMLP
from lit_offrl.ranges import Count, NonNegative, Positive, Range, Steps, Width

FIGURE_TIMES = (1.0, 0.6, 0.3, 0.1)  # n = 50, 30, 15, 5 of 50, as in Figures 4 and 11


class BDPO(OfflineAlgorithm):
    """A diffusion policy kept close to a behavior diffusion model by the KL divergence along the denoising path.

        l_n(s, a^n) = || mu_n^actor - mu_n^behavior ||^2 / (2 beta_n)                                    (Eqs. 10, 11)
        LCB_k x_k   = mean_k x_k - rho std_k x_k
        y_Q         = r + discount (LCB_k E[Q_k(s', a'^0)] - eta sum_n l_n(s', a'^n))                    (Eqs. 12, 17)
        y_V(a^n)    = LCB_k E[V_k(s, a^{n-1}, n - 1)] - eta l_n(s, a^n),  V at n = 0 being Q                 (Eq. 14)
        L_actor     = - E[ y_V with the actor's own a^{n-1} and l_n ]                                        (Eq. 15)

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        eta: Weight of the penalty.
        rho: Number of deviations of the ensemble by which its lower confidence bound lies below the mean.
        diffusion_steps: Steps N of the diffusion.
        clip: Bound of the estimate of the clean action while sampling; null leaves it unbounded.
        samples: Paths sampled for a target of Q; next states of a path for a target of V and for the actor.
        max_backup: Let the target of Q take the maximum over the sampled actions instead of the mean.
        critic: The ensembles Q and V; cosine decay. With a discount of 0 no path is sampled for the target of Q.
        acting: How an action is chosen.
        behavior_learning_rate: Step size of the behavior model.
        actor_learning_rate: Step size of the actor; cosine decay in its own steps.
        actor_every: The actor steps at every so many gradient steps.
        warmup_steps: Gradient steps of the main phase that train the critics only.
        frozen_behavior: Leave the behavior model, and the copy of it that the penalty refers to, as pretraining made
            them, with a learning rate that decays by a cosine over pretraining; else it is trained along with the
            actor, at a constant learning rate.
        clip_norm: Norm to which each optimizer's gradient is clipped.
        hidden_dim: Width of the policies' four hidden layers.
        pretrain_steps: Gradient steps that train the behavior model only; `max_steps` includes them.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    has_path = True  # the policy makes an action step by step
    kl_weights: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        eta: NonNegative = 0.2,
        rho: NonNegative = 1.0,
        diffusion_steps: Annotated[int, Range(1, 1000)] = 5,
        clip: Positive | None = 1.0,
        samples: Count = 10,
        max_backup: bool = False,
        critic: EnsembleCritic = EnsembleCritic(),
        acting: Acting = Acting(candidates=10),
        behavior_learning_rate: Positive = 3e-4,
        actor_learning_rate: Positive = 1e-5,
        actor_every: Count = 5,
        warmup_steps: Steps = 50_000,
        frozen_behavior: bool = False,
        clip_norm: Positive = 1.0,
        hidden_dim: Width = 256,
        pretrain_steps: Steps = 2_000_000,
        **common: Any,
    ) -> None:
        # A single member has no deviation, and the square root of 0 has no gradient.
        enough = critic.members >= 2 or not rho
        require(enough, "model.init_args.critic.members", "at least 2 (1 where rho is 0)", critic.members)
        super().__init__(observation_dim, action_dim, pretrain_steps, **common)
        self.eta = eta
        self.rho = rho
        self.clip = clip
        self.samples = samples
        self.max_backup = max_backup
        self.critic_options = critic
        self.acting = acting
        self.learning_rates = {
            "behavior": behavior_learning_rate,
            "actor": actor_learning_rate,
            "critic": critic.learning_rate,
        }
        self.actor_every = actor_every
        self.warmup_steps = warmup_steps
        self.frozen_behavior = frozen_behavior
        self.clip_norm = clip_norm

        self.schedule = DiscreteVP(diffusion_steps, beta_min=0.1, beta_max=10.0)
        self.levels = self.schedule.levels()
        betas, sigmas = self.schedule.betas, self.schedule.sigmas
        # of the squared distance of noise predictions in l_n, `[N + 1]`; there is no step 0
        self.register_buffer(
            "kl_weights", (betas / (2 * (1 - betas) * sigmas.square())).nan_to_num(0.0), persistent=False
        )

        sizes, hidden, members = (observation_dim, action_dim), (critic.hidden_dim,) * 3, critic.members
        self.behavior = self.make_policy((hidden_dim,) * 4)
        self.critic = nn.ModuleDict({"q": EnsembleQ(*sizes, hidden, members=members, layer_norm=critic.layer_norm)})
        if self.has_path:
            self.critic["v"] = DiffusionValue(*sizes, diffusion_steps, hidden, members=members)
        orthogonal_(self, math.sqrt(2))
        self.actor = copy.deepcopy(self.behavior)
        self.target_behavior, self.target_actor = frozen_copy(self.behavior), frozen_copy(self.behavior)
        self.target_critic = frozen_copy(self.critic)

    def make_policy(self, hidden: tuple[int, ...]) -> nn.Module:
        """Return the network of a policy; behavior model and actor have the same."""
        return StepDenoisingMLP(self.observation_dim, self.action_dim, self.schedule.steps, hidden)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for each ensemble, one for the behavior model and one for the actor."""
        rates, clip_norm = self.learning_rates, self.clip_norm
        every, after = self.actor_every, self.warmup_steps
        return {
            **{
                name: OptimizerSpec((critic,), rates["critic"], cosine=True, clip_norm=clip_norm)
                for name, critic in self.critic.items()
            },
            "actor": OptimizerSpec((self.actor,), rates["actor"], True, clip_norm, every, after),
            "behavior": OptimizerSpec(
                (self.behavior,),
                rates["behavior"],
                clip_norm=clip_norm,
                early_cosine=self.pretrain_steps if self.frozen_behavior else 0,
            ),
        }

    def targets(self) -> tuple[Target, ...]:
        """Every network has one, which moves when the network does."""
        rate, every, after = self.critic_options.target_rate, self.actor_every, self.warmup_steps
        targets = (
            Target(self.critic, self.target_critic, rate),
            Target(self.actor, self.target_actor, rate, every, after),
            Target(self.behavior, self.target_behavior, rate, early=True),
        )
        moving = Target(self.behavior, self.target_behavior, rate, every, after)
        return targets if self.frozen_behavior else (*targets, moving)

    def begin_main(self) -> None:
        """The actor starts as the behavior model."""
        self.actor.load_state_dict(self.target_behavior.state_dict())
        self.target_actor.load_state_dict(self.target_behavior.state_dict())

    # ---------------------------------------------------------------- paths of denoising

    def step_kl(self, epsilon: Tensor, behavior_epsilon: Tensor, step: Tensor) -> Tensor:
        """Return l_n, `[...]`, of two noise predictions `[..., action_dim]` at the integers `step` that broadcast."""
        return self.kl_weights[step] * (epsilon - behavior_epsilon).square().sum(-1)

    def clean(self, noisy_actions: Tensor, epsilon: Tensor, step: Tensor) -> Tensor:
        """Return the estimate of a^0, not clipped."""
        alpha, sigma = self.schedule.alpha(step)[..., None], self.schedule.sigma(step)[..., None]
        return x0_from_epsilon(noisy_actions, epsilon, alpha, sigma)

    def predictor(self, policy: nn.Module, observations: Tensor) -> AtLevel:
        """Return the noise that a policy's network predicts at `[batch, ..., observation_dim]`."""

        def predict(noisy_actions: Tensor, level: Level) -> Tensor:
            epsilon: Tensor = policy(noisy_actions, level.times(noisy_actions), observations)
            return epsilon

        return predict

    def denoiser(self, policy: nn.Module, observations: Tensor) -> Denoise:
        """Return the estimate of a^0 of a policy's network at `[batch, ..., observation_dim]`, as samplers take it."""
        return as_denoiser(lambda noisy_actions, step: policy(noisy_actions, step, observations))

    def rollout(self, observations: Tensor, *, penalized: bool) -> tuple[Tensor, Tensor]:
        """Sample paths of the target actor at `[batch, observation_dim]`.

        Returns:
            Actions `[batch, samples, action_dim]`, and the penalty summed over each path, averaged over the paths,
            `[batch]`; 0 where it is not asked for.
        """
        states = observations[:, None]
        actor, behavior = (self.predictor(policy, states) for policy in (self.target_actor, self.target_behavior))
        penalties = []

        def denoise(noisy_actions: Tensor, level: Level) -> Tensor:
            epsilon = actor(noisy_actions, level)
            if penalized:
                step = level.times(noisy_actions)
                penalties.append(self.step_kl(epsilon, behavior(noisy_actions, level), step))
            return x0_from_epsilon(noisy_actions, epsilon, level.alpha, level.sigma)

        noise = self.noise.normal(len(observations), self.schedule.steps, self.samples, self.action_dim).movedim(1, 0)
        actions = sample_ddpm(denoise, noise[0], self.levels, noise[1:], clip=self.clip)
        penalty = torch.stack(penalties).sum(0).mean(-1) if penalized else torch.zeros_like(observations[:, 0])
        return actions, penalty

    def noised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return steps n `[batch]`, uniform on 1 .. N and sorted, and a^n of the batch's actions with their noise."""
        return noised_at_steps(self.schedule, batch.actions, self.noise)

    def continuation(
        self, actor: nn.Module, observations: Tensor, noisy_actions: Tensor, step: Tensor, *, penalized: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the soft value of going on with `actor` from a^n (right side of Eq. 14), and its l_n, `[batch]` each.

        `step` is `[batch]` and as `noised` makes it: sorted, so that all rows with n = 1 come first. They need Q, and
        one action, for no noise is added to it; the others need V. Only one row in the middle can be either.
        """
        epsilon = actor(noisy_actions, step, observations)
        x0 = self.clean(noisy_actions, epsilon, step)
        mean = self.schedule.posterior_mean(
            x0 if self.clip is None else x0.clamp(-self.clip, self.clip), noisy_actions, step
        )

        at_most, at_least = -(-len(step) // self.schedule.steps), len(step) // self.schedule.steps
        q = self.lower_bound(self.target_critic["q"](observations[:at_most], mean[:at_most]))
        rest = slice(at_least, None)
        std = self.schedule.betas[step[rest]].sqrt()[:, None, None]
        # Noise for every row, as the rows that need it are not the same on all ranks.
        below = mean[rest, None] + std * self.noise.normal(len(step), self.samples, self.action_dim)[rest]
        v = self.target_critic["v"](observations[rest, None], below, step[rest, None] - 1).mean(-1)
        v = self.lower_bound(v)
        either = slice(at_least, at_most)
        middle = torch.where(step[either] == 1, q[either], v[: at_most - at_least])
        value = torch.cat([q[:at_least], middle, v[at_most - at_least :]])

        if not penalized:
            return value, torch.zeros_like(value)
        with torch.no_grad():
            behavior_epsilon = self.target_behavior(noisy_actions, step, observations)
        penalty = self.step_kl(epsilon, behavior_epsilon, step)
        return value - self.eta * penalty, penalty

    # ---------------------------------------------------------------- losses, in the order of Algorithm 1

    def behavior_loss(self, batch: Batch) -> Tensor:
        """Noise prediction at a random step (Eq. 9, simplified as usual)."""
        step, noisy_actions, epsilon = self.noised(batch)
        loss: Tensor = (self.behavior(noisy_actions, step, batch.observations) - epsilon).square().mean()
        return loss

    def lower_bound(self, values: Tensor) -> Tensor:
        """Return LCB_k of values `[members, ...]` (Eq. 17)."""
        return lower_confidence_bound(values, self.rho)

    def q_loss(self, batch: Batch, *, penalized: bool) -> tuple[Tensor, Info]:
        """Regression of every Q on one target (Eqs. 12, 17 and 18)."""
        with torch.no_grad():
            target, info = batch.rewards, {}
            discount = self.critic_options.discount
            if discount:
                actions, penalty = self.rollout(batch.next_observations, penalized=penalized)
                values = self.target_critic["q"](batch.next_observations[:, None], actions)
                values = self.lower_bound(values.amax(-1) if self.max_backup else values.mean(-1))
                target = target + discount * (1 - batch.terminals) * (values - self.eta * penalty)
                info["path_kl"] = penalty.mean()
        q = self.critic["q"](batch.observations, batch.actions)
        loss = (q - target).square().mean()
        return loss, {"q_loss": loss.detach(), "q_mean": q.detach().mean(), **info}

    def v_loss(self, batch: Batch, *, penalized: bool) -> tuple[Tensor, Info]:
        """Regression of every V on one target (Eqs. 14, 17 and 18)."""
        step, noisy_actions, _ = self.noised(batch)
        with torch.no_grad():
            target, _ = self.continuation(
                self.target_actor, batch.observations, noisy_actions, step, penalized=penalized
            )
        v = self.critic["v"](batch.observations, noisy_actions, step)
        loss = (v - target).square().mean()
        return loss, {"v_loss": loss.detach(), "v_mean": v.detach().mean()}

    def policy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """The actor's next step should be worth most (Eq. 15)."""
        step, noisy_actions, _ = self.noised(batch)
        value, penalty = self.continuation(self.actor, batch.observations, noisy_actions, step, penalized=True)
        return -value.mean(), {"policy_step_kl": penalty.detach().mean()}

    # ---------------------------------------------------------------- the algorithm

    def pretrain_update(self, batch: Batch) -> Info:
        """Train the behavior model."""
        loss = self.behavior_loss(batch)
        self.minimize("behavior", loss)
        return {"behavior_loss": loss.detach()}

    def validation_losses(self, batch: Batch) -> Info:
        """The loss of the behavior model."""
        return {"behavior_loss": self.behavior_loss(batch)}

    def critic_losses(self) -> dict[str, Callable[..., tuple[Tensor, Info]]]:
        """Return the losses of the critics in their order, by the names of their optimizers."""
        return {"q": self.q_loss, "v": self.v_loss}

    def active_at(self, main_step: int) -> tuple[str, ...]:
        """The penalty too: until the actor moves it equals the behavior model, and all penalties are exactly 0."""
        return (*super().active_at(main_step), *(("penalty",) if main_step > self.warmup_steps else ()))

    def update(self, batch: Batch) -> Info:
        """Algorithm 1: critics at every step, the actor at some, after a warm-up; `EMATargets` moves the targets."""
        active = self.active
        info: Info = {}
        for name, critic_loss in self.critic_losses().items():
            loss, critic_info = critic_loss(batch, penalized="penalty" in active)
            self.minimize(name, loss)
            info |= critic_info
        if "actor" in active:
            loss, policy_info = self.policy_loss(batch)
            self.minimize("actor", loss)
            info |= {"policy_loss": loss.detach(), **policy_info}
            if not self.frozen_behavior:
                info |= self.pretrain_update(batch)
        return info

    # ---------------------------------------------------------------- acting

    def sample_policy(
        self, policy: nn.Module, observations: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """Return actions `[batch, samples, action_dim]` of a policy's network."""
        shape = (self.schedule.steps, observations.shape[0], samples, self.action_dim)
        noise = torch.randn(*shape, generator=generator, device=observations.device)
        denoise = self.denoiser(policy, observations[:, None])
        return sample_ddpm(denoise, noise[0], self.levels, noise[1:], clip=self.clip)

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample candidates from the actor, select the one of the highest mean Q, or by a softmax over it.

        Before the main phase there is no actor yet: the behavior model acts.
        """
        if self.gradient_step <= self.main_start:
            return self.sample_behavior(observations, generator)
        actions = self.sample_policy(self.target_actor, observations, self.acting.candidates, generator)
        if self.acting.candidates == 1:
            return actions[:, 0]
        q = self.target_critic["q"](observations[:, None], actions).mean(0)
        return select(actions, q, self.acting.selection_temperature, generator)

    def sample_behavior(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample the behavior model itself: behavior cloning."""
        return self.sample_policy(self.target_behavior, observations, 1, generator)[:, 0]

    def actors(self) -> dict[str, Actor]:
        """The policy and, to compare with, the behavior model."""
        return {"policy": self.sample_actions, "behavior": self.sample_behavior}

    # ---------------------------------------------------------------- pictures of 2-D bandits (Figures 4 and 11)

    def _figure_steps(self) -> dict[str, int]:
        """The steps of the panels, by title; the last is 0, where Q stands for V."""
        steps = [max(round(time * self.schedule.steps), 1) for time in FIGURE_TIMES]
        return {**{f"V, n = {step}": step for step in steps}, "Q": 0}

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The mean of the target critics' Q."""
        q: Tensor = self.target_critic["q"](observations, actions).mean(0)
        return q

    def figure_maps(self, observations: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """V at steps on the way of denoising, and Q."""
        maps = {}
        for title, step in self._figure_steps().items():
            steps = torch.full((len(actions),), step, device=actions.device)
            q, v = self.target_critic["q"], self.target_critic["v"]
            maps[title] = (v(observations, actions, steps) if step else q(observations, actions)).mean(0)
        return maps

    def figure_paths(self, observations: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The stretch of the actor's DDIM paths that begins on each map."""
        start = torch.randn(len(observations), self.action_dim, generator=generator, device=observations.device)
        path = sample_ddim(
            self.denoiser(self.target_actor, observations), start, self.levels, clip=self.clip, path=True
        )
        steps = self._figure_steps()
        ends = [self.schedule.steps - step for step in (*steps.values(), 0)]
        return {title: path[begin : end + 1] for title, (begin, end) in zip(steps, pairwise(ends), strict=True)}
