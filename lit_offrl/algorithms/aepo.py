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

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_offrl.algorithms.base import Info, Phase, Target
from lit_offrl.algorithms.energy_guided import Critic, EnergyGuided, Rescale
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import diffuse, x0_from_epsilon
from lit_offrl.errors import require
from lit_offrl.networks.gradients import full_precision

Posterior = Literal[1, 2, 3]


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


class AEPO(EnergyGuided):
    """A diffusion policy guided by an energy that is regressed on a closed form, not on sampled expectations.

        f_t(s, a_t) = log E_{mu(a_0 | a_t, s)} exp(beta Q(s, a_0))                                          (Eq. 12)
        grad log pi_t = grad log mu_t + omega grad f_t,  rescaled to the norm of grad log mu_t         (Eqs. 13, 45)
        L_mu = E || epsilon(s, a_t, t) - epsilon ||^2                                                       (Eq. 7)
        y_t  = beta Q(s, abar) + beta g^T (mean_t - abar) + beta^2 v_t ||g||^2 / 2                          (Eq. 25)
               g = dQ/da at the data action a,  abar = a - nu g / ||g||                                     (Eq. 46)
               mean_t = (a_t - sigma_t epsilon(s, a_t, t)) / alpha_t,  v_t by one of three estimates        (Eq. 44)
        L_f  = E ( f(s, a_t, t) - y_t )^2                                                                   (Eq. 26)

    The policy aims at mu exp(beta Q). Three phases: the behavior model, the critic (implicit Q-learning by default), f.
    The closed form is exact for a Gaussian mu and a linear Q only; the module tells where it turns the wrong way.

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
        critic: `implicit` for IQL, `in_support` for QGPO's softmax backup, `conservative` for CQL upon that.
        support_actions: Behavior actions sampled per state for the critics other than `implicit`.
        expectile: Expectile tau of the value regression of the critic `implicit`.
        conservatism: Weight of the penalty of the critic `conservative`.
        discount: Discount factor.
        target_rate: Rate at which the target critics follow.
        joint: Train all networks in each update (Algorithm 1) rather than in stages; with the critic `implicit` only.
            `pretrain_steps` and `critic_steps` mean nothing then.
        refresh_every: Gradient steps from one table of variances to the next where training is joint.
        table_size: Times at which the variance is estimated, uniform from 1e-3 to 1; linear in between.
        table_samples: Noisy actions for each of these estimates, at least; from the batch's, again and again.
        conditional: Whether the diffusion model and f see the observation; 2-D bandits have none.
        behavior_learning_rate: Step size of the behavior model.
        critic_learning_rate: Step size of the critic.
        energy_learning_rate: Step size of f.
        critic_batch_size: Transitions of each batch that the critic is trained on; the behavior model takes all.
        energy_batch_size: Transitions of each batch that f is trained on.
        hidden_dim: Width of the widest blocks of the behavior model.
        critic_hidden_dim: Width of the three hidden layers of Q and of V.
        energy_hidden_dim: Width of the three hidden layers of f.
        pretrain_steps: Gradient steps that train the behavior model.
        critic_steps: Gradient steps, after these, that train the critic; `max_steps` includes both.
        pretrained: Checkpoint of another run whose networks start this one.
        seed: Seed of the training noise (set from `seed_everything`).
    """

    variances: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        beta: float = 3.0,
        omega: float = 1.0,
        sweep: Sequence[float] = (),
        rescale: Rescale = "sample",
        posterior: Posterior = 1,
        taylor: float = 0.001,
        critic: Critic = "implicit",
        support_actions: int = 16,
        expectile: float = 0.7,
        conservatism: float = 5.0,
        discount: float = 0.99,
        target_rate: float = 0.005,
        joint: bool = False,
        refresh_every: int = 1000,
        table_size: int = 128,
        table_samples: int = 4096,
        conditional: bool = True,
        behavior_learning_rate: float = 1e-4,
        critic_learning_rate: float = 3e-4,
        energy_learning_rate: float = 3e-4,
        critic_batch_size: int = 256,
        energy_batch_size: int = 256,
        hidden_dim: int = 512,
        critic_hidden_dim: int = 256,
        energy_hidden_dim: int = 256,
        pretrain_steps: int = 600_000,
        critic_steps: int = 500_000,
        pretrained: str | None = None,
        seed: int = 0,
    ) -> None:
        require(taylor >= 0, "model.init_args.taylor", "at least 0", taylor)
        require(not joint or critic == "implicit", "model.init_args.critic", "implicit where training is joint", critic)
        require(refresh_every >= 1, "model.init_args.refresh_every", "at least 1", refresh_every)
        require(table_size >= 2, "model.init_args.table_size", "at least 2", table_size)
        require(table_samples >= 1, "model.init_args.table_samples", "at least 1", table_samples)
        super().__init__(
            observation_dim,
            action_dim,
            beta=beta,
            backup_beta=beta,
            omega=omega,
            sweep=sweep,
            rescale=rescale,
            critic=critic,
            support_actions=support_actions,
            expectile=expectile,
            conservatism=conservatism,
            discount=discount,
            target_rate=target_rate,
            conditional=conditional,
            learning_rates={
                "behavior": behavior_learning_rate,
                "critic": critic_learning_rate,
                "energy": energy_learning_rate,
            },
            critic_batch_size=critic_batch_size,
            energy_batch_size=energy_batch_size,
            hidden_dim=hidden_dim,
            critic_hidden_dim=critic_hidden_dim,
            energy_hidden_dim=energy_hidden_dim,
            energy_layers=3,
            pretrain_steps=pretrain_steps,
            critic_steps=critic_steps,
            pretrained=pretrained,
            seed=seed,
        )
        self.save_hyperparameters()
        self.posterior: Posterior = posterior
        self.taylor = taylor
        self.joint = joint
        self.refresh_every = refresh_every
        self.table_samples = table_samples
        self.register_buffer("variances", torch.zeros(table_size))

    def phases(self) -> tuple[Phase, ...]:
        """The behavior model, the critic and f, one after the other or at once."""
        if self.joint:
            return (Phase("training", self.joint_update, prepare=self.refresh),)
        return (
            Phase("behavior", self.pretrain_update, self.pretrain_steps),
            Phase("critic", self.critic_update, self.critic_steps),
            Phase("energy", self.update, begin=self.begin_main, prepare=self.refresh),
        )

    def targets(self) -> tuple[Target, ...]:
        """The Q networks whose values are final."""
        q, early = self.critic["q"], not self.joint
        return (Target(q, self.target_q, self.target_rate, early=early, early_steps=self.critic_steps),)

    @property
    def guided_from(self) -> int:
        """The gradient step at which f begins to be trained."""
        return self.main_start

    def begin_main(self) -> None:
        """The critic is final: support actions are no longer needed."""
        self.support = None

    # ---------------------------------------------------------------- the posterior of the clean action

    def variance(self, time: Tensor) -> Tensor:
        """Return v_t by linear interpolation in the table, `[batch]`, at `time` `[batch]`."""
        start, end, last = self.levels[-1].time, self.levels[0].time, len(self.variances) - 1
        position = ((time - start) / (end - start) * last).clamp(0, last)
        below = position.floor().clamp(max=last - 1)
        index = below.long()
        return torch.lerp(self.variances[index], self.variances[index + 1], position - below)

    @torch.no_grad()
    def variance_table(self, batch: Batch) -> Tensor:
        """Return v_t at times uniform from the last level's to the first's, `[table_size]`.

        Each is an average over at least `table_samples` noisy actions of `batch`, with noise of its own.
        """
        start, end = self.levels[-1].time, self.levels[0].time
        actions, observations = self.whole(batch.actions), self.whole(batch.observations)
        n = len(actions)
        rows = torch.arange(max(self.table_samples, n), device=actions.device) % n
        actions = actions[rows]
        entries = []
        with full_precision(actions):
            observations = observations[rows]
            for time in torch.linspace(start, end, len(self.variances), device=actions.device).to(actions):
                alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
                noise = self.normal(*actions.shape, shared=True)
                epsilon = self.behavior(diffuse(actions, noise, alpha, sigma), time.view(1), observations)
                limit = self.action_limit
                entries.append(posterior_variance(self.posterior, actions, noise, epsilon, alpha, sigma, limit=limit))
        return torch.stack(entries)

    # ---------------------------------------------------------------- losses

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
            gradient = self.q_gradient(observations, actions)
            alpha, sigma = self.scales(time, noisy_actions)
            epsilon = self.behavior(noisy_actions, time, observations)
            mean = posterior_mean(noisy_actions, epsilon, alpha, sigma, self.action_limit)
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

    def energy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Regression of f on the analytic energy of noisy data actions (Eq. 26)."""
        time, noisy_actions, _ = self.noised(batch.actions)
        target, info = self.energy_target(batch.observations, batch.actions, noisy_actions, time)
        return (self.energy(noisy_actions, time, batch.observations) - target).square().mean(), info

    # ---------------------------------------------------------------- the algorithm

    def refresh(self, batch: Batch) -> None:
        """Make the table of variances before f's first update, and again and again where the behavior model changes."""
        step = self.gradient_step - self.main_start
        if step == 0 or (self.joint and step % self.refresh_every == 0):
            self.variances.copy_(self.variance_table(batch))

    def update(self, batch: Batch) -> Info:
        """Train f."""
        return self.energy_update(batch)

    def joint_update(self, batch: Batch) -> Info:
        """Train everything (Algorithm 1)."""
        return {**self.pretrain_update(batch), **self.critic_update(batch), **self.update(batch)}
