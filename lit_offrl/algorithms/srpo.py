"""Score Regularized Policy Optimization (Chen, Lu, Wang, Su and Zhu, 2024, arXiv 2310.07297).

What the authors' code decides, and what we do:

1. The weights of the times are sigma_t^2 by default, the paper's of variational distillation; the code has two others.
2. The paper subtracts the noise in a_t, whose mean is zero, from the predicted noise. The code does not by default:
   `subtract_noise`.
3. Q's gradient is that of the mean of both target Q. In mazes it is divided by its root mean square over dimensions.
4. t is uniform in [0.02, 0.98] for the policy and in [1e-3, 1] for the behavior model, which has dropout only while it
   is trained itself. Its noise prediction error is a sum over the action's dimensions.
5. The behavior model is stepped by AdamW at PyTorch's default weight decay of 0.01, the policy by Adam with a cosine
   decay.
6. The critic is trained for 1.5 million steps. The code trains a second policy beside it that acts nowhere: left out.

Ours differs from both in what changes no expectation: times of a batch are stratified, and the random frequencies of
the time features are quantiles of their distribution. A gradient of Q that is zero stays zero when it is normalized.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import (
    Actor,
    Info,
    OfflineAlgorithm,
    OptimizerSpec,
    Phase,
    Target,
    draw_noise,
    frozen_copy,
)
from lit_offrl.algorithms.critic_losses import implicit_q_loss
from lit_offrl.algorithms.options import StagedImplicitQ
from lit_offrl.algorithms.vp_diffusion import VPDiffusion
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import as_denoiser, diffuse
from lit_offrl.networks.critics import EnsembleQ, ValueNetwork
from lit_offrl.networks.embeddings import FourierEmbedding
from lit_offrl.networks.gradients import action_gradient
from lit_offrl.networks.mlp import Mish, mlp
from lit_offrl.networks.policies import DeterministicPolicy, ResidualDenoiser
from lit_offrl.ranges import Count, NonNegative, Positive, ProperFraction, Steps, Width

TIME_WIDTHS = 64, 128, 128  # of the Fourier features and the two layers after them
FIRST_TIME, LAST_TIME = 0.02, 0.98  # of the policy's regularization


class SRPO(OfflineAlgorithm):
    """A deterministic policy that climbs Q, and the score of a diffusion model of the behavior keeps it there.

        L_mu      = E || epsilon(a_t, t, s) - epsilon ||^2
        grad L_pi = E [ w(t) epsilon(a_t, t, s) - beta grad_a mean_i Q'_i(s, a) ] d pi(s) / d theta,  a = pi(s)
        a_t       = alpha_t a + sigma_t epsilon,  w(t) = sigma_t^2

    Three phases: the behavior model, the critic (implicit Q-learning), the policy, which acts without any diffusion.
    With beta = 0 it seeks a mode of the behavior.

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        beta: Weight of Q's gradient against the behavior's score; 0 clones a mode of the behavior.
        weighting: w(t): sigma^2 for `vds`, 1 for `stable`, alpha / sigma for `score`.
        subtract_noise: Subtract the noise in a_t from the predicted noise, which changes no expectation.
        normalize_q_gradient: Divide each gradient of Q by its root mean square over dimensions (mazes).
        solver_steps: Network evaluations per sample of the behavior model.
        dropout: Share of hidden values that is dropped while the behavior model is trained.
        hidden_dim: Width of the behavior model's three residual blocks.
        behavior_learning_rate: Step size of the behavior model.
        weight_decay: Weight decay of the behavior model.
        critic: The critic, Q and V, with two hidden layers each.
        policy_layers: Number of the policy's hidden layers; 4 in mazes.
        policy_hidden_dim: Their width.
        policy_learning_rate: Step size of the policy.
        policy_batch_size: States of each batch that the policy is trained on.
        pretrain_steps: Gradient steps that train the behavior model; `max_steps` includes them.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        beta: NonNegative = 0.2,
        weighting: Literal["vds", "stable", "score"] = "vds",
        subtract_noise: bool = False,
        normalize_q_gradient: bool = False,
        solver_steps: Count = 15,
        dropout: ProperFraction = 0.1,
        hidden_dim: Width = 256,
        behavior_learning_rate: Positive = 3e-4,
        weight_decay: NonNegative = 0.01,
        critic: StagedImplicitQ = StagedImplicitQ(steps=1_500_000),
        policy_layers: Count = 2,
        policy_hidden_dim: Width = 256,
        policy_learning_rate: Positive = 3e-4,
        policy_batch_size: Count = 256,
        pretrain_steps: Steps = 2_000_000,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, pretrain_steps, **common)
        self.beta = beta
        self.weighting = weighting
        self.subtract_noise = subtract_noise
        self.normalize_q_gradient = normalize_q_gradient
        self.dropout = dropout
        self.hidden_dim = hidden_dim
        self.behavior_learning_rate, self.weight_decay = behavior_learning_rate, weight_decay
        self.critic_options = critic
        self.policy_learning_rate = policy_learning_rate
        self.policy_batch_size = policy_batch_size

        self.process = VPDiffusion(solver_steps)
        time = nn.Sequential(FourierEmbedding(TIME_WIDTHS[0]), *mlp(TIME_WIDTHS))
        self.behavior = ResidualDenoiser(
            observation_dim, action_dim, time, TIME_WIDTHS[-1], hidden_dim, activation=Mish
        )
        hidden = (critic.hidden_dim,) * 2
        q = EnsembleQ(observation_dim, action_dim, hidden, layer_norm=False, activation=nn.ReLU)
        self.critic = nn.ModuleDict({"q": q, "v": ValueNetwork(observation_dim, hidden, nn.ReLU)})
        self.target_q = frozen_copy(q)
        self.policy = DeterministicPolicy(observation_dim, action_dim, (policy_hidden_dim,) * policy_layers, nn.ReLU)

    def phases(self) -> tuple[Phase, ...]:
        """The behavior model, the critic, the policy."""
        return (
            Phase("behavior", self.pretrain_update, self.pretrain_steps),
            Phase("critic", self.critic_update, self.critic_options.steps),
            Phase("training", self.update),
        )

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """AdamW for the behavior model, one Adam for the critic and one for the policy."""
        decay = self.weight_decay
        return {
            "behavior": OptimizerSpec((self.behavior,), self.behavior_learning_rate, weight_decay=decay),
            "critic": OptimizerSpec((self.critic,), self.critic_options.learning_rate),
            "policy": OptimizerSpec((self.policy,), self.policy_learning_rate, cosine=True),
        }

    def targets(self) -> tuple[Target, ...]:
        """The Q networks whose gradient the policy climbs; they move while the critic is trained."""
        rate, steps = self.critic_options.target_rate, self.critic_options.steps
        return (Target(self.critic["q"], self.target_q, rate, early=True, early_steps=steps),)

    # ---------------------------------------------------------------- losses

    def behavior_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Noise prediction at a random time."""
        time, noisy_actions, noise = self.process.noised(batch.actions, self.noise)
        masks = self.noise.dropout_masks(self.dropout, len(noise), len(self.behavior.blocks), self.hidden_dim)
        error = self.behavior(noisy_actions, time, batch.observations, masks) - noise
        loss: Tensor = error.square().sum(-1).mean()
        return loss, {"behavior_loss": loss.detach()}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """The losses of Q and V, both with V from before the step."""
        options = self.critic_options
        q, v = self.critic["q"], self.critic["v"]
        return implicit_q_loss(q, v, self.target_q, batch, options.expectile, options.discount)

    def time_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return w(t) at the scales of a_t."""
        if self.weighting == "vds":
            return sigma.square()
        return alpha / sigma if self.weighting == "score" else torch.ones_like(sigma)

    def q_gradient(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return the gradient of the mean target Q in the action, `[batch, action_dim]`."""
        gradient = action_gradient(lambda a, s: self.target_q(s, a).mean(0), actions, observations)
        if self.normalize_q_gradient:
            size = gradient.square().mean(-1, keepdim=True).sqrt()
            gradient = gradient / size.clamp(min=torch.finfo(size.dtype).tiny)
        return gradient

    def policy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Return a loss that has the gradient of the class's docstring; its value means nothing."""
        observations = batch.observations
        actions = self.policy(observations).action
        time = FIRST_TIME + (LAST_TIME - FIRST_TIME) * self.noise.stratified(len(actions)).to(actions)
        noise = self.noise.normal(*actions.shape)
        with torch.no_grad():
            alpha, sigma = self.process.scales(time, actions)
            epsilon = self.behavior(diffuse(actions, noise, alpha, sigma), time, observations)
            if self.subtract_noise:
                epsilon = epsilon - noise
            score = self.time_weight(alpha, sigma) * epsilon
            gradient = self.q_gradient(observations, actions)
            direction = score - self.beta * gradient
            q_mean = self.target_q(observations, actions).mean()
        loss = (direction * actions).sum(-1).mean()
        sizes = {"score_norm": score.norm(dim=-1).mean(), "q_gradient_norm": gradient.norm(dim=-1).mean()}
        return loss, {"policy_q": q_mean, **sizes}

    # ---------------------------------------------------------------- the algorithm

    def pretrain_update(self, batch: Batch) -> Info:
        """Train the behavior model."""
        loss, info = self.behavior_loss(batch)
        self.minimize("behavior", loss)
        return info

    def critic_update(self, batch: Batch) -> Info:
        """Train the critic; `EMATargets` moves its target."""
        loss, info = self.critic_loss(self.first_rows(batch, self.critic_options.batch_size))
        self.minimize("critic", loss)
        return info

    def update(self, batch: Batch) -> Info:
        """Train the policy."""
        loss, info = self.policy_loss(self.first_rows(batch, self.policy_batch_size))
        self.minimize("policy", loss)
        return info

    def validation_losses(self, batch: Batch) -> Info:
        """The losses of the behavior model and the critic."""
        return {**self.behavior_loss(batch)[1], **self.critic_loss(batch)[1]}

    # ---------------------------------------------------------------- acting

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the policy's action."""
        action: Tensor = self.policy(observations).action
        return action

    @torch.no_grad()
    def sample_behavior(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample the behavior model: behavior cloning."""
        noise = draw_noise(observations, self.action_dim, generator=generator)
        return self.process.solve(as_denoiser(lambda x, time: self.behavior(x, time, observations)), noise)

    def actors(self) -> dict[str, Actor]:
        """The policy and, to compare with, the behavior model."""
        return {"policy": self.sample_actions, "behavior": self.sample_behavior}

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller target Q."""
        q: Tensor = self.target_q(observations, actions).amin(0)
        return q
