"""Training loops as research code has them, for the ratios of `benchmark.py`: plain PyTorch, eager, default flags.

What each computes is what its algorithm's authors compute, with the same networks, losses and batches as ours. How it
is computed is how a practised reader of the paper would write it: one default Adam per network, `loss.backward()`, the
native Mish, target networks copied tensor by tensor, a minibatch gathered from each tensor of the dataset, states
repeated for their many actions, autograd wherever a gradient is needed, each loss read back at every step. Where the
authors freeze nothing (DTQL), gradients that no one uses are computed; where a framework without implicit gradients
was theirs (BDPO), target networks are frozen. Nothing is slower here than in the loops that it stands for: monitoring
networks, unused layers and unused averages of their code are left out.

`tests/test_benchmark.py` asserts that losses and updated weights are those of ours.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_offrl.algorithms import AEPO, BDPO, DTQL, EDA, QGPO
from lit_offrl.batch import Batch
from lit_offrl.networks.bottleneck import BottleneckNetwork
from lit_offrl.networks.critics import DiffusionValue
from lit_offrl.networks.embeddings import SinusoidalEmbedding, StepEmbedding
from lit_offrl.networks.energy_guidance import EnergyNetwork
from lit_offrl.networks.mlp import Mish, mlp
from lit_offrl.networks.policies import StepDenoisingMLP

Losses = dict[str, float]


class ReferenceLoop(ABC):
    """A training loop on copies of the networks of one of our algorithms.

    Args:
        algorithm: Whose networks and settings these are.
        table: The dataset, tensor by tensor.
        batch_size: Transitions per step.
    """

    def __init__(self, algorithm: Any, table: Batch, batch_size: int) -> None:
        self.options = algorithm
        self.table = table
        self.batch_size = batch_size

    @abstractmethod
    def phases(self) -> dict[str, Callable[[Batch], Losses]]:
        """Return the updates of the phases, by the names that they have in ours."""

    @abstractmethod
    def act(self, observations: Tensor) -> Tensor:
        """Return the policy's actions at `[batch, observation_dim]`."""

    def batch(self) -> Batch:
        """Return a minibatch."""
        rows = torch.randint(len(self.table.rewards), (self.batch_size,), device=self.table.rewards.device)
        fields = (field[rows] for field in self.table[:5])
        return Batch(*fields, rows)

    # Tests put the draws of our algorithms in the place of these.

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.table.rewards.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.table.rewards.device)

    def steps(self, count: int, largest: int) -> Tensor:
        return torch.randint(1, largest + 1, (count,), device=self.table.rewards.device)

    def dropped(self, x: Tensor, share: float) -> Tensor:
        return F.dropout(x, share)


# ---------------------------------------------------------------- what research code repeats


def native(module: nn.Module) -> Any:
    """Return a copy of one of our networks as PyTorch runs it, with its own Mish."""
    duplicate = copy.deepcopy(module).requires_grad_()
    for parent in list(duplicate.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Mish):
                setattr(parent, name, nn.Mish())
    return duplicate


def adam(learning_rate: float, *modules: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam([p for module in modules for p in module.parameters()], lr=learning_rate)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, clip: nn.Module | None = None, norm: float = 1.0) -> float:
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(clip.parameters(), norm)
    optimizer.step()
    return loss.item()


def follow(online: nn.Module, target: nn.Module, rate: float) -> None:
    for p, p_target in zip(online.parameters(), target.parameters(), strict=True):
        p_target.data.copy_(rate * p.data + (1 - rate) * p_target.data)


def expectile(residual: Tensor, tau: float) -> Tensor:
    weight = torch.where(residual > 0, tau, 1 - tau)
    return (weight * residual**2).mean()


class ImplicitQ:
    """IQL as EDA's authors train it: V, then Q, each with an optimizer; V(s') from before the step."""

    def __init__(self, algorithm: Any) -> None:
        self.q, self.v = native(algorithm.critic["q"]), native(algorithm.critic["v"])
        self.target_q = native(algorithm.target_q).requires_grad_(False)
        rate = algorithm.learning_rates["critic"]
        self.q_optimizer, self.v_optimizer = adam(rate, self.q), adam(rate, self.v)
        options = algorithm.critic_options
        self.tau, self.discount, self.rate = options.expectile, options.discount, options.target_rate

    def update(self, batch: Batch) -> Losses:
        with torch.no_grad():
            target_q = self.target_q(batch.observations, batch.actions).min(0).values
            next_v = self.v(batch.next_observations)
        v_loss = descend(self.v_optimizer, expectile(target_q - self.v(batch.observations), self.tau))
        target = batch.rewards + (1 - batch.terminals) * self.discount * next_v
        q1, q2 = self.q(batch.observations, batch.actions)
        q_loss = descend(self.q_optimizer, (F.mse_loss(q1, target) + F.mse_loss(q2, target)) / 2)
        follow(self.q, self.target_q, self.rate)
        return {"v_loss": v_loss, "q_loss": q_loss}


# ---------------------------------------------------------------- DTQL


class DTQLLoop(ReferenceLoop):
    def __init__(self, algorithm: DTQL, table: Batch, batch_size: int) -> None:
        super().__init__(algorithm, table, batch_size)
        self.q, self.v = native(algorithm.critic["q"]), native(algorithm.critic["v"])
        self.target_q = native(algorithm.target_q)
        self.network, self.policy = native(algorithm.behavior.network), native(algorithm.policy)
        rates = algorithm.learning_rates
        self.critic_optimizer = adam(rates["critic"], self.q, self.v)
        self.behavior_optimizer = adam(rates["behavior"], self.network)
        self.policy_optimizer = adam(rates["policy"], self.policy)

    def phases(self) -> dict[str, Callable[[Batch], Losses]]:
        return {"pretraining": self.pretrain, "training": self.train}

    def critic_update(self, batch: Batch) -> Losses:
        with torch.no_grad():
            q1, q2 = self.q(batch.observations, batch.actions)
            next_v = self.v(batch.next_observations)
        v_loss = expectile(torch.min(q1, q2) - self.v(batch.observations), self.options.critic_options.expectile)
        target = batch.rewards + (1 - batch.terminals) * self.options.critic_options.discount * next_v
        q1, q2 = self.q(batch.observations, batch.actions)
        q_loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        descend(self.critic_optimizer, v_loss + q_loss)
        return {"critic_v_loss": v_loss.item(), "critic_q_loss": q_loss.item()}

    def noise_levels(self, count: int) -> Tensor:
        levels = self.options.noise_levels

        def cdf(sigma: float) -> float:
            return 1 / (1 + math.exp(-(math.log(sigma) - levels.location) / levels.scale))

        low, high = cdf(levels.sigma_min), cdf(levels.sigma_max)
        u = low + (high - low) * self.uniform(count).double()
        return (torch.logit(u) * levels.scale + levels.location).exp().float()

    def diffusion_loss(self, actions: Tensor, observations: Tensor) -> Tensor:
        data = self.options.behavior.sigma_data
        sigma = self.noise_levels(len(actions))[:, None]
        noisy = actions + self.normal(*actions.shape) * sigma
        c_skip = data**2 / (sigma**2 + data**2)
        c_out = sigma * data / (sigma**2 + data**2).sqrt()
        c_in = 1 / (sigma**2 + data**2).sqrt()
        raw = self.network(c_in * noisy, sigma.squeeze(1).log() / 4, observations)
        denoised = (c_skip * noisy + c_out * raw).clamp(-1, 1)
        return (((denoised - actions) / c_out) ** 2).mean()

    def behavior_update(self, batch: Batch) -> Losses:
        loss = self.diffusion_loss(batch.actions, batch.observations)
        return {"behavior_loss": descend(self.behavior_optimizer, loss)}

    def policy_update(self, batch: Batch) -> Losses:
        actions = self.policy(batch.observations).sample(self.normal(*batch.actions.shape))
        trust_region = self.diffusion_loss(actions, batch.observations)
        q1, q2 = self.q(batch.observations, actions)
        q = torch.min(q1, q2).mean()
        loss = self.options.alpha * trust_region - q
        if self.options.nll_weight:
            loss = loss - self.options.nll_weight * self.policy(batch.observations).log_density(batch.actions).mean()
        policy_loss = descend(self.policy_optimizer, loss)
        return {"policy_loss": policy_loss, "trust_region_loss": trust_region.item(), "policy_q": q.item()}

    def pretrain(self, batch: Batch) -> Losses:
        return {**self.behavior_update(batch), **self.critic_update(batch)}

    def train(self, batch: Batch) -> Losses:
        losses = {**self.critic_update(batch), **self.behavior_update(batch), **self.policy_update(batch)}
        follow(self.q, self.target_q, self.options.critic_options.target_rate)
        return losses

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        candidates = self.options.acting.candidates
        repeated = observations.repeat_interleave(candidates, 0)
        actions = self.policy(repeated).sample(self.normal(len(repeated), self.table.actions.shape[1]))
        q = self.target_q(repeated, actions).min(0).values.view(-1, candidates)
        chosen = torch.multinomial(q.softmax(-1), 1)[:, 0]
        return actions.view(len(observations), candidates, -1)[torch.arange(len(observations)), chosen]


# ---------------------------------------------------------------- BDPO


class StepFeatures(nn.Module):
    """Features of a diffusion step, computed for every row."""

    def __init__(self, embedding: StepEmbedding) -> None:
        super().__init__()
        self.sinusoids = SinusoidalEmbedding(embedding.sinusoids.shape[1]).to(embedding.sinusoids.device)
        self.layers = native(embedding.layers)

    def forward(self, step: Tensor) -> Tensor:
        features: Tensor = self.layers(self.sinusoids(step.float()))
        return features


class NoisePredictor(nn.Module):
    def __init__(self, network: StepDenoisingMLP) -> None:
        super().__init__()
        self.embedding, self.layers = StepFeatures(network.embedding), native(network.layers)

    def forward(self, noisy_actions: Tensor, step: Tensor, observations: Tensor) -> Tensor:
        epsilon: Tensor = self.layers(torch.cat([noisy_actions, self.embedding(step), observations], -1))
        return epsilon


class ValueEnsemble(nn.Module):
    def __init__(self, network: DiffusionValue) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(StepFeatures(each) for each in network.embeddings)  # type: ignore[arg-type]
        self.members = native(network.members)

    def forward(self, observations: Tensor, noisy_actions: Tensor, step: Tensor) -> Tensor:
        pairs = zip(self.embeddings, self.members, strict=True)
        return torch.stack(
            [member(torch.cat([observations, noisy_actions, embedding(step)], -1)) for embedding, member in pairs]
        ).squeeze(-1)


class BDPOLoop(ReferenceLoop):
    def __init__(self, algorithm: BDPO, table: Batch, batch_size: int) -> None:
        super().__init__(algorithm, table, batch_size)
        self.behavior, self.actor = NoisePredictor(algorithm.behavior), NoisePredictor(algorithm.actor)
        self.q, self.v = native(algorithm.critic["q"]), ValueEnsemble(algorithm.critic["v"])
        target_q, target_v = native(algorithm.target_critic["q"]), ValueEnsemble(algorithm.target_critic["v"])
        self.target_q, self.target_v = target_q.requires_grad_(False), target_v.requires_grad_(False)
        self.target_behavior = NoisePredictor(algorithm.target_behavior).requires_grad_(False)
        self.target_actor = NoisePredictor(algorithm.target_actor).requires_grad_(False)
        rates = algorithm.learning_rates
        self.q_optimizer, self.v_optimizer = adam(rates["critic"], self.q), adam(rates["critic"], self.v)
        self.behavior_optimizer = adam(rates["behavior"], self.behavior)
        self.actor_optimizer = adam(rates["actor"], self.actor)
        self.betas, self.alphas, self.sigmas = (
            getattr(algorithm.schedule, name).clone() for name in ("betas", "alphas", "sigmas")
        )
        self.clean_weight, self.noisy_weight = (
            getattr(algorithm.schedule, f"posterior_{name}").clone() for name in ("clean", "noisy")
        )
        self.main_step = 0

    def phases(self) -> dict[str, Callable[[Batch], Losses]]:
        return {"pretraining": self.pretrain, "training": self.train}

    def kl(self, epsilon: Tensor, behavior_epsilon: Tensor, step: Tensor) -> Tensor:
        beta, sigma = self.betas[step], self.sigmas[step]
        return beta / (2 * (1 - beta) * sigma**2) * ((epsilon - behavior_epsilon) ** 2).sum(-1)

    def mean(self, noisy_actions: Tensor, epsilon: Tensor, step: Tensor) -> Tensor:
        clean = (noisy_actions - self.sigmas[step][:, None] * epsilon) / self.alphas[step][:, None]
        if self.options.clip is not None:
            clean = clean.clamp(-self.options.clip, self.options.clip)
        return self.clean_weight[step][:, None] * clean + self.noisy_weight[step][:, None] * noisy_actions

    def sample(self, actor: nn.Module, behavior: nn.Module | None, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return actions at rows of observations, and the penalty of their paths where there is a behavior model."""
        x = self.normal(len(observations), self.table.actions.shape[1])
        penalty = torch.zeros(len(x), device=x.device)
        for n in range(self.options.schedule.steps, 0, -1):
            step = torch.full((len(x),), n, device=x.device)
            epsilon = actor(x, step, observations)
            if behavior is not None:
                penalty = penalty + self.kl(epsilon, behavior(x, step, observations), step)
            x = self.mean(x, epsilon, step)
            if n > 1:
                x = x + self.betas[n].sqrt() * self.normal(*x.shape)
        return x, penalty

    def lower_bound(self, values: Tensor) -> Tensor:
        return values.mean(0) - self.options.rho * values.std(0, correction=0)

    def noised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        step = self.steps(len(batch.actions), self.options.schedule.steps)
        epsilon = self.normal(*batch.actions.shape)
        return step, self.alphas[step][:, None] * batch.actions + self.sigmas[step][:, None] * epsilon, epsilon

    def continuation(self, actor: nn.Module, observations: Tensor, noisy_actions: Tensor, step: Tensor) -> Tensor:
        samples = self.options.samples
        epsilon = actor(noisy_actions, step, observations)
        mean = self.mean(noisy_actions, epsilon, step)
        std = torch.where(step > 1, self.betas[step].sqrt(), 0)
        below = mean[:, None] + std[:, None, None] * self.normal(len(step), samples, mean.shape[1])
        rows, steps = observations.repeat_interleave(samples, 0), (step - 1).repeat_interleave(samples)
        v = self.target_v(rows, below.flatten(0, 1), steps)
        q = self.target_q(rows, below.flatten(0, 1))
        values = torch.where(steps == 0, q, v).view(len(q), -1, samples).mean(-1)
        with torch.no_grad():
            behavior_epsilon = self.target_behavior(noisy_actions, step, observations)
        return self.lower_bound(values) - self.options.eta * self.kl(epsilon, behavior_epsilon, step)

    def q_update(self, batch: Batch) -> float:
        samples = self.options.samples
        with torch.no_grad():
            rows = batch.next_observations.repeat_interleave(samples, 0)
            actions, penalty = self.sample(self.target_actor, self.target_behavior, rows)
            values = self.target_q(rows, actions).view(-1, len(batch.rewards), samples)
            values = self.lower_bound(values.max(-1).values if self.options.max_backup else values.mean(-1))
            values = values - self.options.eta * penalty.view(-1, samples).mean(-1)
            target = batch.rewards + self.options.critic_options.discount * (1 - batch.terminals) * values
        loss = ((self.q(batch.observations, batch.actions) - target) ** 2).mean()
        return descend(self.q_optimizer, loss, self.q, self.options.clip_norm)

    def v_update(self, batch: Batch) -> float:
        step, noisy_actions, _ = self.noised(batch)
        with torch.no_grad():
            target = self.continuation(self.target_actor, batch.observations, noisy_actions, step)
        loss = ((self.v(batch.observations, noisy_actions, step) - target) ** 2).mean()
        return descend(self.v_optimizer, loss, self.v, self.options.clip_norm)

    def actor_update(self, batch: Batch) -> float:
        step, noisy_actions, _ = self.noised(batch)
        loss = -self.continuation(self.actor, batch.observations, noisy_actions, step).mean()
        return descend(self.actor_optimizer, loss, self.actor, self.options.clip_norm)

    def behavior_update(self, batch: Batch) -> float:
        step, noisy_actions, epsilon = self.noised(batch)
        loss = F.mse_loss(self.behavior(noisy_actions, step, batch.observations), epsilon)
        value = descend(self.behavior_optimizer, loss, self.behavior, self.options.clip_norm)
        follow(self.behavior, self.target_behavior, self.options.critic_options.target_rate)
        return value

    def pretrain(self, batch: Batch) -> Losses:
        return {"behavior_loss": self.behavior_update(batch)}

    def train(self, batch: Batch) -> Losses:
        self.main_step += 1
        losses = {"q_loss": self.q_update(batch), "v_loss": self.v_update(batch)}
        rate = self.options.critic_options.target_rate
        if self.main_step % self.options.actor_every == 0:
            losses |= {"policy_loss": self.actor_update(batch), "behavior_loss": self.behavior_update(batch)}
            follow(self.actor, self.target_actor, rate)
        follow(self.q, self.target_q, rate)
        follow(self.v, self.target_v, rate)
        return losses

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        candidates = self.options.acting.candidates
        rows = observations.repeat_interleave(candidates, 0)
        actions, _ = self.sample(self.target_actor, None, rows)
        q = self.target_q(rows, actions).mean(0).view(-1, candidates)
        return actions.view(*q.shape, -1)[torch.arange(len(q)), q.argmax(-1)]


# ---------------------------------------------------------------- diffusion on the VP-SDE

TIME_END = 1e-3


def marginal(time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return alpha, sigma and lambda at t."""
    log_alpha = -(time**2) * (20 - 0.1) / 4 - time * 0.1 / 2
    sigma = (-torch.expm1(2 * log_alpha)).sqrt()
    return log_alpha.exp(), sigma, log_alpha - sigma.log()


def dpm_solver(
    epsilon: Callable[[Tensor, Tensor], Tensor], x: Tensor, evaluations: int = 15, dtype: torch.dtype | None = None
) -> Tensor:
    """Return what single-step DPM-Solver++ of order 2 makes of noise, in tensors as its published code does."""
    times = torch.linspace(1.0, TIME_END, evaluations + 1, dtype=dtype, device=x.device)

    def clean(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma, _ = marginal(time)
        return (x - sigma * epsilon(x, time.expand(len(x)))) / alpha

    for i in range(0, evaluations - 1, 2):
        s, middle, t = times[i], times[i + 1], times[i + 2]
        (_, sigma_s, lambda_s), (alpha_m, sigma_m, lambda_m), (alpha_t, sigma_t, lambda_t) = map(
            marginal, (s, middle, t)
        )
        h = lambda_t - lambda_s
        r = (lambda_m - lambda_s) / h
        phi_m, phi = torch.expm1(-r * h), torch.expm1(-h)
        first = clean(x, s)
        second = clean(sigma_m / sigma_s * x - alpha_m * phi_m * first, middle)
        x = sigma_t / sigma_s * x - alpha_t * phi * first - 0.5 / r * alpha_t * phi * (second - first)
    if evaluations % 2:
        s, t = times[-2], times[-1]
        (_, sigma_s, lambda_s), (alpha_t, sigma_t, lambda_t) = marginal(s), marginal(t)
        x = sigma_t / sigma_s * x - alpha_t * torch.expm1(lambda_s - lambda_t) * clean(x, s)
    return x


class VPLoop(ReferenceLoop):
    def noised(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return t `[batch]`, a_t of `[batch, ..., action_dim]`, its noise, and sigma_t that broadcasts to it."""
        time = TIME_END + (1 - TIME_END) * self.uniform(len(actions)).to(actions)
        noise = self.normal(*actions.shape)
        alpha, sigma, _ = (each.view(-1, *[1] * (actions.ndim - 1)) for each in marginal(time))
        return time, alpha * actions + sigma * noise, noise, sigma


# ---------------------------------------------------------------- EDA


def plain_value(
    network: BottleneckNetwork,
    actions: Tensor,
    times: Tensor,
    observations: Tensor,
    drop: Callable[[int, Tensor], Tensor] = lambda _, x: x,
) -> Tensor:
    """Return f of rows, `[batch]`, layer by layer; `drop` is applied before each block's normalisation."""
    parts = [network.action(actions), network.time(times)]
    if network.state is not None:
        parts.append(network.state(observations))
    hidden = network.mix(torch.cat(parts, dim=-1))
    for i, block in enumerate(network.blocks):
        hidden = hidden + block.contract(F.silu(block.expand(block.norm(drop(i, hidden)))))
    return network.head(F.silu(hidden)).sum(-1)


def plain_gradient(
    network: BottleneckNetwork,
    actions: Tensor,
    times: Tensor,
    observations: Tensor,
    drop: Callable[[int, Tensor], Tensor] = lambda _, x: x,
    *,
    create_graph: bool = True,
) -> Tensor:
    """Return df/da of rows, `[batch, action_dim]`, by autograd, differentiable unless told otherwise."""
    with torch.enable_grad():
        actions = actions.detach().requires_grad_()
        value = plain_value(network, actions, times, observations, drop)
        return torch.autograd.grad(value.sum(), actions, create_graph=create_graph)[0]


class EDALoop(VPLoop):
    """EDA, with two things of the authors' code to be chosen.

    Args:
        algorithm: See `ReferenceLoop`.
        table: See `ReferenceLoop`.
        batch_size: See `ReferenceLoop`.
        create_graph: Build the graph of the second derivative also when sampling.
        monitored: Train a deterministic policy beside the critic, of which nothing is used but its score.
    """

    MONITOR_TEMPERATURE, MONITOR_LIMIT = 3.0, 100.0

    def __init__(
        self, algorithm: EDA, table: Batch, batch_size: int, create_graph: bool = True, monitored: bool = False
    ) -> None:
        super().__init__(algorithm, table, batch_size)
        self.create_graph, self.monitored = create_graph, monitored
        widths = (table.observations.shape[1], *(algorithm.critic_options.hidden_dim,) * 2, table.actions.shape[1])
        self.monitor = nn.Sequential(*mlp(widths, nn.ReLU), nn.Tanh()).to(table.rewards.device)
        self.monitor_optimizer = adam(algorithm.learning_rates["critic"], self.monitor)
        self.behavior, self.policy = native(algorithm.behavior), native(algorithm.policy)
        self.frozen = native(algorithm.behavior).requires_grad_(False)
        self.critic = ImplicitQ(algorithm)
        self.behavior_optimizer = adam(algorithm.learning_rates["behavior"], self.behavior)
        self.policy_optimizer = adam(algorithm.learning_rates["policy"], self.policy)
        shape = (len(table.rewards), algorithm.candidates_per_state, table.actions.shape[1])
        self.candidates = torch.rand(shape, device=table.rewards.device) * 2 - 1

    def phases(self) -> dict[str, Callable[[Batch], Losses]]:
        return {"behavior": self.behavior_update, "critic": self.critic_update, "alignment": self.align}

    def behavior_update(self, batch: Batch) -> Losses:
        time, noisy_actions, noise, sigma = self.noised(batch.actions)

        def drop(_: int, x: Tensor) -> Tensor:
            return self.dropped(x, self.options.dropout)

        score = plain_gradient(self.behavior, noisy_actions, time, batch.observations, drop)
        loss = ((sigma * score + noise) ** 2).sum(-1).mean()
        return {"behavior_loss": descend(self.behavior_optimizer, loss)}

    def critic_update(self, batch: Batch) -> Losses:
        batch = batch.head(self.options.critic_options.batch_size)
        losses = self.critic.update(batch)
        return {**losses, **self.monitor_update(batch)} if self.monitored else losses

    def monitor_update(self, batch: Batch) -> Losses:
        """Regression weighted by advantage."""
        with torch.no_grad():
            q = self.critic.target_q(batch.observations, batch.actions).min(0).values
            advantage = q - self.critic.v(batch.observations)
            weight = (self.MONITOR_TEMPERATURE * advantage).exp().clamp(max=self.MONITOR_LIMIT)
        error = ((self.monitor(batch.observations) - batch.actions) ** 2).sum(-1)
        return {"monitor_loss": descend(self.monitor_optimizer, (weight * error).mean())}

    def align(self, batch: Batch) -> Losses:
        batch = batch.head(self.options.alignment_batch_size)
        candidates = self.candidates[batch.rows]
        count, k, _ = candidates.shape
        observations = batch.observations.repeat_interleave(k, 0)
        with torch.no_grad():
            q = self.critic.target_q(observations, candidates.flatten(0, 1)).min(0).values.view(count, k)
            targets = (self.options.alpha * q).softmax(-1)
        time, noisy, *_ = self.noised(candidates)
        rows = (noisy.flatten(0, 1), time.repeat_interleave(k), observations)
        with torch.no_grad():
            behavior = plain_value(self.frozen, *rows)
        logits = self.options.beta * (plain_value(self.policy, *rows) - behavior).view(count, k)
        loss = -(targets * logits.log_softmax(-1)).sum(-1).mean()
        return {"alignment_loss": descend(self.policy_optimizer, loss)}

    @torch.no_grad()
    def sample(self, network: BottleneckNetwork, observations: Tensor) -> Tensor:
        def epsilon(x: Tensor, time: Tensor) -> Tensor:
            score = plain_gradient(network, x, time, observations, create_graph=self.create_graph).detach()
            return -marginal(time)[1][:, None] * score

        return dpm_solver(epsilon, self.normal(len(observations), self.table.actions.shape[1]))

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        candidates = self.options.acting.candidates
        rows = observations.repeat_interleave(candidates, 0)
        actions = self.sample(self.policy, rows)
        if candidates == 1:
            return actions
        q = self.critic.target_q(rows, actions).min(0).values.view(-1, candidates)
        return actions.view(*q.shape, -1)[torch.arange(len(q)), q.argmax(-1)]


# ---------------------------------------------------------------- QGPO and AEPO


def plain_energy(network: EnergyNetwork, actions: Tensor, time: Tensor, observations: Tensor) -> Tensor:
    """Return f of rows, `[batch]`."""
    value: Tensor = network.layers(torch.cat([actions, network.time(time), observations], -1)).squeeze(-1)
    return value


class EnergyGuidedLoop(VPLoop):
    def __init__(self, algorithm: AEPO | QGPO, table: Batch, batch_size: int) -> None:
        super().__init__(algorithm, table, batch_size)
        self.behavior, self.energy = native(algorithm.behavior), native(algorithm.energy)
        self.behavior_optimizer = adam(algorithm.learning_rates["behavior"], self.behavior)
        self.energy_optimizer = adam(algorithm.learning_rates["energy"], self.energy)

    def behavior_update(self, batch: Batch) -> Losses:
        time, noisy_actions, noise, _ = self.noised(batch.actions)
        loss = ((self.behavior(noisy_actions, time, batch.observations) - noise) ** 2).sum(-1).mean()
        return {"behavior_loss": descend(self.behavior_optimizer, loss)}

    def rescaled(self, guided: Tensor, epsilon: Tensor) -> Tensor:
        return guided

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        """The behavior model's noise minus omega sigma grad f, the gradient by autograd at every evaluation."""

        def guided(x: Tensor, time: Tensor) -> Tensor:
            epsilon = self.behavior(x, time, observations)
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                gradient = torch.autograd.grad(plain_energy(self.energy, x, time, observations).sum(), x)[0]
            return self.rescaled(
                epsilon - self.options.guidance_scales["policy"] * marginal(time)[1][:, None] * gradient, epsilon
            )

        return dpm_solver(guided, self.normal(len(observations), self.table.actions.shape[1]))


class AEPOLoop(EnergyGuidedLoop):
    def __init__(self, algorithm: AEPO, table: Batch, batch_size: int) -> None:
        super().__init__(algorithm, table, batch_size)
        self.critic = ImplicitQ(algorithm)

    def phases(self) -> dict[str, Callable[[Batch], Losses]]:
        return {"behavior": self.behavior_update, "critic": self.critic_update, "energy": self.energy_update}

    def critic_update(self, batch: Batch) -> Losses:
        return self.critic.update(batch.head(self.options.critic_options.batch_size))

    def rescaled(self, guided: Tensor, epsilon: Tensor) -> Tensor:
        return guided / guided.norm(dim=-1, keepdim=True) * epsilon.norm(dim=-1, keepdim=True)

    def min_q(self, observations: Tensor, actions: Tensor) -> Tensor:
        q: Tensor = self.critic.target_q(observations, actions).min(0).values
        return q

    def energy_update(self, batch: Batch) -> Losses:
        batch = batch.head(self.options.energy_options.batch_size)
        beta, limit = self.options.beta, self.options.units.limit
        time, noisy_actions, _, sigma = self.noised(batch.actions)
        actions = batch.actions.clone().requires_grad_()
        gradient = torch.autograd.grad(self.min_q(batch.observations, actions).sum(), actions)[0]
        with torch.no_grad():
            epsilon = self.behavior(noisy_actions, time, batch.observations)
            mean = ((noisy_actions - sigma * epsilon) / marginal(time)[0][:, None]).clamp(-limit, limit)
            point = batch.actions - self.options.taylor * gradient / gradient.norm(dim=-1, keepdim=True)
            target = beta * self.min_q(batch.observations, point) + beta * (gradient * (mean - point)).sum(-1)
            target = target + beta**2 / 2 * self.options.variance(time) * (gradient**2).sum(-1)
        loss = F.mse_loss(plain_energy(self.energy, noisy_actions, time, batch.observations), target)
        return {"energy_loss": descend(self.energy_optimizer, loss)}


class QGPOLoop(EnergyGuidedLoop):
    """Support actions are made up here: where they come from changes no cost of a step."""

    def __init__(self, algorithm: QGPO, table: Batch, batch_size: int) -> None:
        super().__init__(algorithm, table, batch_size)
        self.q = native(algorithm.critic["q"])
        self.target_q = native(algorithm.target_q).requires_grad_(False)
        self.q_optimizer = adam(algorithm.learning_rates["critic"], self.q)
        shape = (2, len(table.rewards), algorithm.support_actions, table.actions.shape[1])
        self.support, self.next_support = torch.rand(shape, device=table.rewards.device) * 2 - 1

    def phases(self) -> dict[str, Callable[[Batch], Losses]]:
        return {"behavior": self.behavior_update, "critic and energy": self.concurrent, "energy": self.energy_update}

    def min_q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return the smaller target Q of `[batch, K, action_dim]` at `[batch, observation_dim]`, `[batch, K]`."""
        rows = observations.repeat_interleave(actions.shape[1], 0)
        q: Tensor = self.target_q(rows, actions.flatten(0, 1)).min(0).values.view(actions.shape[:2])
        return q

    def critic_update(self, batch: Batch) -> Losses:
        batch = batch.head(self.options.critic_options.batch_size)
        with torch.no_grad():
            next_q = self.min_q(batch.next_observations, self.next_support[batch.rows])
            next_v = ((self.options.critic_options.backup_beta * next_q).softmax(-1) * next_q).sum(-1)
            target = batch.rewards + (1 - batch.terminals) * self.options.critic_options.discount * next_v
        q1, q2 = self.q(batch.observations, batch.actions)
        loss = descend(self.q_optimizer, (F.mse_loss(q1, target) + F.mse_loss(q2, target)) / 2)
        follow(self.q, self.target_q, self.options.critic_options.target_rate)
        return {"q_loss": loss}

    def energy_update(self, batch: Batch) -> Losses:
        batch = batch.head(self.options.energy_options.batch_size)
        actions = self.support[batch.rows]
        count, k, _ = actions.shape
        with torch.no_grad():
            labels = (self.options.beta * self.min_q(batch.observations, actions)).softmax(-1)
        time, noisy, *_ = self.noised(actions)
        rows = (noisy.flatten(0, 1), time.repeat_interleave(k), batch.observations.repeat_interleave(k, 0))
        logits = plain_energy(self.energy, *rows).view(count, k)
        loss = -(labels * logits.log_softmax(-1)).sum(-1).mean()
        return {"energy_loss": descend(self.energy_optimizer, loss)}

    def concurrent(self, batch: Batch) -> Losses:
        return {**self.critic_update(batch), **self.energy_update(batch)}


LOOPS: dict[str, type[ReferenceLoop]] = {
    "AEPO": AEPOLoop,
    "BDPO": BDPOLoop,
    "DTQL": DTQLLoop,
    "EDA": EDALoop,
    "QGPO": QGPOLoop,
}
