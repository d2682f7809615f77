"""What energy-guided policies share (QGPO: Lu et al., 2023, arXiv 2304.12824; AEPO: Hu et al., 2025, arXiv 2505.01822).

A noise network of the behavior policy mu, a critic, and a network f_t whose gradient turns the score of mu into the
policy's. How f is trained is each algorithm's own affair.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Actor, Info, OptimizerSpec, frozen_copy
from lit_offrl.algorithms.implicit_q import bootstrapped, critic_loss
from lit_offrl.algorithms.vp_diffusion import FIGURE_SAMPLES, FIGURE_TIMES, SAMPLED_AT_ONCE, VPDiffusion
from lit_offrl.batch import Batch
from lit_offrl.diffusion.denoisers import AtLevel, x0_from_epsilon
from lit_offrl.diffusion.samplers import sample_dpm_singlestep
from lit_offrl.diffusion.schedules import Level
from lit_offrl.errors import require
from lit_offrl.networks.critics import EnsembleQ, ValueNetwork
from lit_offrl.networks.energy_guidance import EnergyNetwork, NoiseNetwork
from lit_offrl.networks.gradients import full_precision

SUPPORT_STREAM = 2_000_003  # added to the seed: support actions must not repeat the noise of the training
NEXT_SUPPORT_STREAM = 3_000_017

Rescale = Literal["none", "sample", "batch"]
Critic = Literal["implicit", "in_support", "conservative"]


class Support(NamedTuple):
    """Behavior actions at every transition of the dataset, or of a batch; None where nothing asks for them.

    Attributes:
        actions: At its observation, `[n, K, action_dim]`.
        next_actions: At its next observation, `[n, K, action_dim]`.
    """

    actions: Tensor | None
    next_actions: Tensor | None


# ---------------------------------------------------------------- guidance


def rescaled(guided: Tensor, plain: Tensor, scales: Tensor, rescale: Rescale) -> Tensor:
    """Return the guided score with the norm of the plain one (AEPO, Eq. 45); of noise the same, sigma_t cancels.

    Of the two readings that the equation leaves open neither keeps the distribution that guidance aims at, see `AEPO`.

    Args:
        guided: `[batch, dim]`.
        plain: `[batch, dim]`; where the two are equal, and where one is 0, nothing changes.
        scales: Guidance scale omega of each row, `[batch]`.
        rescale: "sample" for the norm of a row, which no other row changes; "batch" for the norm of all rows of the
            same scale together; "none" for `guided` as it is.
    """
    if rescale == "none":
        return guided
    both = torch.stack([plain, guided])
    squares = (both * both).sum(-1)
    if rescale == "batch":
        squares = squares @ (scales[:, None] == scales).to(squares)
    plain_square, guided_square = squares
    precision = torch.finfo(guided.dtype)
    least = (precision.eps**2 * plain_square).clamp(min=precision.tiny)  # finite factors, and 1 where the two are equal
    factor: Tensor = (plain_square / torch.maximum(guided_square, least)).sqrt()
    return factor[:, None] * guided


def guided_epsilon(epsilon: Tensor, gradient: Tensor, sigma: float, scales: Tensor, rescale: Rescale) -> Tensor:
    """Return the noise epsilon - omega sigma_t grad f_t, whose score is grad log mu_t + omega grad f_t (AEPO, Eq. 13).

    Args:
        epsilon: Noise that the behavior model predicts, `[batch, dim]`.
        gradient: grad f_t, `[batch, dim]`.
        sigma: sigma_t.
        scales: omega, `[batch]`.
        rescale: See `rescaled`.
    """
    guided = torch.addcmul(epsilon, scales[:, None], gradient, value=-sigma)
    return rescaled(guided, epsilon, scales, rescale)


# ---------------------------------------------------------------- critics


def in_support_value(q: Tensor, beta: float) -> Tensor:
    """Return sum_k softmax_k(beta Q_k) Q_k, `[batch]`, of `[batch, K]`: E[Q] under mu exp(beta Q) (QGPO)."""
    return ((beta * q).softmax(-1) * q).sum(-1)


def conservative_penalty(q_data: Tensor, q_others: Tensor) -> Tensor:
    """Return log(exp Q(s, a) + sum_j exp Q(s, a_j)) - Q(s, a), `[members, batch]` (CQL, Kumar et al. 2020, Eq. 4).

    The log-sum-exp is over the data action and others, unweighted: the second version in CQL's code. Never negative.

    Args:
        q_data: Q at the data actions, `[members, batch]`.
        q_others: Q at other actions of the same states, `[members, batch, actions]`.
    """
    return torch.cat([q_others, q_data[..., None]], dim=-1).logsumexp(-1) - q_data


class EnergyGuided(VPDiffusion):
    """A diffusion policy with the score grad log mu(a_t | s, t) + omega grad f(a_t | s, t).

    The hyper-parameters are described where the algorithms take them. One without a learning rate of an energy has
    none, and overrides `guidance`.

    Attributes:
        support: Behavior actions at all states of the dataset, once they are needed. Too large for a checkpoint: a
            resumed run makes the same again.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        beta: float,
        backup_beta: float,
        omega: float,
        sweep: Sequence[float],
        rescale: Rescale,
        critic: Critic,
        support_actions: int,
        expectile: float,
        conservatism: float,
        discount: float,
        target_rate: float,
        conditional: bool,
        learning_rates: Mapping[str, float],
        critic_batch_size: int,
        energy_batch_size: int,
        hidden_dim: int,
        critic_hidden_dim: int,
        energy_hidden_dim: int,
        energy_layers: int,
        pretrain_steps: int,
        critic_steps: int,
        pretrained: str | None,
        seed: int,
    ) -> None:
        require(beta > 0, "model.init_args.beta", "positive", beta)
        require(omega >= 0, "model.init_args.omega", "at least 0", omega)
        require(all(each >= 0 for each in sweep), "model.init_args.sweep", "a list of numbers of at least 0", sweep)
        require(support_actions >= 2, "model.init_args.support_actions", "at least 2", support_actions)
        require(0 < expectile < 1, "model.init_args.expectile", "between 0 and 1", expectile)
        require(conservatism >= 0, "model.init_args.conservatism", "at least 0", conservatism)
        require(0 <= discount <= 1, "model.init_args.discount", "in [0, 1]", discount)
        require(critic_steps >= 0, "model.init_args.critic_steps", "at least 0", critic_steps)
        require(hidden_dim % 4 == 0, "model.init_args.hidden_dim", "a multiple of 4", hidden_dim)
        for name, count in {"critic_batch_size": critic_batch_size, "energy_batch_size": energy_batch_size}.items():
            require(count >= 1, f"model.init_args.{name}", "at least 1", count)
        super().__init__(observation_dim, action_dim, pretrain_steps, pretrained, seed)
        self.beta = beta
        self.backup_beta = backup_beta
        self.omega = omega
        self.sweep = tuple(sweep)
        self.rescale: Rescale = rescale
        self.critic_kind = critic
        self.support_actions = support_actions
        self.expectile = expectile
        self.conservatism = conservatism
        self.discount = discount
        self.target_rate = target_rate
        self.conditional = conditional
        self.learning_rates = dict(learning_rates)
        self.critic_batch_size = critic_batch_size
        self.energy_batch_size = energy_batch_size
        self.critic_steps = critic_steps
        self.support: Support | None = None

        seen = observation_dim if conditional else 0
        self.behavior = NoiseNetwork(action_dim, seen, hidden_dim)
        hidden = (critic_hidden_dim,) * 3
        q = EnsembleQ(observation_dim, action_dim, hidden, layer_norm=False, activation=nn.ReLU)
        self.critic = nn.ModuleDict({"q": q})
        if critic == "implicit":
            self.critic["v"] = ValueNetwork(observation_dim, hidden, nn.ReLU)
        self.target_q = frozen_copy(q)
        if self.learns_energy:
            self.energy = EnergyNetwork(action_dim, seen, energy_hidden_dim, energy_layers)

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam for each network."""
        return {name: OptimizerSpec((getattr(self, name),), rate) for name, rate in self.learning_rates.items()}

    @property
    def learns_energy(self) -> bool:
        """Whether there is a network f."""
        return "energy" in self.learning_rates

    @property
    @abstractmethod
    def guided_from(self) -> int:
        """The gradient step at which guidance begins to be learned; until then the behavior model acts."""

    @property
    def supports(self) -> tuple[bool, bool]:
        """Whether training needs behavior actions at the observation and at the next observation."""
        return self.critic_kind == "conservative", self.critic_kind != "implicit"

    # ---------------------------------------------------------------- the diffusion model

    def guidance(self, noisy_actions: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        """Return grad f_t, by which sampling is guided, `[batch, action_dim]`."""
        return self.energy.gradient(noisy_actions, time, observations)

    def predictor(self, observations: Tensor) -> AtLevel:
        """Return the behavior model's noise prediction as a function of noisy actions and a noise level."""

        def predict(noisy_actions: Tensor, level: Level) -> Tensor:
            epsilon: Tensor = self.behavior(noisy_actions, level.times(noisy_actions), observations)
            return epsilon

        return predict

    @torch.no_grad()
    def guided_sample(self, observations: Tensor, noise: Tensor, scales: Tensor) -> Tensor:
        """Return actions of the policies mu exp(omega f), `[batch, action_dim]`, each row with an omega of its own.

        With an omega of 0 it is the behavior model, exactly; where all are 0, f is not evaluated.

        Args:
            observations: Normalised, `[batch, observation_dim]`.
            noise: a_t at t = 1, `[batch, action_dim]`.
            scales: omega, `[batch]`.
        """
        with full_precision(noise):
            predict = self.predictor(observations)
            if not scales.any():
                return self._solve(predict, noise)

            def guided(noisy_actions: Tensor, level: Level) -> Tensor:
                epsilon = predict(noisy_actions, level)
                gradient = self.guidance(noisy_actions, level.times(noisy_actions), observations)
                return guided_epsilon(epsilon, gradient, level.sigma, scales, self.rescale)

            return self._solve(guided, noise)

    @torch.no_grad()
    def sample_behavior(self, observations: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """Return `count` actions of the behavior model at each of `[batch, observation_dim]`."""
        shape, like = (len(observations), count, self.action_dim), observations
        noise = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
        with full_precision(noise):
            return self._solve(self.predictor(observations[:, None]), noise)

    def _solve(self, predict: AtLevel, noise: Tensor) -> Tensor:
        """Return what DPM-Solver++ makes of `noise` with the noise that `predict` tells from a_t at a level."""

        def denoise(noisy_actions: Tensor, level: Level) -> Tensor:
            return x0_from_epsilon(noisy_actions, predict(noisy_actions, level), level.alpha, level.sigma)

        return sample_dpm_singlestep(denoise, noise, self.levels)

    def behavior_loss(self, batch: Batch) -> Tensor:
        """E || epsilon(a_t | s, t) - epsilon ||^2, a sum over the action's dimensions (AEPO, Eq. 7)."""
        time, noisy_actions, noise = self.noised(batch.actions)
        loss: Tensor = (self.behavior(noisy_actions, time, batch.observations) - noise).square().sum(-1).mean()
        return loss

    # ---------------------------------------------------------------- support actions

    @torch.no_grad()
    def make_support(self) -> Support:
        """Sample the behavior actions that training needs at all transitions of the dataset.

        A function of the run's seed and of the behavior model, which is final: a resumed run makes the same again.
        """
        tables = (self.dataset_observations, self.dataset_next_observations)
        streams, titles = (SUPPORT_STREAM, NEXT_SUPPORT_STREAM), ("support actions", "next support actions")
        made: list[Tensor | None] = []
        for needed, table, stream, title in zip(self.supports, tables, streams, titles, strict=True):
            if not needed:
                made.append(None)
                continue
            assert table is not None, "support actions need the observations of a dataset"
            generator = torch.Generator(self.device).manual_seed(self.seed + stream)
            sample = partial(self.sample_behavior, count=self.support_actions, generator=generator)
            made.append(self.in_pieces(sample, table, SAMPLED_AT_ONCE // self.support_actions, title))
        return Support(*made)

    def support_of(self, batch: Batch) -> Support:
        """Return behavior actions at the transitions of `batch`.

        Without observations, on 2-D sets, all data actions are actions at the same state: a transition's are its own
        and those of the transitions after it in the batch.
        """
        if not self.conditional:
            actions = self.whole(batch.actions)
            order = torch.arange(len(actions), device=actions.device)
            nearby = actions[(self.own(order)[:, None] + order[: self.support_actions]) % len(actions)]
            return Support(*(nearby if needed else None for needed in self.supports))
        assert batch.rows is not None
        if self.support is None:
            self.support = self.make_support()
        return Support(*(None if each is None else each[batch.rows] for each in self.support))

    # ---------------------------------------------------------------- the critic

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Return the loss of the Q networks, by the variant that `critic` names, and what to log.

            implicit      r + discount V(s'), V the expectile of Q                          (IQL; AEPO, Eq. 27)
            in_support    r + discount sum_k p_k Q'(s', a'_k), p = softmax_k beta Q'(s', a'_k)  (QGPO)
            conservative  the same, plus a multiple of log sum_j exp Q(s, a_j) - Q(s, a)    (CQL, Eq. 4)

        Each is a mean over both Q networks, and Q' is the smaller target Q. The a_j are support actions, as many
        uniform ones, and the data action.
        """
        if self.critic_kind == "implicit":
            return critic_loss(self.critic["q"], self.critic["v"], self.target_q, batch, self.expectile, self.discount)
        support = self.support_of(batch)
        assert support.next_actions is not None
        with torch.no_grad():
            next_q = self.best_q(batch.next_observations[:, None], support.next_actions)
            goal = bootstrapped(batch, in_support_value(next_q, self.backup_beta), self.discount)
        q = self.critic["q"](batch.observations, batch.actions)
        loss = (q - goal).square().mean()
        info = {"q_loss": loss.detach(), "q_mean": q.detach().mean()}
        if self.critic_kind == "conservative":
            assert support.actions is not None
            uniform = self.action_limit * (2 * self.uniform(*support.actions.shape) - 1)
            others = self.critic["q"](batch.observations[:, None], torch.cat([support.actions, uniform], dim=1))
            penalty = conservative_penalty(q, others).mean()
            loss = loss + self.conservatism * penalty
            info["penalty"] = penalty.detach()
        return loss, info

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
        """Train the critic; its target follows by its callback."""
        loss, info = self.critic_loss(self.head(batch, self.critic_batch_size))
        self.minimize("critic", loss)
        return info

    @abstractmethod
    def energy_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Return the loss of f, and what to log."""

    def energy_update(self, batch: Batch) -> Info:
        """Train f."""
        loss, info = self.energy_loss(self.head(batch, self.energy_batch_size))
        self.minimize("energy", loss)
        return {"energy_loss": loss.detach(), **info}

    # ---------------------------------------------------------------- acting

    def scale_of(self, actor: str) -> float:
        """Return the guidance scale of one of `actors()`; 0 for all as long as there is nothing to be guided by."""
        scales = {"policy": self.omega, "behavior": 0.0, **{f"omega_{scale:g}": scale for scale in self.sweep}}
        return scales[actor] if self.gradient_step > self.guided_from else 0.0

    def sample_each(
        self, observations: Tensor, actors: Sequence[str], generators: Mapping[str, torch.Generator | None]
    ) -> Tensor:
        """Sample all actors at once: they are one diffusion with different scales of guidance."""
        noise = observations.new_empty(len(observations), self.action_dim)
        for name in dict.fromkeys(actors):
            rows = [i for i, each in enumerate(actors) if each == name]
            shape, stream = (len(rows), self.action_dim), generators[name]
            noise[rows] = torch.randn(shape, generator=stream, device=noise.device, dtype=noise.dtype)
        scales = torch.tensor([self.scale_of(name) for name in actors], device=noise.device, dtype=noise.dtype)
        return self.guided_sample(observations, noise, scales)

    def sample_as(self, actor: str, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample one of the actors."""
        return self.sample_each(observations, [actor] * len(observations), {actor: generator})

    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample the policy once; the papers select among no candidates."""
        return self.sample_as("policy", observations, generator)

    def actors(self) -> dict[str, Actor]:
        """The policy, the behavior model, and the policies of a sweep over omega."""
        names = ("policy", "behavior", *(f"omega_{scale:g}" for scale in self.sweep))
        return {name: partial(self.sample_as, name) for name in names}

    def figure_maps(self, observations: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """Return beta Q, and f at times of the diffusion where noisy samples of the behavior model fall."""
        maps = {r"$\beta \min Q$": self.beta * self.best_q(observations, actions)}
        if not self.learns_energy or self.gradient_step <= self.guided_from:
            return maps
        generator = torch.Generator(actions.device).manual_seed(0)
        samples = self.sample_behavior(observations[:1], FIGURE_SAMPLES, generator)[0]
        noise = torch.randn(samples.shape, generator=generator, device=actions.device)
        for t in FIGURE_TIMES:
            f = self.energy(actions, torch.full_like(actions[:, 0], t), observations)
            maps[rf"$f$, t = {t:g}"] = f.where(self.among(actions, samples, noise, t), torch.nan)
        return maps
