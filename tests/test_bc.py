"""Behavior cloning against what is known of regressions."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import ACTION_DIM, OBSERVATION_DIM, batch

from lit_offrl import BC
from lit_offrl.batch import Batch


def make(**options: object) -> BC:
    torch.manual_seed(0)
    algorithm = BC(OBSERVATION_DIM, ACTION_DIM, **{"hidden_dim": 16, **options})
    algorithm.configure_optimizers()
    return algorithm


def test_the_losses_by_hand():
    rows = batch()
    deterministic, gaussian = make(), make(policy="gaussian")
    error = deterministic.policy(rows.observations).action - rows.actions
    torch.testing.assert_close(deterministic.policy_loss(rows), (error**2).mean())
    with torch.no_grad():
        gaussian.policy.log_std.fill_(math.log(0.5))
    mean = gaussian.policy(rows.observations).mean
    density = torch.distributions.Normal(mean, 0.5).log_prob(rows.actions).sum(-1)
    torch.testing.assert_close(gaussian.policy_loss(rows), -density.mean())


def train(algorithm: BC, noise: float, steps: int = 800) -> Batch:
    """Train on a = 0.8 tanh(s_1) + noise, from which nothing can be learned but the mean."""
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(2048, OBSERVATION_DIM, generator=generator)
    mean = 0.8 * torch.tanh(observations[:, :1]).expand(-1, ACTION_DIM)
    rows = batch()._replace(
        observations=observations, actions=mean + noise * torch.randn(mean.shape, generator=generator)
    )
    for _ in range(steps):
        algorithm.update(rows)
    return rows


def test_the_loss_falls_to_the_variance_of_the_noise_and_the_mean_is_learned():
    algorithm = make(learning_rate=1e-2)
    rows = train(algorithm, noise=0.2)
    assert algorithm.policy_loss(rows).item() == pytest.approx(0.04, rel=0.1)
    learned = algorithm.act(rows.observations)
    assert (learned - 0.8 * torch.tanh(rows.observations[:, :1])).abs().mean() < 0.04


def test_the_gaussian_learns_the_deviation():
    algorithm = make(policy="gaussian", learning_rate=1e-2)
    train(algorithm, noise=0.2)
    torch.testing.assert_close(
        algorithm.policy.log_std.exp().detach(), torch.full((ACTION_DIM,), 0.2), rtol=0.1, atol=0
    )


def test_between_two_modes_it_acts_by_neither():
    algorithm = make(learning_rate=1e-2)
    rows = batch(rows=512)
    sign = torch.where(torch.arange(512) % 2 == 0, 1.0, -1.0)[:, None]
    rows = rows._replace(observations=torch.zeros(512, OBSERVATION_DIM), actions=0.9 * sign.expand(-1, ACTION_DIM))
    for _ in range(200):
        algorithm.update(rows)
    assert algorithm.act(rows.observations[:1]).abs().max() < 0.05
