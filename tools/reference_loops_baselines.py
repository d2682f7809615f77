"""Training loops of IQL, TD3+BC, Diffusion-QL, IDQL and FQL as research code has them, see `reference_loops.py`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from reference_loops import (
    Losses,
    NoisePredictor,
    ReferenceLoop,
    adam,
    descend,
    expectile,
    follow,
    native,
)
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from lit_offrl.algorithms import DQL, FQL, IDQL, IQL, TD3BC
from lit_offrl.batch import Batch
from lit_offrl.networks.policies import ResidualDenoiser


class SingleUpdateLoop(ReferenceLoop):
    """A loop that has one phase."""

    def phases(self) -> dict[str, Callable[[Batch], Losses]]:
        return {"training": self.train}

    def train(self, batch: Batch) -> Losses:
        raise NotImplementedError


def target_of(batch: Batch, next_values: Tensor, discount: float) -> Tensor:
    return batch.rewards + (1 - batch.terminals) * discount * next_values


def best_candidate(actions: Tensor, q: Tensor) -> Tensor:
    """Return the actions of the highest Q, of rows `[batch * candidates]` and of `q` `[batch, candidates]`."""
    return actions.view(*q.shape, -1)[torch.arange(len(q)), q.argmax(-1)]


# ---------------------------------------------------------------- IQL


class ExpectileCritic:
    """V by the target networks, then Q by the new V, each with an optimizer."""

    def __init__(self, algorithm: IQL | IDQL) -> None:
        self.q, self.v = native(algorithm.critic["q"]), native(algorithm.critic["v"])
        self.target_q = native(algorithm.target_q).requires_grad_(False)
        self.options = algorithm.critic_options
        rate = self.options.learning_rate
        self.q_optimizer, self.v_optimizer = adam(rate, self.q), adam(rate, self.v)

    def update_v(self, batch: Batch) -> tuple[float, Tensor]:
        """Return the loss, and the smaller target Q of the batch."""
        with torch.no_grad():
            target_q = self.target_q(batch.observations, batch.actions).min(0).values
        loss = expectile(target_q - self.v(batch.observations), self.options.expectile)
        return descend(self.v_optimizer, loss), target_q

    def update_q(self, batch: Batch) -> float:
        with torch.no_grad():
            target = target_of(batch, self.v(batch.next_observations), self.options.discount)
        q1, q2 = self.q(batch.observations, batch.actions)
        loss = descend(self.q_optimizer, (F.mse_loss(q1, target) + F.mse_loss(q2, target)) / 2)
        follow(self.q, self.target_q, self.options.target_rate)
        return loss


class IQLLoop(SingleUpdateLoop):
    LARGEST_WEIGHT = 100.0

    def __init__(self, algorithm: IQL, table: Batch, batch_size: int) -> None:
        super().__init__(algorithm, table, batch_size)
        self.critic, self.policy = ExpectileCritic(algorithm), native(algorithm.policy)
        self.policy_optimizer = adam(algorithm.learning_rate, self.policy)

    def mean(self, observations: Tensor, share: float) -> Tensor:
        """Return the mean of the policy, with a share of the hidden values dropped."""
        x = observations
        for layer in self.policy.layers:
            x = layer(x)
            if share and isinstance(layer, nn.ReLU):
                x = self.dropped(x, share)
        return torch.tanh(x)

    def train(self, batch: Batch) -> Losses:
        v_loss, target_q = self.critic.update_v(batch)
        with torch.no_grad():
            advantage = target_q - self.critic.v(batch.observations)
            weight = (self.options.beta * advantage).exp().clamp(max=self.LARGEST_WEIGHT)
        std = self.policy.log_std.clamp(*self.policy.log_std_range).exp()
        distribution = Normal(self.mean(batch.observations, self.options.dropout), std)
        log_density: Tensor = distribution.log_prob(batch.actions).sum(-1)  # type: ignore[no-untyped-call]
        policy_loss = descend(self.policy_optimizer, -(weight * log_density).mean())
        return {"v_loss": v_loss, "policy_loss": policy_loss, "q_loss": self.critic.update_q(batch)}

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        return self.mean(observations, 0.0)


# ---------------------------------------------------------------- TD3+BC


class TD3BCLoop(SingleUpdateLoop):
    def __init__(self, algorithm: TD3BC, table: Batch, batch_size: int) -> None:
        super().__init__(algorithm, table, batch_size)
        self.critic, self.policy = native(algorithm.critic), native(algorithm.policy.layers)
        self.target_critic, self.target_policy = native(algorithm.target_critic), native(algorithm.target_policy.layers)
        self.critic_optimizer = adam(algorithm.critic_options.learning_rate, self.critic)
        self.policy_optimizer = adam(algorithm.learning_rate, self.policy)
        self.step = 0

    def train(self, batch: Batch) -> Losses:
        self.step += 1
        options, critic_options = self.options, self.options.critic_options
        with torch.no_grad():
            noise = self.normal(*batch.actions.shape) * options.target_noise
            noise = noise.clamp(-options.target_noise_limit, options.target_noise_limit)
            next_actions = (torch.tanh(self.target_policy(batch.next_observations)) + noise).clamp(-1, 1)
            next_q1, next_q2 = self.target_critic(batch.next_observations, next_actions)
            target = target_of(batch, torch.min(next_q1, next_q2), critic_options.discount)
        q1, q2 = self.critic(batch.observations, batch.actions)
        critic_loss = descend(self.critic_optimizer, F.mse_loss(q1, target) + F.mse_loss(q2, target))
        if self.step % options.policy_every:
            return {"critic_loss": critic_loss}
        actions = torch.tanh(self.policy(batch.observations))
        q = self.critic.members[0](torch.cat([batch.observations, actions], 1))
        weight = options.alpha / q.abs().mean().detach()
        policy_loss = descend(self.policy_optimizer, -weight * q.mean() + F.mse_loss(actions, batch.actions))
        follow(self.critic, self.target_critic, critic_options.target_rate)
        follow(self.policy, self.target_policy, critic_options.target_rate)
        return {"critic_loss": critic_loss, "policy_loss": policy_loss}

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        return torch.tanh(self.policy(observations))


# ---------------------------------------------------------------- Diffusion-QL


class DQLLoop(SingleUpdateLoop):
    def __init__(self, algorithm: DQL, table: Batch, batch_size: int) -> None:
        super().__init__(algorithm, table, batch_size)
        self.critic, self.target_critic = native(algorithm.critic), native(algorithm.target_critic)
        self.actor, self.target_actor = NoisePredictor(algorithm.actor), NoisePredictor(algorithm.target_actor)
        self.critic_optimizer = adam(algorithm.critic_options.learning_rate, self.critic)
        self.actor_optimizer = adam(algorithm.learning_rate, self.actor)
        schedule = algorithm.schedule
        self.alphas, self.sigmas = schedule.alphas.clone(), schedule.sigmas.clone()
        self.clean_weight, self.noisy_weight = schedule.posterior_clean.clone(), schedule.posterior_noisy.clone()
        below = torch.cat([self.sigmas[:1], self.sigmas[:-1]])
        self.stds = schedule.betas.sqrt() * below / self.sigmas
        self.step = 0

    def coin(self) -> float:
        return random.random()

    def chain(self, actor: nn.Module, observations: Tensor) -> Tensor:
        """Return actions at rows of observations."""
        x = self.normal(len(observations), self.table.actions.shape[1])
        for n in range(self.options.schedule.steps, 0, -1):
            step = torch.full((len(x),), n, device=x.device)
            clean = (x - self.sigmas[step][:, None] * actor(x, step, observations)) / self.alphas[step][:, None]
            clean = clean.clamp(-self.options.clip, self.options.clip)
            x = self.clean_weight[step][:, None] * clean + self.noisy_weight[step][:, None] * x
            if n > 1:
                x = x + self.stds[step][:, None] * self.normal(*x.shape)
        return x

    def critic_update(self, batch: Batch) -> float:
        samples = self.options.backup_actions
        with torch.no_grad():
            rows = batch.next_observations
            rows = rows if samples == 1 else rows.repeat_interleave(samples, 0)
            next_q1, next_q2 = self.target_critic(rows, self.chain(self.target_actor, rows))
            if samples > 1:
                next_q1, next_q2 = (each.view(-1, samples).max(1).values for each in (next_q1, next_q2))
            target = target_of(batch, torch.min(next_q1, next_q2), self.options.critic_options.discount)
        q1, q2 = self.critic(batch.observations, batch.actions)
        loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        return descend(self.critic_optimizer, loss, self.critic, self.options.clip_norm)

    def actor_update(self, batch: Batch) -> Losses:
        step = self.steps(len(batch.actions), self.options.schedule.steps)
        epsilon = self.normal(*batch.actions.shape)
        noisy_actions = self.alphas[step][:, None] * batch.actions + self.sigmas[step][:, None] * epsilon
        bc_loss = F.mse_loss(self.actor(noisy_actions, step, batch.observations), epsilon)
        q1, q2 = self.critic(batch.observations, self.chain(self.actor, batch.observations))
        one, other = (q1, q2) if self.coin() > 0.5 else (q2, q1)
        q_loss = -one.mean() / other.abs().mean().detach()
        loss = bc_loss + self.options.eta * q_loss
        actor_loss = descend(self.actor_optimizer, loss, self.actor, self.options.clip_norm)
        return {"actor_loss": actor_loss, "bc_loss": bc_loss.item(), "q_loss": q_loss.item()}

    def train(self, batch: Batch) -> Losses:
        self.step += 1
        losses = {"critic_loss": self.critic_update(batch), **self.actor_update(batch)}
        rate, every, after = self.options.ema
        if self.step > after and self.step % every == 0:
            follow(self.actor, self.target_actor, rate)
        follow(self.critic, self.target_critic, self.options.critic_options.target_rate)
        return losses

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        candidates = self.options.acting.candidates
        rows = observations.repeat_interleave(candidates, 0)
        actions = self.chain(self.actor, rows)
        q = self.target_critic(rows, actions).min(0).values.view(-1, candidates)
        chosen = torch.multinomial(q.softmax(-1), 1)[:, 0]
        return actions.view(*q.shape, -1)[torch.arange(len(q)), chosen]


# ---------------------------------------------------------------- IDQL


def plain_epsilon(
    network: ResidualDenoiser,
    noisy_actions: Tensor,
    step: Tensor,
    observations: Tensor,
    drop: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Return the noise of rows, layer by layer; `drop` is applied before each block's normalisation."""
    hidden = network.mix(torch.cat([noisy_actions, observations, network.time(step)], -1))
    blocks: Any = network.blocks
    for block in blocks:
        hidden = hidden + block.contract(F.silu(block.expand(block.norm(drop(hidden)))))
    epsilon: Tensor = network.head(hidden)
    return epsilon


class IDQLLoop(SingleUpdateLoop):
    def __init__(self, algorithm: IDQL, table: Batch, batch_size: int) -> None:
        super().__init__(algorithm, table, batch_size)
        self.critic, self.actor = ExpectileCritic(algorithm), native(algorithm.actor)
        self.target_actor = native(algorithm.target_actor).requires_grad_(False)
        self.actor_optimizer = torch.optim.AdamW(
            self.actor.parameters(), lr=algorithm.learning_rate, weight_decay=algorithm.weight_decay
        )
        self.betas, self.alphas, self.sigmas = (
            getattr(algorithm.schedule, name).clone() for name in ("betas", "alphas", "sigmas")
        )

    def actor_update(self, batch: Batch) -> float:
        step = self.steps(len(batch.actions), self.options.schedule.steps)
        noise = self.normal(*batch.actions.shape)
        noisy_actions = self.alphas[step][:, None] * batch.actions + self.sigmas[step][:, None] * noise

        def drop(x: Tensor) -> Tensor:
            return self.dropped(x, self.options.dropout)

        epsilon = plain_epsilon(self.actor, noisy_actions, step, batch.observations, drop)
        return descend(self.actor_optimizer, ((epsilon - noise) ** 2).sum(-1).mean())

    def train(self, batch: Batch) -> Losses:
        behavior_loss = self.actor_update(batch)
        v_loss, _ = self.critic.update_v(batch)
        q_loss = self.critic.update_q(batch)
        follow(self.actor, self.target_actor, self.options.actor_target_rate)
        return {"behavior_loss": behavior_loss, "v_loss": v_loss, "q_loss": q_loss}

    def chain(self, observations: Tensor) -> Tensor:
        """Return actions at rows of observations."""
        x = self.normal(len(observations), self.table.actions.shape[1])
        for n in range(self.options.schedule.steps, 0, -1):
            epsilon = plain_epsilon(self.target_actor, x, torch.full((len(x),), n, device=x.device), observations)
            x = (x - self.betas[n] / self.sigmas[n] * epsilon) / (1 - self.betas[n]).sqrt()
            if n > 1:
                x = x + self.betas[n].sqrt() * self.normal(*x.shape)
            if self.options.clip is not None:
                x = x.clamp(-self.options.clip, self.options.clip)
        return x

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        candidates = self.options.acting.candidates
        rows = observations.repeat_interleave(candidates, 0)
        actions = self.chain(rows)
        return best_candidate(actions, self.critic.target_q(rows, actions).min(0).values.view(-1, candidates))


# ---------------------------------------------------------------- FQL


class FQLLoop(SingleUpdateLoop):
    def __init__(self, algorithm: FQL, table: Batch, batch_size: int) -> None:
        super().__init__(algorithm, table, batch_size)
        self.critic, self.target_critic = native(algorithm.critic), native(algorithm.target_critic)
        self.flow, self.policy = native(algorithm.behavior.layers), native(algorithm.policy.layers)
        self.critic_optimizer = adam(algorithm.critic_options.learning_rate, self.critic)
        self.flow_optimizer = adam(algorithm.learning_rate, self.flow)
        self.policy_optimizer = adam(algorithm.learning_rate, self.policy)

    def one_step(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return actions of the policy, which are not clamped, and their noise."""
        noise = self.normal(len(observations), self.table.actions.shape[1])
        return self.policy(torch.cat([observations, noise], -1)), noise

    def critic_loss(self, batch: Batch) -> Tensor:
        options = self.options
        with torch.no_grad():
            next_actions = self.one_step(batch.next_observations)[0].clamp(-1, 1)
            next_q = self.target_critic(batch.next_observations, next_actions)
            next_q = next_q.mean(0) if options.aggregation == "mean" else next_q.min(0).values
            target = target_of(batch, next_q, options.critic_options.discount)
        loss: Tensor = ((self.critic(batch.observations, batch.actions) - target) ** 2).mean()
        return loss

    def flow_loss(self, batch: Batch) -> Tensor:
        noise, time = self.normal(*batch.actions.shape), self.uniform(len(batch.actions))[:, None]
        noisy_actions = (1 - time) * noise + time * batch.actions
        velocity = self.flow(torch.cat([batch.observations, noisy_actions, time], -1))
        return F.mse_loss(velocity, batch.actions - noise)

    @torch.no_grad()
    def flow_actions(self, observations: Tensor, noise: Tensor) -> Tensor:
        steps, x = self.options.flow_steps, noise
        for i in range(steps):
            time = torch.full((len(x), 1), i / steps, device=x.device)
            x = x + self.flow(torch.cat([observations, x, time], -1)) / steps
        return x.clamp(-1, 1)

    def policy_loss(self, batch: Batch) -> Tensor:
        actions, noise = self.one_step(batch.observations)
        distance = F.mse_loss(actions, self.flow_actions(batch.observations, noise))
        q = self.critic(batch.observations, actions.clamp(-1, 1)).mean(0)
        weight = 1 / q.abs().mean().detach() if self.options.normalize_q else 1.0
        loss: Tensor = self.options.alpha * distance - weight * q.mean()
        return loss

    def train(self, batch: Batch) -> Losses:
        """All losses from the same weights; the critic's gradient of the policy's loss is forgotten."""
        critic_loss, flow_loss, policy_loss = self.critic_loss(batch), self.flow_loss(batch), self.policy_loss(batch)
        losses = {
            "policy_loss": descend(self.policy_optimizer, policy_loss),
            "flow_loss": descend(self.flow_optimizer, flow_loss),
            "critic_loss": descend(self.critic_optimizer, critic_loss),
        }
        follow(self.critic, self.target_critic, self.options.critic_options.target_rate)
        return losses

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        return self.one_step(observations)[0].clamp(-1, 1)


BASELINE_LOOPS: dict[str, type[ReferenceLoop]] = {
    "DQL": DQLLoop,
    "FQL": FQLLoop,
    "IDQL": IDQLLoop,
    "IQL": IQLLoop,
    "TD3BC": TD3BCLoop,
}
