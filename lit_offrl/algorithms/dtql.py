"""Diffusion Trusted Q-Learning (Chen, Wang and Zhou, 2024, arXiv 2405.19690).

Where the authors' code differs from the paper, and which we follow:

1. c_in has a square root and the noise is sigma * epsilon (code; Appendix B has two misprints).
2. The denoised action is clamped to the action box inside both diffusion losses (code; the paper is silent).
3. The diffusion losses are means over action dimensions, not squared norms (code; the alpha values belong to it).
4. ln(sigma) is logistic around ln 0.5 with scale 0.5, truncated to [0.002, 80] (code).
5. Q networks have LayerNorm, V has none; F has no activation after its first layer (code; the paper is silent).
6. The expectile regression of V reads the online Q, not a target Q (both; Algorithm 1 only hints at targets).
7. Target critics follow in the main phase only and serve candidate selection alone (code).
8. The critic's learning rate does not follow the task's (code: always 3e-4).
9. The NLL term is the normal log-density of atanh(a / 1.001) without the tanh Jacobian (code; the same gradients).
10. Bootstrapping is r + discount * V(s'); Eq. 7's discount on r is a misprint (code).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_offrl.algorithms.base import Actor, Info, OfflineAlgorithm, OptimizerSpec, Target, frozen_copy
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import EDMDenoiser
from lit_offrl.diffusion.samplers import sample_heun
from lit_offrl.diffusion.schedules import LogLogisticNoise, karras_sigmas
from lit_offrl.errors import require
from lit_offrl.networks.critics import EnsembleQ, ValueNetwork
from lit_offrl.networks.policies import DiffusionMLP, TanhGaussian, TanhGaussianPolicy

FIGURE_SIGMAS = (0.5, 1.0, 2.0, 4.0)  # times sigma_data; those that training draws most are around 1
FIGURE_NOISES = 8


class DTQL(OfflineAlgorithm):
    """A one-step policy kept by a diffusion model's own loss inside the region that the model trusts.

        L(phi)    = E [ w(sigma) || D_phi(a + sigma e, sigma, s) - a ||^2 ]                                  (Eq. 2)
        L_TR      = the same loss at a_theta ~ pi_theta(. | s), as a function of theta                       (Eq. 4)
        L_pi      = alpha L_TR - E [ min_i Q_i(s, a_theta) ] - nll_weight E [ log pi_theta(a | s) ]          (Eq. 5)
        L_V       = E [ |tau - 1(min_i Q_i(s, a) < V(s))| (min_i Q_i(s, a) - V(s))^2 ]                       (Eq. 6)
        L_Q       = E [ (r + discount V(s') - Q_i(s, a))^2 ]                                                 (Eq. 7)

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        alpha: Weight of the trust-region loss in the policy loss.
        nll_weight: Weight of the negative log-likelihood of dataset actions in the policy loss; 0 leaves it out.
        expectile: Expectile tau of the value regression.
        discount: Discount factor.
        learning_rate: Step size of the diffusion model and the policy.
        critic_learning_rate: Step size of the critics.
        cosine_decay: Decay all step sizes to 0 over the main phase.
        target_rate: Rate at which the target critics follow.
        candidates: Actions sampled per state when acting.
        selection_temperature: Temperature of the softmax over Q that selects one of them.
        hidden_dim: Width of all hidden layers.
        sigma_data: Standard deviation that the diffusion model assumes of actions in [-1, 1]; noise levels are
            multiples of it. The authors' 0.5 belongs to robots; data of finer structure needs a smaller one.
        behavior_sampling_steps: Heun steps when the diffusion model itself acts.
        pretrain_steps: Gradient steps that train critics and diffusion model only; `max_steps` includes them.
        pretrained: Checkpoint of another run whose networks start this one.
        seed: Seed of the training noise (set from `seed_everything`).
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        alpha: float = 1.0,
        nll_weight: float = 0.0,
        expectile: float = 0.7,
        discount: float = 0.99,
        learning_rate: float = 3e-4,
        critic_learning_rate: float = 3e-4,
        cosine_decay: bool = False,
        target_rate: float = 0.005,
        candidates: int = 1024,
        selection_temperature: float = 1.0,
        hidden_dim: int = 256,
        sigma_data: float = 0.5,
        behavior_sampling_steps: int = 10,
        pretrain_steps: int = 50_000,
        pretrained: str | None = None,
        seed: int = 0,
    ) -> None:
        require(candidates >= 1, "model.init_args.candidates", "at least 1", candidates)
        require(
            behavior_sampling_steps >= 2,
            "model.init_args.behavior_sampling_steps",
            "at least 2",
            behavior_sampling_steps,
        )
        require(selection_temperature > 0, "model.init_args.selection_temperature", "positive", selection_temperature)
        require(sigma_data > 0, "model.init_args.sigma_data", "positive", sigma_data)
        require(0 < expectile < 1, "model.init_args.expectile", "between 0 and 1", expectile)
        require(0 <= discount <= 1, "model.init_args.discount", "in [0, 1]", discount)
        super().__init__(observation_dim, action_dim, pretrain_steps, pretrained, seed)
        self.save_hyperparameters()
        self.alpha = alpha
        self.nll_weight = nll_weight
        self.expectile = expectile
        self.discount = discount
        self.target_rate = target_rate
        self.candidates = candidates
        self.selection_temperature = selection_temperature
        self.learning_rates = {"critic": critic_learning_rate, "behavior": learning_rate, "policy": learning_rate}
        self.cosine_decay = cosine_decay
        sigma_range = (0.004 * sigma_data, 160 * sigma_data)  # 0.002 to 80 at sigma_data 0.5
        self.noise_levels = LogLogisticNoise(math.log(sigma_data), 0.5, *sigma_range)
        self.sampling_sigmas = karras_sigmas(behavior_sampling_steps, *sigma_range)

        hidden = (hidden_dim,) * 3
        self.critic = nn.ModuleDict(
            {"q": EnsembleQ(observation_dim, action_dim, hidden), "v": ValueNetwork(observation_dim, hidden)}
        )
        self.target_q = frozen_copy(self.critic["q"])
        self.behavior = EDMDenoiser(DiffusionMLP(observation_dim, action_dim, hidden_dim), sigma_data)
        self.policy = TanhGaussianPolicy(observation_dim, action_dim, hidden)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for both Q and V, one for the diffusion model, one for the policy."""
        modules = {"critic": self.critic, "behavior": self.behavior, "policy": self.policy}
        return {
            name: OptimizerSpec((module,), self.learning_rates[name], self.cosine_decay)
            for name, module in modules.items()
        }

    def targets(self) -> tuple[Target, ...]:
        """The Q networks that select among candidate actions."""
        return (Target(self.critic["q"], self.target_q, self.target_rate),)

    # ---------------------------------------------------------------- losses, in the order of Algorithm 1

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Implicit Q-learning (Eqs. 6 and 7), both parts from the same weights."""
        q = self.critic["q"](batch.observations, batch.actions)
        v = self.critic["v"](batch.observations)
        with torch.no_grad():
            next_v = self.critic["v"](batch.next_observations)
            q_target = batch.rewards + self.discount * (1 - batch.terminals) * next_v
        residual = q.detach().amin(0) - v
        weight = torch.where(residual > 0, self.expectile, 1 - self.expectile)
        v_loss = (weight * residual.square()).mean()
        q_loss = (q - q_target).square().mean(1).sum()
        return q_loss + v_loss, {
            "critic_q_loss": q_loss.detach(),
            "critic_v_loss": v_loss.detach(),
            "q_mean": q.detach().mean(),
            "v_mean": v.detach().mean(),
        }

    def diffusion_loss(self, actions: Tensor, observations: Tensor) -> Tensor:
        """Denoising loss of `actions` (Eq. 2), at fresh noise; the trust-region loss (Eq. 4) for policy actions."""
        sigma = self.noise_levels.quantile(self.uniform(len(actions)))
        return self.behavior.loss(actions, sigma, self.normal(*actions.shape), observations)

    def policy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Policy loss (Eq. 5), with the likelihood term of Section 4 where it has a weight."""
        distribution: TanhGaussian = self.policy(batch.observations)
        actions = distribution.sample(self.normal(*batch.actions.shape))
        trust_region = self.diffusion_loss(actions, batch.observations)
        q = self.critic["q"](batch.observations, actions).amin(0).mean()
        loss = self.alpha * trust_region - q
        info = {"trust_region_loss": trust_region, "policy_q": q, "policy_std": distribution.std.mean()}
        if self.nll_weight:
            nll = -distribution.log_density(batch.actions).mean()
            loss = loss + self.nll_weight * nll
            info["policy_nll"] = nll
        return loss, {name: value.detach() for name, value in info.items()}

    # ---------------------------------------------------------------- the algorithm

    def pretrain_update(self, batch: Batch) -> Info:
        """Train the diffusion model and the critics; the policy waits (Section 4.2)."""
        behavior_loss = self.diffusion_loss(batch.actions, batch.observations)
        self.minimize("behavior", behavior_loss)
        critic_loss, critic_info = self.critic_loss(batch)
        self.minimize("critic", critic_loss)
        return {"behavior_loss": behavior_loss.detach(), **critic_info}

    def update(self, batch: Batch) -> Info:
        """Algorithm 1: critics, diffusion model, policy; targets follow by their callback."""
        critic_loss, critic_info = self.critic_loss(batch)
        self.minimize("critic", critic_loss)
        behavior_loss = self.diffusion_loss(batch.actions, batch.observations)
        self.minimize("behavior", behavior_loss)
        policy_loss, policy_info = self.policy_loss(batch)
        self.minimize("policy", policy_loss)
        return {
            **critic_info,
            "behavior_loss": behavior_loss.detach(),
            "policy_loss": policy_loss.detach(),
            **policy_info,
        }

    # ---------------------------------------------------------------- acting

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample candidates from the policy, select one by softmax over the smaller target Q (Section 4.1)."""
        states, n = len(observations), self.candidates
        noise = torch.randn(states, n, self.action_dim, generator=generator, device=observations.device)
        distribution: TanhGaussian = self.policy(observations)
        actions = TanhGaussian(distribution.mean[:, None], distribution.std[:, None]).sample(noise)
        if n == 1:
            return actions[:, 0]
        q = self.target_q(observations.repeat_interleave(n, 0), actions.flatten(0, 1)).amin(0).view(states, n)
        chosen = torch.multinomial(F.softmax(q / self.selection_temperature, dim=-1), 1, generator=generator)
        return actions[torch.arange(states, device=actions.device), chosen[:, 0]]

    def sample_behavior(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample the diffusion model itself: behavior cloning."""
        noise = torch.randn(len(observations), self.action_dim, generator=generator, device=observations.device)
        return sample_heun(
            lambda x, sigma: self.behavior(x, sigma, observations),
            noise * self.sampling_sigmas[0],
            self.sampling_sigmas,
        )

    def actors(self) -> dict[str, Actor]:
        """The policy and, to compare with, the diffusion model."""
        return {"policy": self.sample_actions, "behavior": self.sample_behavior}

    def figure_maps(self, observations: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """Q, and the trust-region loss of each action by itself at fixed noise levels (Figure 1)."""
        generator = torch.Generator(actions.device).manual_seed(0)
        noise = torch.randn(FIGURE_NOISES, self.action_dim, generator=generator, device=actions.device)
        maps = {"min Q": self.critic["q"](observations, actions).amin(0)}
        # The loss is a mean over its batch: mapped over actions, with a batch of noises for each.
        losses = torch.vmap(self.behavior.loss, in_dims=(0, None, None, 0))
        x, s = (each[:, None].expand(-1, FIGURE_NOISES, -1) for each in (actions, observations))
        for scale in FIGURE_SIGMAS:
            sigma = x.new_full((FIGURE_NOISES,), scale * self.behavior.sigma_data)
            maps[rf"$L_{{TR}}$ at $\sigma = {scale:g}\,\sigma_{{data}}$"] = losses(x, sigma, noise, s)
        return maps
