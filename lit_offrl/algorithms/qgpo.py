"""Q-Guided Policy Optimization by contrastive energy prediction (Lu, Chen et al., 2023, arXiv 2304.12824).

Where the authors' code differs from the paper or adds to it, and which we follow:

1. The backup has an inverse temperature of its own, `backup_beta`, which the published command sets to 1 at beta = 3
   (code).
2. Q in labels and backup is the smaller of two target Q; the critic's loss is the mean over both (code).
3. f is trained from the first update of the critic on, for twice as long as the critic (code).
4. Support actions at s and s' are sampled once, when the behavior model is final, and kept (code).
5. One t per state, shared by its support actions, each with noise of its own (both; without the first, the constant
   of s and t that f is free to have would not cancel).
6. The solver is DPM-Solver++ of order 2, 15 evaluations uniform in time from 1 to 1e-3; one sample acts (code).
7. On 2-D sets the code contrasts the actions of a whole batch at one t. Ours takes `support_actions` of them, and a
   time for each row.

Ours differs from both in what changes no expectation: times of a batch are stratified, and the random frequencies of
the time features are quantiles of their distribution.

`guidance` names what the paper compares with: regression on beta Q of the clean action (`mse`), which learns its mean
instead of the logarithm of its exponential mean, and the gradient of Q through the denoised action (`dps`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from lit_offrl.algorithms.critic_losses import in_support_q_loss
from lit_offrl.algorithms.energy_guided import (
    check_width,
    draw_for_actors,
    energy_maps,
    sample_behavior,
    sample_guided,
)
from lit_offrl.algorithms.options import CriticOptions, DiffusionOptions, EnergyOptions
from lit_offrl.algorithms.support import Support, actions_of_the_batch, make_support
from lit_offrl.algorithms.vp_diffusion import VPDiffusion
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import x0_from_epsilon
from lit_offrl.networks.critics import EnsembleQ
from lit_offrl.networks.energy_guidance import EnergyNetwork, NoiseNetwork
from lit_offrl.networks.gradients import action_gradient
from lit_offrl.ranges import Count, NonNegative, Positive, Range, Steps


@dataclass(frozen=True)
class InSupportCritic(CriticOptions):
    """A critic with the softmax backup over behavior actions, trained in phases of its own.

    Attributes:
        steps: Gradient steps that train the critic, and f beside it; `max_steps` includes them.
        batch_size: Transitions of each batch that the critic is trained on; the behavior model takes all.
        backup_beta: Inverse temperature of the softmax in the backup.
        layer_norm: Whether Q has LayerNorm, see `SupportedCritic`.
    """

    steps: Steps = 500_000
    batch_size: Count = 256
    backup_beta: NonNegative = 1.0
    layer_norm: bool = False


def contrastive_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return - E [ sum_k softmax_k(labels) log softmax_k(logits) ], of `[batch, K]` (CEP)."""
    return F.cross_entropy(logits, labels.softmax(-1))


class QGPO(OfflineAlgorithm):
    """A diffusion policy guided by an energy that is trained to classify which of K noisy actions has the better Q.

        f_t(s, a_t) = log E_{mu(a_0 | a_t, s)} exp(beta Q(s, a_0))                                    (Theorem 3.1)
        grad log pi_t = grad log mu_t + omega grad f_t
        L_mu = E || epsilon(s, a_t, t) - epsilon ||^2
        L_f  = - E [ sum_k softmax_k(beta Q(s, a^k)) log softmax_k f(s, a_t^k, t) ],  a^k ~ mu(. | s)          (CEP)
        L_Q  = E [ ( r + discount sum_k softmax_k(beta' Q(s', a'^k)) Q(s', a'^k) - Q(s, a) )^2 ]

    The policy becomes mu exp(beta Q) in the limit of many support actions; f is known up to a constant of s and t.
    Three phases: the behavior model; the critic and f together; f alone. With the guidance `dps` there is no f, and the
    critic has all that follows the behavior model.

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        beta: Inverse temperature of Q in the policy.
        omega: Scale of the guidance when acting; 0 is the behavior model.
        sweep: Further values of omega that are evaluated beside the policy, as actors `omega_...`.
        guidance: How f is learned: `contrastive`, by regression (`mse`), or not at all, by Q's gradient (`dps`).
        support_actions: Behavior actions K sampled at each state and each next state. On 2-D sets without observations
            the actions of a batch are each other's support actions.
        diffusion: The behavior model.
        critic: The critic.
        energy: The network f, with four hidden layers.
        pretrain_steps: Gradient steps that train the behavior model; `max_steps` includes them.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        beta: Positive = 3.0,
        omega: NonNegative = 1.0,
        sweep: Sequence[NonNegative] = (),
        guidance: Literal["contrastive", "mse", "dps"] = "contrastive",
        support_actions: Annotated[int, Range(2, 4096)] = 16,
        diffusion: DiffusionOptions = DiffusionOptions(hidden_dim=512, learning_rate=1e-4),
        critic: InSupportCritic = InSupportCritic(),
        energy: EnergyOptions = EnergyOptions(),
        pretrain_steps: Steps = 600_000,
        **common: Any,
    ) -> None:
        check_width(diffusion.hidden_dim)
        super().__init__(observation_dim, action_dim, pretrain_steps, **common)
        self.beta = beta
        self.guidance_scales = {"policy": omega, "behavior": 0.0, **{f"omega_{scale:g}": scale for scale in sweep}}
        self.guidance = guidance
        self.learns_energy = guidance != "dps"
        self.support_actions = support_actions
        self.conditional = diffusion.conditional
        self.critic_options = critic
        self.energy_options = energy
        self.learning_rates = {"behavior": diffusion.learning_rate, "critic": critic.learning_rate}
        self.support: Support | None = None

        self.process = VPDiffusion(diffusion.solver_steps)
        seen = observation_dim if diffusion.conditional else 0
        self.behavior = NoiseNetwork(action_dim, seen, diffusion.hidden_dim)
        hidden = (critic.hidden_dim,) * 3
        q = EnsembleQ(observation_dim, action_dim, hidden, layer_norm=critic.layer_norm, activation=nn.ReLU)
        self.critic = nn.ModuleDict({"q": q})
        self.target_q = frozen_copy(q)
        if self.learns_energy:
            self.energy = EnergyNetwork(action_dim, seen, energy.hidden_dim, layers=4)
            self.learning_rates["energy"] = energy.learning_rate

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for each network."""
        return {name: OptimizerSpec((getattr(self, name),), rate) for name, rate in self.learning_rates.items()}

    def phases(self) -> tuple[Phase, ...]:
        """The behavior model, the critic and f, f alone."""
        behavior = Phase("behavior", self.pretrain_update, self.pretrain_steps)
        begin, prepare = self.forget_support, self.prepare_support
        if not self.learns_energy:
            return behavior, Phase("critic", self.critic_update, begin=begin, prepare=prepare)
        steps = self.critic_options.steps
        return (
            behavior,
            Phase("critic and energy", self.concurrent_update, steps, begin, prepare),
            Phase("energy", self.update, prepare=prepare),
        )

    def targets(self) -> tuple[Target, ...]:
        """The Q networks that label actions and guide; they move while the critic is trained."""
        rate, steps = self.critic_options.target_rate, self.critic_options.steps
        return (Target(self.critic["q"], self.target_q, rate, early=self.learns_energy, early_steps=steps),)

    # ---------------------------------------------------------------- losses

    def behavior_loss(self, batch: Batch) -> Tensor:
        """E || epsilon(a_t | s, t) - epsilon ||^2, a sum over the action's dimensions."""
        time, noisy_actions, noise = self.process.noised(batch.actions, self.noise)
        loss: Tensor = (self.behavior(noisy_actions, time, batch.observations) - noise).square().sum(-1).mean()
        return loss

    def best_q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return the smaller target Q, `[...]`, of leading dimensions that broadcast."""
        q: Tensor = self.target_q(observations, actions).amin(0)
        return q

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Regression on the softmax backup over support actions."""
        options, next_actions = self.critic_options, self.support_of(batch).next_actions
        q, target_q = self.critic["q"], self.target_q
        loss, values = in_support_q_loss(q, target_q, batch, next_actions, options.backup_beta, options.discount)
        return loss, {"q_loss": loss.detach(), "q_mean": values.detach().mean()}

    def energy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Cross-entropy of the better of noisy support actions (CEP); or the regression that it is compared with."""
        actions = self.support_of(batch).actions
        assert actions is not None
        observations = batch.observations[:, None]
        with torch.no_grad():
            labels = self.beta * self.best_q(observations, actions)
        time, noisy_actions, _ = self.process.noised(actions, self.noise)
        f = self.energy(noisy_actions, time[:, None], observations)
        loss = contrastive_loss(f, labels) if self.guidance == "contrastive" else (f - labels).square().mean()
        return loss, {"energy_std": f.detach().std(-1).mean(), "label_std": labels.std(-1).mean()}

    # ---------------------------------------------------------------- support actions

    def forget_support(self) -> None:
        """Drop support actions that an earlier behavior model made."""
        self.support = None

    def prepare_support(self, batch: Batch) -> None:
        """Sample the support actions once the behavior model is final, and in a resumed run."""
        if self.support is None and self.conditional:
            self.support = self.make_support()

    def make_support(self) -> Support:
        """Sample behavior actions at the observations and next observations of the dataset."""
        sample = partial(sample_behavior, self.process, self.behavior, action_dim=self.action_dim)
        return make_support(self, sample, self.support_actions, everywhere=True)

    def support_of(self, batch: Batch) -> Support:
        """Return behavior actions at the transitions of `batch`, without observations those of the batch."""
        if not self.conditional:
            actions = actions_of_the_batch(batch, self.noise, self.support_actions)
            return Support(actions, actions)
        assert self.support is not None
        return self.support.of(batch)

    # ---------------------------------------------------------------- the algorithm

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

    def concurrent_update(self, batch: Batch) -> Info:
        """Train the critic, then f."""
        return {**self.critic_update(batch), **self.update(batch)}

    # ---------------------------------------------------------------- acting

    def energy_gradient(self, noisy_actions: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        """Return the gradient of f; or of beta min Q(s, E[a_0 | a_t, s]) (`dps`, Chung et al. 2023)."""
        if self.learns_energy:
            return self.energy.gradient(noisy_actions, time, observations)

        def value(noisy_actions: Tensor, time: Tensor, observations: Tensor) -> Tensor:
            alpha, sigma = self.process.scales(time, noisy_actions)
            clean = x0_from_epsilon(noisy_actions, self.behavior(noisy_actions, time, observations), alpha, sigma)
            return self.beta * self.best_q(observations, clean)

        return action_gradient(value, noisy_actions, time, observations)

    def scale_of(self, actor: str) -> float:
        """Return the guidance scale of one of `actors()`; 0 for all until the behavior model is final."""
        return self.guidance_scales[actor] if self.gradient_step > self.pretrain_steps else 0.0

    def guided_sample(self, observations: Tensor, noise: Tensor, scales: Sequence[float]) -> Tensor:
        """Return actions of the policies mu exp(omega f), see `sample_guided`."""
        guidance = self.energy_gradient
        return sample_guided(self.process, self.behavior, guidance, observations, noise, scales)

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
        if self.learns_energy and self.gradient_step > self.pretrain_steps:
            maps |= energy_maps(self.process, self.behavior, self.energy, observations, actions)
        return maps
