"""Diffusion Trusted Q-Learning (Chen, Wang and Zhou, 2024, arXiv 2405.19690).

`DTQL` is the paper's Algorithm 1, `DTQLKL` the KL regularization that it is compared with (Algorithm 2, Appendix C).

Where the authors' code differs from the paper, and which we follow:

1. c_in has a square root and the noise is sigma * epsilon (code; Appendix B has two misprints).
2. The denoised action is clamped to the action box inside both diffusion losses (code; the paper is silent).
3. The diffusion losses are means over action dimensions, not squared norms (code; the alpha values belong to it).
4. ln(sigma) is logistic around ln 0.5 with scale 0.5, truncated to [0.002, 80] (code).
5. Q networks have LayerNorm, V has none; F has no activation after its first layer (code; the paper is silent).
6. The expectile regression of V reads the online Q, not a target Q (both; Algorithm 1 only hints at targets).
7. Target critics are updated in the main phase only and are used for candidate selection only (code).
8. The critic's learning rate does not change with the task (code: always 3e-4).
9. The NLL term is the normal log-density of atanh(a / 1.001) without the tanh Jacobian (code; the same gradients).
10. Bootstrapping is r + discount * V(s'); Eq. 7's discount on r is a misprint (code).

Of Algorithm 2:

11. The paper's policy starts as the diffusion model. Its code copies the weights, but uses the raw output of F as the
    action, at inputs that F was never trained on, so that the copy has no effect. `generator` offers both.
12. The copy is made after pretraining (both; the authors' 2-D figures are of random weights: `copy_behavior: false`).
13. Generated actions are not clamped (both), so their denoised values, the fake score, are not clamped either (ours).
    The code clamps the fake score: if Q drives an action out of the box, real and fake estimates then agree, and the
    KL gradient vanishes.
14. The diffusion model keeps training beside the policy (code; the paper stops it).
15. The weight in the KL gradient is a mean over dimensions, which may be 0 (both): we keep it above the smallest noise
    level, since the action and its estimate can meet on the border of the box.
16. Candidates are clamped to the box before the critic scores them (ours: clamped actions are executed; not in the
    code).
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_offrl.algorithms.base import Actor, Info, OfflineAlgorithm, OptimizerSpec, Target, frozen_copy, select
from lit_offrl.algorithms.critic_losses import bootstrapped, ensemble_loss, expectile_loss
from lit_offrl.algorithms.options import Acting, ImplicitQ
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import EDMDenoiser, as_denoiser
from lit_offrl.diffusion.samplers import sample_heun
from lit_offrl.diffusion.schedules import LogLogisticNoise, edm_levels, karras_sigmas
from lit_offrl.networks.critics import EnsembleQ, ValueNetwork
from lit_offrl.networks.policies import DiffusionMLP, TanhGaussian, TanhGaussianPolicy
from lit_offrl.ranges import NonNegative, Positive, Range, Steps, Width

FIGURE_SIGMAS = (0.5, 1.0, 2.0, 4.0)  # times sigma_data; those that training draws most are around 1
FIGURE_NOISES = 8
SCORED_AT_ONCE = 4096  # candidates: the activations of more leave the cache, and save no time
# Noise level at which the authors' one-step generator is evaluated, where sigma_data is theirs.
GENERATOR_SIGMA, AUTHORS_SIGMA_DATA = 2.5, 0.5


class DTQL(OfflineAlgorithm):
    """A one-step policy that the loss of a diffusion model of the behavior keeps near the data.

        L(phi)    = E [ w(sigma) || D_phi(a + sigma e, sigma, s) - a ||^2 ]                                  (Eq. 2)
        L_TR      = the same loss at a_theta ~ pi_theta(. | s), as a function of theta                       (Eq. 4)
        L_pi      = alpha L_TR - q_weight E [ min_i Q_i(s, a_theta) ] - nll_weight E [ log pi_theta(a | s) ] (Eq. 5)
        L_V       = E [ |tau - 1(min_i Q_i(s, a) < V(s))| (min_i Q_i(s, a) - V(s))^2 ]                       (Eq. 6)
        L_Q       = E [ (r + discount V(s') - Q_i(s, a))^2 ]                                                 (Eq. 7)

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        alpha: Weight of the loss that keeps the policy near the data: the trust region, or the KL divergence.
        nll_weight: Weight of the negative log-likelihood of dataset actions in the policy loss; 0 leaves it out.
        q_weight: Weight of Q in the policy loss; 0 leaves it out, and what is learned is a mode of the behavior.
        critic: The critic, Q and V.
        acting: How an action is chosen.
        learning_rate: Step size of the diffusion model and the policy.
        policy_learning_rate: Step size of the policy, where it differs from `learning_rate`.
        cosine_decay: Decay all step sizes to 0 over the main phase.
        hidden_dim: Width of the hidden layers of diffusion model and policy.
        sigma_data: Standard deviation that the diffusion model assumes of actions in [-1, 1]; noise levels are
            multiples of it. The authors' 0.5 belongs to robots; data of finer structure needs a smaller one.
        behavior_sampling_steps: Heun steps when the diffusion model itself acts.
        pretrain_steps: Gradient steps that train critics and diffusion model only; `max_steps` includes them.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        alpha: NonNegative = 1.0,
        nll_weight: NonNegative = 0.0,
        q_weight: NonNegative = 1.0,
        critic: ImplicitQ = ImplicitQ(),
        acting: Acting = Acting(candidates=1024, selection_temperature=1.0),
        learning_rate: Positive = 3e-4,
        policy_learning_rate: Positive | None = None,
        cosine_decay: bool = False,
        hidden_dim: Width = 256,
        sigma_data: Positive = 0.5,
        behavior_sampling_steps: Annotated[int, Range(2, 10_000)] = 10,
        pretrain_steps: Steps = 50_000,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, pretrain_steps, **common)
        self.alpha = alpha
        self.nll_weight = nll_weight
        self.q_weight = q_weight
        self.critic_options = critic
        self.acting = acting
        self.learning_rates = {
            "critic": critic.learning_rate,
            "behavior": learning_rate,
            "policy": policy_learning_rate or learning_rate,
        }
        self.cosine_decay = cosine_decay
        sigma_range = (0.004 * sigma_data, 160 * sigma_data)  # 0.002 to 80 at sigma_data 0.5
        self.noise_levels = LogLogisticNoise(math.log(sigma_data), 0.5, *sigma_range)
        self.sampling_levels = edm_levels(karras_sigmas(behavior_sampling_steps, *sigma_range))

        hidden = (critic.hidden_dim,) * 3
        self.critic = nn.ModuleDict(
            {"q": EnsembleQ(observation_dim, action_dim, hidden), "v": ValueNetwork(observation_dim, hidden)}
        )
        self.target_q = frozen_copy(self.critic["q"])
        self.behavior = EDMDenoiser(DiffusionMLP(observation_dim, action_dim, hidden_dim), sigma_data)
        self.policy = self.make_policy(hidden_dim, sigma_data)

    def make_policy(self, hidden_dim: int, sigma_data: float) -> nn.Module:
        """Return the one-step policy: a Gaussian with three hidden layers (Appendix D)."""
        return TanhGaussianPolicy(self.observation_dim, self.action_dim, (hidden_dim,) * 3)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for both Q and V, one for the diffusion model, one for the policy."""
        modules = {"critic": self.critic, "behavior": self.behavior, "policy": self.policy}
        return {
            name: OptimizerSpec((module,), self.learning_rates[name], self.cosine_decay)
            for name, module in modules.items()
        }

    def targets(self) -> tuple[Target, ...]:
        """The Q networks that select among candidate actions."""
        return (Target(self.critic["q"], self.target_q, self.critic_options.target_rate),)

    # ---------------------------------------------------------------- losses, in the order of Algorithm 1

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Implicit Q-learning (Eqs. 6 and 7), both parts from the same weights."""
        q = self.critic["q"](batch.observations, batch.actions)
        v = self.critic["v"](batch.observations)
        with torch.no_grad():
            goal = bootstrapped(batch, self.critic["v"](batch.next_observations), self.critic_options.discount)
        v_loss = expectile_loss(q.detach().amin(0) - v, self.critic_options.expectile)
        q_loss = ensemble_loss(q, goal)
        return q_loss + v_loss, {
            "critic_q_loss": q_loss.detach(),
            "critic_v_loss": v_loss.detach(),
            "q_mean": q.detach().mean(),
            "v_mean": v.detach().mean(),
        }

    def draw_noise(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return fresh noise levels, `[batch]`, and standard normal noise, `[batch, action_dim]`, for `actions`."""
        return self.noise_levels.quantile(self.noise.uniform(len(actions))), self.noise.normal(*actions.shape)

    def diffusion_loss(self, model: EDMDenoiser, actions: Tensor, observations: Tensor) -> Tensor:
        """Denoising loss of `actions` (Eq. 2), at fresh noise; the trust-region loss (Eq. 4) for policy actions."""
        return model.loss(actions, *self.draw_noise(actions), observations)

    def expected_q(self, actions: Tensor, observations: Tensor) -> Tensor:
        """Mean of min_i Q_i over the policy's actions, which it maximizes (Eq. 5)."""
        q: Tensor = self.critic["q"](observations, actions).amin(0).mean()
        return q

    def policy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Policy loss (Eq. 5), with the likelihood term of Section 4 where it has a weight."""
        distribution: TanhGaussian = self.policy(batch.observations)
        actions = distribution.sample(self.noise.normal(*batch.actions.shape))
        trust_region = self.diffusion_loss(self.behavior, actions, batch.observations)
        q = self.expected_q(actions, batch.observations)
        loss = self.alpha * trust_region - self.q_weight * q
        info = {"trust_region_loss": trust_region, "policy_q": q, "policy_std": distribution.std.mean()}
        if self.nll_weight:
            nll = -distribution.log_density(batch.actions).mean()
            loss = loss + self.nll_weight * nll
            info["policy_nll"] = nll
        return loss, {name: value.detach() for name, value in info.items()}

    # ---------------------------------------------------------------- the algorithm

    def pretrain_update(self, batch: Batch) -> Info:
        """Steps 1 and 2 of Algorithm 1: critics and diffusion model; the policy waits (Section 4.2)."""
        critic_loss, critic_info = self.critic_loss(batch)
        self.minimize("critic", critic_loss)
        behavior_loss = self.diffusion_loss(self.behavior, batch.actions, batch.observations)
        self.minimize("behavior", behavior_loss)
        return {**critic_info, "behavior_loss": behavior_loss.detach()}

    def validation_losses(self, batch: Batch) -> Info:
        """The losses of critics and diffusion model."""
        behavior_loss = self.diffusion_loss(self.behavior, batch.actions, batch.observations)
        return {**self.critic_loss(batch)[1], "behavior_loss": behavior_loss}

    def update(self, batch: Batch) -> Info:
        """Algorithm 1: critics, diffusion model, policy; `EMATargets` moves the targets."""
        info = self.pretrain_update(batch)
        policy_loss, policy_info = self.policy_loss(batch)
        self.minimize("policy", policy_loss)
        return {**info, "policy_loss": policy_loss.detach(), **policy_info}

    # ---------------------------------------------------------------- acting

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample candidates from the policy, select one by softmax over the smaller target Q (Section 4.1)."""
        states, n = observations.shape[0], self.acting.candidates
        noise = torch.randn(states, n, self.action_dim, generator=generator, device=observations.device)
        actions = self.propose(observations, noise)
        if n == 1:
            return actions[:, 0]
        some = max(SCORED_AT_ONCE // n, 1)
        pieces = zip(torch.split(observations[:, None], some), torch.split(actions, some), strict=True)
        q = torch.cat([self.target_q(*piece).amin(0) for piece in pieces])
        return select(actions, q, self.acting.selection_temperature, generator)

    def propose(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Return the policy's candidates `[states, candidates, action_dim]` from standard normal `noise`, its like."""
        distribution: TanhGaussian = self.policy(observations)
        return TanhGaussian(distribution.mean[:, None], distribution.std[:, None]).sample(noise)

    def sample_behavior(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample the diffusion model itself: behavior cloning."""
        noise = torch.randn(observations.shape[0], self.action_dim, generator=generator, device=observations.device)
        denoise = as_denoiser(lambda x, sigma: self.behavior(x, sigma, observations), "x0")
        return sample_heun(denoise, noise * self.sampling_levels[0].sigma, self.sampling_levels)

    def actors(self) -> dict[str, Actor]:
        """The policy and, to compare with, the diffusion model."""
        return {"policy": self.sample_actions, "behavior": self.sample_behavior}

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller Q."""
        q: Tensor = self.critic["q"](observations, actions).amin(0)
        return q

    @torch.no_grad()
    def figure_maps(self, observations: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """Q, and the trust-region loss of each action by itself at fixed noise levels (Figure 1)."""
        generator = torch.Generator(actions.device).manual_seed(0)
        noise = torch.randn(FIGURE_NOISES, self.action_dim, generator=generator, device=actions.device)
        maps = {"min Q": self.value_of(observations, actions)}
        x, s = (each.repeat_interleave(FIGURE_NOISES, 0) for each in (actions, observations))
        for scale in FIGURE_SIGMAS:
            sigma = x.new_full((len(x),), scale * self.behavior.sigma_data)
            errors = self.behavior.errors(x, sigma, noise.repeat(len(actions), 1), s)
            loss = errors.view(len(actions), -1).mean(1)  # over the noises, the same for every action
            maps[rf"$L_{{TR}}$ at $\sigma = {scale:g}\,\sigma_{{data}}$"] = loss
        return maps


class DTQLKL(DTQL):
    """DTQL with the KL divergence instead of the trust region, and an implicit one-step policy.

        a_theta         = pi_theta(s, epsilon), a one-step generator
        grad L_KL       = E [ (D_xi(a_t, sigma, s) - D_phi(a_t, sigma, s)) / w  grad a_theta ]   (Appendix C)
                          a_t = a_theta + sigma e,  w = mean_j |a_theta - D_phi(a_t, sigma, s)|_j
        L(xi)           = the diffusion loss (Eq. 2) of the fake score's denoiser D_xi at a_theta
        L_pi            = alpha L_KL - q_weight E [ min_i Q_i(s, a_theta) ]

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        generator: What the generator's network F gives: `preconditioned`, the denoised action of pure noise at a level
            of 5 sigma_data, as in the diffusion model; or `raw`, the action itself, as in the authors' code.
        copy_behavior: Start generator and fake score as copies of the pretrained diffusion model.
        **options: The other options of `DTQL`. There is no `nll_weight`: the generator has no likelihood.
    """

    policy: EDMDenoiser

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        generator: Literal["preconditioned", "raw"] = "preconditioned",
        copy_behavior: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, nll_weight=0.0, **options)
        self.preconditioned = generator == "preconditioned"
        self.copy_behavior = copy_behavior
        self.fake = copy.deepcopy(self.policy)

    def make_policy(self, hidden_dim: int, sigma_data: float) -> nn.Module:
        """Return the generator, of the diffusion model's structure (Appendix D)."""
        return EDMDenoiser(DiffusionMLP(self.observation_dim, self.action_dim, hidden_dim), sigma_data, clip=None)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """Those of DTQL, and one for the fake score."""
        specs = super().optimizer_specs()
        return {**specs, "fake": replace(specs["behavior"], modules=(self.fake,))}

    def begin_main(self) -> None:
        """Start generator and fake score from the pretrained diffusion model (Algorithm 2)."""
        if self.copy_behavior:
            for module in (self.policy, self.fake):
                module.load_state_dict(self.behavior.state_dict())

    # ---------------------------------------------------------------- losses, in the order of Algorithm 2

    def generate(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Return the actions a_theta of standard normal `noise`, both `[batch, action_dim]`."""
        unit = self.behavior.sigma_data / AUTHORS_SIGMA_DATA
        sigma = noise.new_full((noise.shape[0],), GENERATOR_SIGMA)
        if self.preconditioned:
            actions: Tensor = self.policy(unit * GENERATOR_SIGMA * noise, unit * sigma, observations)
        else:
            actions = unit * self.policy.network(GENERATOR_SIGMA * noise, sigma, observations)
        return actions

    def kl_loss(self, actions: Tensor, observations: Tensor) -> Tensor:
        """Return a loss with the gradient of the KL divergence at `actions`, at fresh noise (Algorithm 2)."""
        with torch.no_grad():
            sigma, noise = self.draw_noise(actions)
            noisy = actions + sigma[:, None] * noise
            fake, real = (model(noisy, sigma, observations) for model in (self.fake, self.behavior))
            weight = (actions - real).abs().mean(1, keepdim=True).clamp_min(self.noise_levels.sigma_min)
            goal = actions - (fake - real) / weight
        return 0.5 * F.mse_loss(actions, goal)

    def generator_loss(self, actions: Tensor, observations: Tensor) -> tuple[Tensor, Info]:
        """Policy loss at generated `actions`: Eq. 5 with the KL divergence in it."""
        kl, q = self.kl_loss(actions, observations), self.expected_q(actions, observations)
        return self.alpha * kl - self.q_weight * q, {"kl_loss": kl.detach(), "policy_q": q.detach()}

    # ---------------------------------------------------------------- the algorithm

    def update(self, batch: Batch) -> Info:
        """Algorithm 2 with critics: what pretraining does, then the policy, then the fake score on its actions."""
        info = self.pretrain_update(batch)
        actions = self.generate(batch.observations, self.noise.normal(*batch.actions.shape))
        policy_loss, policy_info = self.generator_loss(actions, batch.observations)
        self.minimize("policy", policy_loss)
        fake_loss = self.diffusion_loss(self.fake, actions.detach(), batch.observations)
        self.minimize("fake", fake_loss)
        return {**info, "policy_loss": policy_loss.detach(), **policy_info, "fake_loss": fake_loss.detach()}

    def propose(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Return the policy's candidates `[states, candidates, action_dim]` from standard normal `noise`, its like."""
        repeated = observations.repeat_interleave(noise.shape[1], 0)
        return self.generate(repeated, noise.flatten(0, 1)).view_as(noise).clamp(-1, 1)
