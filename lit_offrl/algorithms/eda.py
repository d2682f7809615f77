"""Efficient Diffusion Alignment (Chen, Zheng, Su and Zhu, 2024, arXiv 2407.09024).

Where the authors' code differs from the paper, and which we follow:

1. Labels are the softmax of alpha Q with alpha = 3 (code); of Q in the paper, whose values of beta belong to alpha = 3.
2. Alignment takes gradients through f_pi (paper); in the code both networks are evaluated without, and it cannot run.
3. Q in labels and selection is the smaller of the two target Q, not shifted or scaled (code; the paper is silent).
4. The critic is trained for 1.5 million steps (code); as long as IQL's, 1 million, in the paper. Its loss is the mean
   over both Q, and the deterministic policy that the code trains beside it acts nowhere: left out.
5. One time per state, shared by its candidates, each with noise of its own (code; without the first, C(s, t) of Eq. 13
   would not cancel). Times are uniform in [1e-3, 1], losses not weighted by them (code).
6. Candidates come from DPM-Solver++ of order 2 in 15 evaluations, uniform in time; they are not clipped (code), unless
   `clip_denoised` says so: after few updates f is still noisy.
7. Dropout, in pretraining only, comes before LayerNorm; the linear maps of action, time and observation before the
   trunk, whose first layer is linear too, and the widths are the code's. We leave out its unused shortcuts, which
   differ in nothing but the random numbers they take.
8. Acting selects among 4 candidates of the policy (paper, Table 1; the figures' curves take one).
9. Preference labels (Eqs. 15 and 16) and 2-D training are the paper's: there is no code. For 2-D sets the code would
   group data points by 16 instead of sampling candidates; ours are sampled there too.

Ours differs from both in what changes no expectation: times of a batch are stratified, the random frequencies of the
time features are quantiles of their distribution, and labels are made once, when alignment begins, not at every step.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_offrl.algorithms.base import (
    Actor,
    Info,
    OfflineAlgorithm,
    OptimizerSpec,
    Phase,
    Target,
    draw_noise,
    frozen_copy,
    select,
)
from lit_offrl.algorithms.options import Acting, DiffusionOptions, SupportedCritic
from lit_offrl.algorithms.support import Support, make_support, supported_q_loss
from lit_offrl.algorithms.vp_diffusion import (
    FIGURE_SAMPLES,
    FIGURE_TIMES,
    SAMPLED_AT_ONCE,
    VPDiffusion,
    for_all_rows,
)
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import as_denoiser
from lit_offrl.diffusion.schedules import Level
from lit_offrl.errors import require
from lit_offrl.networks.bottleneck import BottleneckNetwork
from lit_offrl.networks.critics import EnsembleQ, ValueNetwork
from lit_offrl.ranges import Count, Fraction, NonNegative, Positive, ProperFraction, Range, Steps

LABEL_STREAM = 1_000_003  # added to the seed: candidates must not repeat the noise of the training


class Labels(NamedTuple):
    """The alignment dataset: candidates at `m` states of the training data, and which of them are how good.

    Attributes:
        rows: Which rows of the dataset the states are, `[m]`.
        candidates: `[m, K, action_dim]`.
        targets: Probability of each candidate to be the best one, `[m, K]`.
    """

    rows: Tensor
    candidates: Tensor
    targets: Tensor


class EDA(OfflineAlgorithm):
    """A diffusion policy whose density is fine-tuned to classify which of K candidate actions has the best Q.

        epsilon(a_t | s, t) = - sigma_t grad f(a_t | s, t),  f = log density + C(s, t)                    (Eqs. 9, 11)
        L_mu = E [ || sigma_t grad f_mu(a_t | s, t) + epsilon ||^2 ]                                          (Eq. 10)
        Q_pi(s, a_t, t) = beta (f_pi - f_mu)(a_t | s, t) + C(s, t)                                            (Eq. 13)
        L_pi = - E [ sum_k p_k log softmax_k Q_pi(s, a_t^k, t) ],  a^k ~ mu(. | s)                            (Eq. 14)
        p    = softmax_k alpha Q(s, a^k), or 1 at the largest Q and 0 elsewhere                           (Eqs. 15, 16)

    The policy becomes mu exp(alpha Q / beta). Three phases: the behavior model mu, the critic (implicit Q-learning),
    the alignment of pi, which starts as mu.

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        alpha: Inverse temperature of Q in the labels.
        beta: How strongly the policy is kept to the behavior model.
        candidates_per_state: Behavior actions K that are labelled at a state.
        loss: Labels of the candidates: `value` by softmax (Eq. 14), `preference` for the best alone (Eq. 15), or `dpo`,
            which is `preference` with two candidates (Eq. 16).
        label_fraction: Share of the dataset's states that have labels, picked at random; alignment sees no others.
        clip_denoised: Clamp the denoised actions to the box in each evaluation of the sampler, also of the candidates
            that are labelled: errors of f at large t, which 1 / alpha_t magnifies, cannot carry actions away.
        dropout: Share of hidden values that is dropped while the behavior model is trained.
        diffusion: Behavior model and policy, networks of the same structure.
        support_actions: Behavior actions sampled per state for the critics other than `implicit`.
        critic: The critic, Q and for `implicit` V, with two hidden layers. A softmax backup has the inverse temperature
            alpha where the option has none.
        acting: How an action is chosen.
        policy_learning_rate: Step size of the policy.
        alignment_batch_size: States of each batch that the policy is aligned on.
        pretrain_steps: Gradient steps that train the behavior model; `max_steps` includes them.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        alpha: NonNegative = 3.0,
        beta: Positive = 1.0,
        candidates_per_state: Annotated[int, Range(2, 4096)] = 16,
        loss: Literal["value", "preference", "dpo"] = "value",
        label_fraction: Fraction = 1.0,
        clip_denoised: bool = False,
        dropout: ProperFraction = 0.1,
        diffusion: DiffusionOptions = DiffusionOptions(),
        support_actions: Annotated[int, Range(2, 4096)] = 16,
        critic: SupportedCritic = SupportedCritic(steps=1_500_000),
        acting: Acting = Acting(candidates=4),
        policy_learning_rate: Positive = 5e-5,
        alignment_batch_size: Count = 256,
        pretrain_steps: Steps = 1_000_000,
        **common: Any,
    ) -> None:
        is_valid = loss != "dpo" or candidates_per_state == 2
        require(is_valid, "model.init_args.candidates_per_state", "2 where loss is dpo", candidates_per_state)
        super().__init__(observation_dim, action_dim, pretrain_steps, **common)
        self.alpha = alpha
        self.beta = beta
        self.candidates_per_state = candidates_per_state
        self.has_soft_labels = loss == "value"
        self.label_fraction = label_fraction
        self.clip_denoised = clip_denoised
        self.dropout = dropout
        self.critic_options = critic
        self.acting = acting
        self.learning_rates = {
            "behavior": diffusion.learning_rate,
            "critic": critic.learning_rate,
            "policy": policy_learning_rate,
        }
        self.alignment_batch_size = alignment_batch_size
        self.support_actions = support_actions
        self.support: Support | None = None
        self.labels: Labels | None = None

        self.process = VPDiffusion(diffusion.solver_steps)
        seen = observation_dim if diffusion.conditional else 0
        self.behavior = BottleneckNetwork(action_dim, seen, diffusion.hidden_dim)
        self.policy = BottleneckNetwork(action_dim, seen, diffusion.hidden_dim)
        hidden = (critic.hidden_dim,) * 2
        q = EnsembleQ(observation_dim, action_dim, hidden, layer_norm=critic.layer_norm, activation=nn.ReLU)
        self.critic = nn.ModuleDict({"q": q})
        if critic.kind == "implicit":
            self.critic["v"] = ValueNetwork(observation_dim, hidden, nn.ReLU)
        self.target_q = frozen_copy(q)

    def phases(self) -> tuple[Phase, ...]:
        """The behavior model, the critic, the policy."""
        return (
            Phase("behavior", self.pretrain_update, self.pretrain_steps),
            Phase("critic", self.critic_update, self.critic_options.steps, prepare=self.prepare_support),
            Phase("alignment", self.update, begin=self.begin_main, prepare=self.prepare_labels),
        )

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for each network."""
        return {name: OptimizerSpec((getattr(self, name),), rate) for name, rate in self.learning_rates.items()}

    def targets(self) -> tuple[Target, ...]:
        """The Q networks that label and select; they move while the critic is trained."""
        rate, steps = self.critic_options.target_rate, self.critic_options.steps
        return (Target(self.critic["q"], self.target_q, rate, early=True, early_steps=steps),)

    def begin_main(self) -> None:
        """Start the policy as the behavior model, and release the support actions: the critic is final."""
        self.labels = self.support = None
        self.policy.load_state_dict(self.behavior.state_dict())

    # ---------------------------------------------------------------- the diffusion models

    @torch.no_grad()
    def sample(
        self, network: BottleneckNetwork, observations: Tensor, count: int, generator: torch.Generator | None
    ) -> Tensor:
        """Return `count` actions of a diffusion model at each of `[batch, observation_dim]`."""
        noise = draw_noise(observations, count, self.action_dim, generator=generator)
        denoise = as_denoiser(lambda x, time: network.gradient(x, time, observations[:, None]), "score")

        def denoise_clamped(x: Tensor, level: Level) -> Tensor:
            return self.units.clamp(denoise(x, level))

        return self.process.solve(denoise_clamped if self.clip_denoised else denoise, noise)

    def log_density(self, observations: Tensor, actions: Tensor, time: Tensor) -> Tensor:
        """Return the policy's log density of a_t, up to a constant of observation and time (Eq. 11), `[...]`.

        Args:
            observations: `[..., observation_dim]`; leading dimensions broadcast.
            actions: a_t, `[..., action_dim]`.
            time: t from 1e-3, where a_t is a itself, to 1, where it is noise, `[...]`.
        """
        density: Tensor = self.policy(actions, time, observations)
        return density

    def predicted_q(self, observations: Tensor, actions: Tensor, time: Tensor) -> Tensor:
        """Return alpha Q as the policy knows it, up to a constant of observation and time (Eq. 13), `[...]`."""
        with torch.no_grad():
            behavior: Tensor = self.behavior(actions, time, observations)
        policy: Tensor = self.policy(actions, time, observations)
        return self.beta * (policy - behavior)

    # ---------------------------------------------------------------- losses

    def behavior_loss(self, batch: Batch) -> Tensor:
        """Noise prediction by the gradient of f (Eq. 10), with the same dropout in f and its gradient."""
        time, noisy_actions, noise = self.process.noised(batch.actions, self.noise)
        layers, width = len(self.behavior.blocks), self.behavior.mix.out_features
        masks = self.noise.dropout_masks(self.dropout, len(noise), layers, width)
        _, sigma = self.process.scales(time, noise)
        gradient = self.behavior.gradient(noisy_actions, time, batch.observations, masks)
        loss: Tensor = (sigma * gradient + noise).square().sum(-1).mean()
        return loss

    def best_q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return the smaller target Q, `[...]`, of leading dimensions that broadcast."""
        q: Tensor = self.target_q(observations, actions).amin(0)
        return q

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Return the loss of the critic by its kind: IQL (Section 5.1), or one of the critics of Figure 4."""
        support = None if self.support is None else self.support.of(batch)
        return supported_q_loss(
            self.critic, self.target_q, batch, support, self.critic_options, self.alpha, self.noise, self.units.limit
        )

    def prepare_support(self, batch: Batch) -> None:
        """Sample the behavior actions that the critic needs, before its first update and in a resumed run."""
        if self.support is None and self.critic_options.kind != "implicit":
            is_conservative = self.critic_options.kind == "conservative"
            sample = partial(self.sample, self.behavior)
            self.support = make_support(self, sample, self.support_actions, everywhere=is_conservative)

    @torch.no_grad()
    def make_labels(self) -> Labels:
        """Sample candidates at the states that are to have labels, and label them by their Q.

        A function of the run's seed and of networks that alignment leaves alone: a resumed run makes the same again.
        """
        assert self.dataset_observations is not None, "alignment needs the observations of a dataset"
        n = len(self.dataset_observations)
        labelled = max(round(self.label_fraction * n), 1)
        generator = torch.Generator(self.device).manual_seed(self.seed + LABEL_STREAM)
        rows = torch.randperm(n, generator=generator, device=self.device)[:labelled].sort().values
        every, count = self.dataset_observations, self.candidates_per_state
        some = max(SAMPLED_AT_ONCE // count, 1)
        sample = partial(self.sample, self.behavior, count=count, generator=generator)
        candidates = for_all_rows(
            lambda these: sample(every[these]), rows, some, "candidates", show_progress=self.shows_progress
        )
        pieces = zip(torch.split(rows, some), torch.split(candidates, some), strict=True)
        q = torch.cat([self.best_q(every[these][:, None], actions) for these, actions in pieces])
        targets = (self.alpha * q).softmax(-1) if self.has_soft_labels else F.one_hot(q.argmax(-1), count).to(q)
        return Labels(rows, candidates, targets)

    def labelled(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return observations, candidates and targets of as many labelled states as `batch` has rows."""
        assert batch.rows is not None
        assert self.labels is not None
        assert self.dataset_observations is not None
        index, count, n = batch.rows, len(self.labels.rows), len(self.dataset_observations)
        if count < n:  # a uniform row of all plus a uniform number below 1 falls on each of the labelled ones alike
            index = ((index + self.noise.uniform(len(index)).double()) * (count / n)).long().clamp(max=count - 1)
        rows, candidates, targets = (each[index] for each in self.labels)
        return self.dataset_observations[rows], candidates, targets

    def alignment_loss(self, observations: Tensor, candidates: Tensor, targets: Tensor) -> tuple[Tensor, Info]:
        """Cross-entropy of the predicted and the labelled optimality of noisy candidates (Eqs. 14, 15 and 16)."""
        time, noisy_candidates, _ = self.process.noised(candidates, self.noise)
        logits = self.predicted_q(observations[:, None], noisy_candidates, time[:, None])
        agreement = (logits.argmax(-1) == targets.argmax(-1)).float().mean()
        return F.cross_entropy(logits, targets), {"agreement": agreement, "logit_std": logits.detach().std(-1).mean()}

    # ---------------------------------------------------------------- the algorithm

    def pretrain_update(self, batch: Batch) -> Info:
        """Train the behavior model."""
        loss = self.behavior_loss(batch)
        self.minimize("behavior", loss)
        return {"behavior_loss": loss.detach()}

    def validation_losses(self, batch: Batch) -> Info:
        """The losses of the behavior model and, where it needs no support actions, the critic."""
        is_implicit = self.critic_options.kind == "implicit"
        critic_info = self.critic_loss(batch)[1] if is_implicit else {}
        return {**critic_info, "behavior_loss": self.behavior_loss(batch)}

    def critic_update(self, batch: Batch) -> Info:
        """Train the critic; `EMATargets` moves its target."""
        loss, info = self.critic_loss(self.first_rows(batch, self.critic_options.batch_size))
        self.minimize("critic", loss)
        return info

    def prepare_labels(self, batch: Batch) -> None:
        """Make the labels before the first alignment; a resumed run makes them again, a checkpoint has no room."""
        if self.labels is None:
            self.labels = self.make_labels()

    def update(self, batch: Batch) -> Info:
        """Align the policy."""
        loss, info = self.alignment_loss(*self.labelled(self.first_rows(batch, self.alignment_batch_size)))
        self.minimize("policy", loss)
        return {"alignment_loss": loss.detach(), **info}

    # ---------------------------------------------------------------- acting

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample candidates from the policy and select the one of the highest Q (Section 5.1, Appendix D).

        Before alignment there is no policy yet: the behavior model acts.
        """
        if self.gradient_step <= self.main_start:
            return self.sample_behavior(observations, generator)
        actions = self.sample(self.policy, observations, self.acting.candidates, generator)
        if self.acting.candidates == 1:
            return actions[:, 0]
        return select(
            actions, self.best_q(observations[:, None], actions), self.acting.selection_temperature, generator
        )

    def sample_behavior(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample the behavior model itself: behavior cloning."""
        return self.sample(self.behavior, observations, 1, generator)[:, 0]

    def actors(self) -> dict[str, Actor]:
        """The policy and, to compare with, the behavior model."""
        return {"policy": self.sample_actions, "behavior": self.sample_behavior}

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller target Q."""
        return self.best_q(observations, actions)

    def figure_maps(self, observations: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """Densities of both models and predicted Q at times of the diffusion, a row for each (Figures 3 and 8).

        They are shown where several noisy samples of the behavior model fall: nothing has trained f elsewhere. The data
        is drawn before the first row; before the others stand the critic and, everywhere, both log densities at first.
        """
        generator = torch.Generator(actions.device).manual_seed(0)
        samples = self.sample(self.behavior, observations[:1], FIGURE_SAMPLES, generator)[0]
        noise = torch.randn(samples.shape, generator=generator, device=actions.device)

        def at(t: float) -> tuple[Tensor, ...]:
            time = torch.full_like(actions[:, 0], t)
            seen = self.process.near_samples(actions, samples, noise, t)
            logs = [self.behavior(actions, time, observations), self.log_density(observations, actions, time)]
            logs = [each - each.where(seen, -torch.inf).max() for each in logs]
            shown = [*(each.exp() for each in logs), self.predicted_q(observations, actions, time)]
            return *(each.where(seen, torch.nan) for each in shown), *logs

        first, *_ = FIGURE_TIMES
        *_, log_behavior, log_policy = at(first)
        heads: tuple[dict[str, Tensor], ...] = (
            {},
            {r"labels: $\alpha \min Q$": self.alpha * self.best_q(observations, actions)},
            {rf"$\log \mu$, t = {first:g}": log_behavior},
            {rf"$\log \pi$, t = {first:g}": log_policy},
        )
        maps: dict[str, Tensor] = {}
        for t, head in zip(FIGURE_TIMES, heads, strict=True):
            behavior, policy, q, *_ = at(t)
            maps |= head
            maps[rf"$\mu$, t = {t:g}"] = behavior
            maps[rf"$\pi$, t = {t:g}"] = policy
            maps[rf"$\beta (f_\pi - f_\mu)$, t = {t:g}"] = q
        if self.gradient_step <= self.main_start:  # there is no policy yet
            maps = {title: values for title, values in maps.items() if r"\pi" not in title}
        return maps
