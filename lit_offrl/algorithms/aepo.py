"""Analytic Energy-Guided Policy Optimization (Hu, Huang, Yang, Hu, Shen et al., 2025, arXiv 2505.01822).

No code is public. Where the paper contradicts itself or is silent, and what we follow:

1. f is the logarithm of an expectation, with a plus sign (Eqs. 12 and 13), not minus it (Eqs. 2, 8, 11 and 31).
2. The scale of the guidance is absent, w or omega (Eq. 13, Section 3.4, Table 4): it is omega, before rescaling.
3. The critic's loss lacks the discount and the mask of terminal states, and as printed the expectile regression of
   V - Q would learn the expectile 1 - tau (Eq. 27 and Appendix H): the critic is IQL's.
4. Contrastive Q-learning (Appendix H.3) is conservative Q-learning, printed without the log-sum-exp of its penalty.
   Ours is CQL(H)'s, with the in-support backup, as the policy's own actions would have to be sampled at every step.
5. The variance of the third posterior is printed as an expectation over t too (Eq. 43): a constant. All three are
   tables over t, each entry an average at one t. They are made of one batch, as the paper's are: of at least 4096
   samples when the training of f begins.
6. The first posterior (Eq. 22) is a difference that vanishes times sigma_t^2 / alpha_t^2, up to 23,000. From exact
   noise predictions of 4096 samples its standard deviation is 2 at t = 0.7 and 360 at t = 1, where 0.13 is right. We
   clamp the variance to [0, Var(a_0)], of which the upper end is its limit at t = 1, and the mean of the posterior to
   the range of actions. The third posterior with these clamps is the better estimate; the default is the paper's.
7. The point of expansion steps against the gradient, with the gradient taken at the data action (Eq. 46,
   Appendix I.2). Its error bound is none: the error of the expansion is of the order of the posterior's deviation.
8. The norm of Eq. 45 has no axis stated: over the action's dimensions, row by row, is the default. The evaluation of
   Algorithm 1 shows neither omega nor the rescaling.
9. Algorithm 1 trains all networks at once. By default we train them in stages, as QGPO does: targets of f need a
   behavior model and a critic that are good. `joint` is Algorithm 1.
10. Values per task are not published. Learning rates, batch sizes, steps, the networks' details, the smaller of two
    target Q, the solver and the reward rules are QGPO's, whose code the paper builds on by its description.

What is analytic about it is exact only where the posterior mu(a_0 | a_t, s) is a Gaussian with the same variance in all
directions and Q is linear. Elsewhere, with a Gaussian posterior of variance v and a Q of Hessian H:

- For a linear Q the guidance is that of DPS and of regression (MSE), exactly: v does not depend on a_t. With two modes
  at beta = 3 its relative error is above 0.5 from t = 0.1 on (`tools/guidance_error.py`).
- Expanded at the posterior's mean, the guidance has the relative error (beta v lambda)^2 along an eigenvector of H with
  the eigenvalue lambda. Where beta v lambda < -1 (a concave Q, a large beta, much noise) it points the opposite way.
- Expanded at the data action, f learns a value too large by -beta v tr(H): noisy actions of a concave Q are overrated.
  Where v depends on a_t, as it does between modes, it is in the guidance too: twice the error of DPS, however small
  beta is. With two modes, at t = 0.1 and beta = 0.1, it is 0.38 of the exact guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import (
    Actor,
    Info,
    Memory,
    OfflineAlgorithm,
    OptimizerSpec,
    Phase,
    Target,
    draw_noise,
    frozen_copy,
)
from lit_offrl.algorithms.energy_guided import (
    Rescale,
    check_width,
    draw_for_actors,
    energy_maps,
    sample_behavior,
    sample_guided,
)
from lit_offrl.algorithms.options import DiffusionOptions, EnergyOptions, SupportedCritic
from lit_offrl.algorithms.support import Support, actions_of_the_batch, make_support, supported_q_loss
from lit_offrl.algorithms.vp_diffusion import VPDiffusion
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import diffuse, x0_from_epsilon
from lit_offrl.errors import require
from lit_offrl.networks.critics import EnsembleQ, ValueNetwork
from lit_offrl.networks.energy_guidance import EnergyNetwork, NoiseNetwork
from lit_offrl.networks.gradients import full_precision
from lit_offrl.ranges import Count, NonNegative, Positive, Range, Steps

Posterior = Literal[1, 2, 3]
Expansion = Literal["action", "mean", "support"]


def posterior_mean(
    noisy_actions: Tensor,
    epsilon: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    limit: Tensor | None = None,
) -> Tensor:
    """Return the mean of mu(a_0 | a_t, s) (Eq. 18), clamped to [-limit, limit], `[..., action_dim]`.

    Args:
        noisy_actions: a_t, `[..., action_dim]`.
        epsilon: Predicted noise, of the same shape.
        alpha: alpha_t.
        sigma: sigma_t.
        limit: Largest action; None for no clamp.
    """
    mean = x0_from_epsilon(noisy_actions, epsilon, alpha, sigma)
    return mean if limit is None else mean.clamp(-limit, limit)


def posterior_variance(
    posterior: Posterior,
    actions: Tensor,
    noise: Tensor,
    epsilon: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    limit: Tensor | None = None,
    clamp: bool = True,
) -> Tensor:
    """Return the variance v_t of mu(a_0 | a_t, s), the same in all directions and for all a_t, a scalar.

        1: sigma^2 / alpha^2 (1 - E[epsilon^2])    2: Var(a_0) - E[(mean - E[a_0])^2]    3: E[(a_0 - mean)^2]

    (Eqs. 22, 24 and 43; means over samples and dimensions.) With the true noise prediction all are E[Var(a_0 | a_t)].

    Args:
        posterior: Which estimate.
        actions: a_0, `[samples, action_dim]`.
        noise: What is added to them, of the same shape.
        epsilon: What the behavior model predicts at alpha a_0 + sigma noise, of the same shape.
        alpha: alpha_t, of one t.
        sigma: sigma_t, of one t.
        limit: See `posterior_mean`.
        clamp: Whether to keep it within [0, Var(a_0)], where the true one is (law of total variance).
    """
    center = actions.mean(0)
    total = (actions - center).square().mean()
    mean = posterior_mean(diffuse(actions, noise, alpha, sigma), epsilon, alpha, sigma, limit)
    if posterior == 1:
        variance = (sigma / alpha) ** 2 * (1 - epsilon.square().mean())
    elif posterior == 2:
        variance = total - (mean - center).square().mean()
    else:
        variance = (actions - mean).square().mean()
    return torch.minimum(variance.clamp(min=0), total) if clamp else variance


def expansion_point(actions: Tensor, gradient: Tensor, step: float) -> Tensor:
    """Return the actions moved by `step` against the gradient (Eq. 46), `[..., action_dim]`; not where it is 0."""
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    point: Tensor = actions - step * gradient / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    return point


def energy_terms(
    beta: float, q: Tensor, gradient: Tensor, point: Tensor, mean: Tensor, variance: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three terms of the analytic energy (Eq. 25), each `[...]`; differentiable.

        beta Q(s, abar),    beta g^T (mean - abar),    beta^2 v_t ||g||^2 / 2

    Args:
        beta: Inverse temperature.
        q: Q at the point of expansion, `[...]`.
        gradient: g, its gradient in the action, `[..., action_dim]`.
        point: abar, `[..., action_dim]`.
        mean: Mean of the posterior, `[..., action_dim]`.
        variance: v_t, `[...]`.
    """
    slope = (gradient * (mean - point)).sum(-1)
    return beta * q, beta * slope, beta**2 / 2 * variance * gradient.square().sum(-1)


def sampled_energy(
    beta: float, q: Tensor, points: Tensor, noisy_actions: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Return log sum_k w_k exp(beta Q(s, a^k)), `[batch]`, where w_k is proportional to N(a_t; alpha a^k, sigma^2).

    For points a^k ~ mu(. | s) it tends to the energy f_t (Eq. 12) as they become many, whatever mu and Q are.

    Args:
        beta: Inverse temperature.
        q: Q at the points, `[batch, points]`.
        points: a^k, `[batch, points, action_dim]`.
        noisy_actions: a_t, `[batch, action_dim]`.
        alpha: alpha_t, `[batch, 1]`.
        sigma: sigma_t, `[batch, 1]`.
    """
    distance = ((noisy_actions[:, None] - alpha[:, None] * points) / sigma[:, None]).square().sum(-1)
    energy: Tensor = (beta * q + (-0.5 * distance).log_softmax(-1)).logsumexp(-1)
    return energy


class AEPO(OfflineAlgorithm):
    """A diffusion policy guided by an energy that is regressed on a closed form instead of sampled expectations.

        f_t(s, a_t) = log E_{mu(a_0 | a_t, s)} exp(beta Q(s, a_0))                                          (Eq. 12)
        grad log pi_t = grad log mu_t + omega grad f_t,  rescaled to the norm of grad log mu_t         (Eqs. 13, 45)
        L_mu = E || epsilon(s, a_t, t) - epsilon ||^2                                                       (Eq. 7)
        y_t  = beta Q(s, abar) + beta g^T (mean_t - abar) + beta^2 v_t ||g||^2 / 2                          (Eq. 25)
               g = dQ/da at the data action a,  abar = a - nu g / ||g||                                     (Eq. 46)
               mean_t = (a_t - sigma_t epsilon(s, a_t, t)) / alpha_t,  v_t by one of three estimates        (Eq. 44)
        L_f  = E ( f(s, a_t, t) - y_t )^2                                                                   (Eq. 26)

    The policy aims at mu exp(beta Q). Three phases: the behavior model, the critic (implicit Q-learning by default), f.
    The closed form is exact for a Gaussian mu and a linear Q only; the top of the file says where it turns wrong.

    Rescaling by row under-guides: with exact guidance of two modes at beta = 3 it reached 0.30 of a gain in Q of 0.49,
    rescaling over the batch 0.48. In return actions stay nearer to the data where omega is large.

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        beta: Inverse temperature of Q in the policy; 1 / beta weighs the divergence from the behavior policy.
        omega: Scale of the guidance when acting; 0 is the behavior model.
        sweep: Further values of omega that are evaluated beside the policy, as actors `omega_...`.
        rescale: What gets the norm of the behavior model's score: each `sample`, the `batch`, or `none`.
        posterior: Estimate 1, 2 or 3 of the posterior's variance (Eqs. 22, 24 and 43).
        taylor: Distance nu from the data action to the point of expansion.
        expansion: Where Q is expanded: at the data `action`, as printed; at the posterior's `mean`, where the slope
            vanishes; or, without a Taylor series, at several behavior actions of the state, weighed by how likely each
            is the clean action (`support`), which is right for any Q.
        joint: Train all networks in each update (Algorithm 1) rather than in stages; with the critic `implicit` only.
            `pretrain_steps` and `critic.steps` are without effect then.
        refresh_every: Gradient steps from one table of variances to the next where training is joint.
        table_size: Times at which the variance is estimated, uniform from 1e-3 to 1; linear in between.
        table_samples: Noisy actions for each of these estimates, at least; actions of the batch are repeated.
        support_actions: Behavior actions sampled per state for the critics other than `implicit`, and for `support`. On
            2-D sets without observations the actions of a batch are each other's.
        diffusion: The behavior model.
        critic: The critic, with three hidden layers.
        energy: The network f, with three hidden layers.
        pretrain_steps: Gradient steps that train the behavior model; `max_steps` includes them.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    variances: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        beta: Positive = 3.0,
        omega: NonNegative = 1.0,
        sweep: Sequence[NonNegative] = (),
        rescale: Rescale = "sample",
        posterior: Posterior = 1,
        taylor: NonNegative = 0.001,
        expansion: Expansion = "action",
        joint: bool = False,
        refresh_every: Count = 1000,
        table_size: Annotated[int, Range(2, 100_000)] = 128,
        table_samples: Count = 4096,
        support_actions: Annotated[int, Range(2, 4096)] = 16,
        diffusion: DiffusionOptions = DiffusionOptions(hidden_dim=512, learning_rate=1e-4),
        critic: SupportedCritic = SupportedCritic(),
        energy: EnergyOptions = EnergyOptions(),
        pretrain_steps: Steps = 600_000,
        **common: Any,
    ) -> None:
        kind = critic.kind
        require(kind == "implicit" or not joint, "model.init_args.critic.kind", "implicit where joint is true", kind)
        is_staged = expansion != "support" or not joint
        require(is_staged, "model.init_args.expansion", "action or mean where joint is true", expansion)
        check_width(diffusion.hidden_dim)
        super().__init__(observation_dim, action_dim, pretrain_steps, **common)
        self.beta = beta
        self.guidance_scales = {"policy": omega, "behavior": 0.0, **{f"omega_{scale:g}": scale for scale in sweep}}
        self.rescale: Rescale = rescale
        self.posterior: Posterior = posterior
        self.taylor = taylor
        self.expansion: Expansion = expansion
        self.conditional = diffusion.conditional
        self.joint = joint
        self.refresh_every = refresh_every
        self.table_samples = table_samples
        self.support_actions = support_actions
        self.critic_options = critic
        self.energy_options = energy
        self.learning_rates = {
            "behavior": diffusion.learning_rate,
            "critic": critic.learning_rate,
            "energy": energy.learning_rate,
        }
        self.support: Support | None = None

        self.process = VPDiffusion(diffusion.solver_steps)
        seen = observation_dim if diffusion.conditional else 0
        self.behavior = NoiseNetwork(action_dim, seen, diffusion.hidden_dim)
        hidden = (critic.hidden_dim,) * 3
        q = EnsembleQ(observation_dim, action_dim, hidden, layer_norm=critic.layer_norm, activation=nn.ReLU)
        self.critic = nn.ModuleDict({"q": q})
        if kind == "implicit":
            self.critic["v"] = ValueNetwork(observation_dim, hidden, nn.ReLU)
        self.target_q = frozen_copy(q)
        self.energy = EnergyNetwork(action_dim, seen, energy.hidden_dim, layers=3)
        self.register_buffer("variances", torch.zeros(table_size))

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for each network."""
        return {name: OptimizerSpec((getattr(self, name),), rate) for name, rate in self.learning_rates.items()}

    def phases(self) -> tuple[Phase, ...]:
        """The behavior model, the critic and f, one after the other or at once."""
        if self.joint:
            return (Phase("training", self.joint_update, prepare=self.refresh),)
        return (
            Phase("behavior", self.pretrain_update, self.pretrain_steps),
            Phase("critic", self.critic_update, self.critic_options.steps, prepare=self.prepare_support),
            Phase("energy", self.update, begin=self.begin_main, prepare=self.prepare_energy),
        )

    def targets(self) -> tuple[Target, ...]:
        """The Q networks that f and the policy rely on; in stages they move while the critic is trained."""
        rate, steps, early = self.critic_options.target_rate, self.critic_options.steps, not self.joint
        return (Target(self.critic["q"], self.target_q, rate, early=early, early_steps=steps),)

    def begin_main(self) -> None:
        """Release the support actions, which were for the critic, unless f needs them."""
        if self.expansion != "support":
            self.support = None

    # ---------------------------------------------------------------- the posterior of the clean action

    def variance(self, time: Tensor) -> Tensor:
        """Return v_t by linear interpolation in the table, `[batch]`, at `time` `[batch]`."""
        start, end, last = self.process.start, self.process.end, len(self.variances) - 1
        position = ((time - start) / (end - start) * last).clamp(0, last)
        below = position.floor().clamp(max=last - 1)
        index = below.long()
        return torch.lerp(self.variances[index], self.variances[index + 1], position - below)

    @torch.no_grad()
    def variance_table(self, batch: Batch) -> Tensor:
        """Return v_t at times uniform from the last level's to the first's, `[table_size]`.

        Each is an average over at least `table_samples` noisy actions of `batch`, with noise of its own.
        """
        start, end = self.process.start, self.process.end
        actions, observations = self.noise.all_rows(batch.actions), self.noise.all_rows(batch.observations)
        n = len(actions)
        rows = torch.arange(max(self.table_samples, n), device=actions.device) % n
        actions, observations = actions[rows], observations[rows]
        entries = []
        with full_precision(actions):
            for time in torch.linspace(start, end, len(self.variances), device=actions.device).to(actions):
                alpha, sigma = self.process.schedule.alpha(time), self.process.schedule.sigma(time)
                noise = self.noise.normal(*actions.shape, shared=True)
                epsilon = self.behavior(diffuse(actions, noise, alpha, sigma), time.view(1), observations)
                limit = self.units.limit
                entries.append(posterior_variance(self.posterior, actions, noise, epsilon, alpha, sigma, limit=limit))
        return torch.stack(entries)

    # ---------------------------------------------------------------- losses

    def behavior_loss(self, batch: Batch) -> Tensor:
        """E || epsilon(a_t | s, t) - epsilon ||^2, a sum over the action's dimensions (Eq. 7)."""
        time, noisy_actions, noise = self.process.noised(batch.actions, self.noise)
        loss: Tensor = (self.behavior(noisy_actions, time, batch.observations) - noise).square().sum(-1).mean()
        return loss

    def best_q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return the smaller target Q, `[...]`, of leading dimensions that broadcast."""
        q: Tensor = self.target_q(observations, actions).amin(0)
        return q

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Return the loss of the critic by its kind: IQL (Eq. 27), the in-support backup, or that backup and CQL."""
        support = None if self.support is None else self.support.of(batch)
        return supported_q_loss(
            self.critic, self.target_q, batch, support, self.critic_options, self.beta, self.noise, self.units.limit
        )

    def q_gradient(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return the gradient of the smaller target Q in the action, `[batch, action_dim]`, detached."""
        with torch.enable_grad():
            actions = actions.detach().requires_grad_()
            return torch.autograd.grad(self.best_q(observations, actions).sum(), actions)[0]

    def energy_target(
        self, observations: Tensor, actions: Tensor, noisy_actions: Tensor, time: Tensor
    ) -> tuple[Tensor, Info]:
        """Return y_t (Eq. 25), `[batch]`, detached, and what to log."""
        with torch.no_grad(), full_precision(actions):
            alpha, sigma = self.process.scales(time, noisy_actions)
            epsilon = self.behavior(noisy_actions, time, observations)
            mean = posterior_mean(noisy_actions, epsilon, alpha, sigma, self.units.limit)
            if self.expansion == "mean":
                point = mean
                gradient = self.q_gradient(observations, point)
            else:
                gradient = self.q_gradient(observations, actions)
                point = expansion_point(actions, gradient, self.taylor)
            q = self.best_q(observations, point)
            value, slope, spread = energy_terms(self.beta, q, gradient, point, mean, self.variance(time))
            target = value + slope + spread
            info = {
                "energy_target": target.mean(),
                "slope_term": slope.mean(),
                "variance_term": spread.mean(),
                "q_gradient_norm": torch.linalg.vector_norm(gradient, dim=-1).mean(),
            }
        return target, info

    def sampled_target(self, batch: Batch, noisy_actions: Tensor, time: Tensor) -> tuple[Tensor, Info]:
        """Return f_t by behavior actions of the batch's states, `[batch]`, detached, and what to log."""
        with torch.no_grad(), full_precision(noisy_actions):
            if self.conditional:
                assert self.support is not None
                points = self.support.of(batch).actions
                assert points is not None
            else:
                points = actions_of_the_batch(batch, self.noise, self.support_actions)
            q = self.best_q(batch.observations[:, None], points)
            target = sampled_energy(self.beta, q, points, noisy_actions, *self.process.scales(time, noisy_actions))
        return target, {"energy_target": target.mean()}

    def energy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Regression of f on the analytic energy of noisy data actions (Eq. 26)."""
        time, noisy_actions, _ = self.process.noised(batch.actions, self.noise)
        if self.expansion == "support":
            target, info = self.sampled_target(batch, noisy_actions, time)
        else:
            target, info = self.energy_target(batch.observations, batch.actions, noisy_actions, time)
        return (self.energy(noisy_actions, time, batch.observations) - target).square().mean(), info

    # ---------------------------------------------------------------- support actions

    def prepare_support(self, batch: Batch) -> None:
        """Sample the behavior actions that the critic needs, before its first update and in a resumed run."""
        if self.support is None and self.critic_options.kind != "implicit":
            self.support = self.make_support()

    def prepare_energy(self, batch: Batch) -> None:
        """Prepare what the targets of f need."""
        if self.expansion != "support":
            self.refresh(batch)
        elif self.conditional and self.support is None:
            self.support = self.make_support()

    def make_support(self) -> Support:
        """Sample behavior actions at all transitions of the dataset, as the kind of critic needs them."""
        sample = partial(sample_behavior, self.process, self.behavior, action_dim=self.action_dim)
        everywhere = self.critic_options.kind == "conservative" or self.expansion == "support"
        return make_support(self, sample, self.support_actions, everywhere=everywhere)

    # ---------------------------------------------------------------- the algorithm

    def refresh(self, batch: Batch) -> None:
        """Make the table of variances before f's first update, and repeatedly where the behavior model changes."""
        step = self.gradient_step - self.main_start
        if step == 0 or (self.joint and step % self.refresh_every == 0):
            self.variances.copy_(self.variance_table(batch))

    def pretrain_update(self, batch: Batch) -> Info:
        """Train the behavior model."""
        loss = self.behavior_loss(batch)
        self.minimize("behavior", loss)
        return {"behavior_loss": loss.detach()}

    def validation_losses(self, batch: Batch) -> Info:
        """The loss of the behavior model."""
        return {"behavior_loss": self.behavior_loss(batch)}

    def critic_update(self, batch: Batch) -> Info:
        """Train the critic; `EMATargets` moves its target."""
        loss, info = self.critic_loss(self.first_rows(batch, self.critic_options.batch_size))
        self.minimize("critic", loss)
        return info

    def update(self, batch: Batch) -> Info:
        """Train f."""
        loss, info = self.energy_loss(self.first_rows(batch, self.energy_options.batch_size))
        self.minimize("energy", loss)
        return {"energy_loss": loss.detach(), **info}

    def joint_update(self, batch: Batch) -> Info:
        """Train everything (Algorithm 1)."""
        return {**self.pretrain_update(batch), **self.critic_update(batch), **self.update(batch)}

    # ---------------------------------------------------------------- acting

    def scale_of(self, actor: str) -> float:
        """Return the guidance scale of one of `actors()`; 0 for all until f is trained."""
        return self.guidance_scales[actor] if self.gradient_step > self.main_start else 0.0

    def guided_sample(self, observations: Tensor, noise: Tensor, scales: Sequence[float]) -> Tensor:
        """Return actions of the policies mu exp(omega f), see `sample_guided`."""
        guidance = self.energy.gradient
        return sample_guided(self.process, self.behavior, guidance, observations, noise, scales, self.rescale)

    def sample_each(
        self,
        observations: Tensor,
        actors: Sequence[str],
        generators: Mapping[str, torch.Generator | None],
        memories: Sequence[Memory] = (),
    ) -> Tensor:
        """Sample all actors at once: they are one diffusion with different scales of guidance."""
        noise = draw_for_actors(observations, self.action_dim, actors, generators)
        return self.guided_sample(observations, noise, [self.scale_of(name) for name in actors])

    def sample_as(self, actor: str, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample one of the actors."""
        noise = draw_noise(observations, self.action_dim, generator=generator)
        return self.guided_sample(observations, noise, [self.scale_of(actor)])

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample the policy once; the paper does not select among candidates."""
        return self.sample_as("policy", observations, generator)

    def actors(self) -> dict[str, Actor]:
        """The policy, the behavior model, and the policies of a sweep over omega."""
        return {name: partial(self.sample_as, name) for name in self.guidance_scales}

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller target Q."""
        return self.best_q(observations, actions)

    def figure_maps(self, observations: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """Return beta Q, and f at times of the diffusion."""
        maps = {r"$\beta \min Q$": self.beta * self.best_q(observations, actions)}
        if self.gradient_step > self.main_start:
            maps |= energy_maps(self.process, self.behavior, self.energy, observations, actions)
        return maps
