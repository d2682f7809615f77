"""AWAC's losses by hand, and its limit, which is behavior cloning."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import TINY, batch, moved, nested, shake
from torch import Tensor
from torch.distributions import Normal

from lit_offrl.algorithms import AWAC, BC


def make(**options: object) -> AWAC:
    torch.manual_seed(5)
    algorithm = AWAC(3, 2, **nested({**TINY["AWAC"], **options}))
    algorithm.configure_optimizers()
    return algorithm


def first_coordinate(*factors: float):
    """Q networks that return a multiple of the first coordinate of the action."""
    return lambda observations, actions: torch.stack([factor * actions[..., 0] for factor in factors])


def with_critics(monkeypatch: pytest.MonkeyPatch, algorithm: AWAC, **factors: tuple[float, float]) -> None:
    for name, each in factors.items():
        monkeypatch.setattr(getattr(algorithm, name), "forward", first_coordinate(*each))


def test_q_bootstraps_from_the_smaller_target_of_a_clamped_policy_action(monkeypatch: pytest.MonkeyPatch):
    algorithm, rows = make(critic__discount=0.9), batch()
    with_critics(monkeypatch, algorithm, target_critic=(1.0, 3.0), critic=(0.0, 2.0))
    noise = 2 * torch.randn(12, 1, 2)  # wide, so that some actions leave the box
    with algorithm.noise.replaying([noise]):
        loss, _ = algorithm.critic_loss(rows)
    mean = algorithm.policy(rows.next_observations).mean  # the deviation starts at 1
    first = (mean + noise[:, 0])[:, 0]
    assert first.abs().max() > 1
    first = first.clamp(-1, 1)
    goal = rows.rewards + 0.9 * (1 - rows.terminals) * torch.minimum(first, 3 * first)
    expected = goal.square().mean() + (goal - 2 * rows.actions[:, 0]).square().mean()
    torch.testing.assert_close(loss, expected)


def test_weights_by_hand(monkeypatch: pytest.MonkeyPatch):
    """Q = 2 a_1 of the worse network for positive a_1: a row's advantage is the difference of two first coordinates."""
    algorithm, rows = make(temperature=0.25), batch()
    with_critics(monkeypatch, algorithm, critic=(2.0, 3.0))
    noise = torch.randn(12, 1, 2)
    with algorithm.noise.replaying([noise]):
        loss, info = algorithm.policy_loss(rows)
    distribution = algorithm.policy(rows.observations)
    own = (distribution.mean + noise[:, 0]).clamp(-1, 1)[:, 0].tolist()
    weights = []
    for data, policy in zip(rows.actions[:, 0].tolist(), own, strict=True):
        advantage = min(2 * data, 3 * data) - min(2 * policy, 3 * policy)
        weights.append(min(math.exp(advantage / 0.25), 100.0))
    assert max(weights) == 100 > min(weights)
    log_density = Normal(*distribution).log_prob(rows.actions).sum(-1)
    torch.testing.assert_close(loss, -(torch.tensor(weights) * log_density).mean())
    assert info["weight_mean"].item() == pytest.approx(sum(weights) / 12, rel=1e-5)


def test_a_large_lambda_clones_the_behavior():
    """Behavior cloning and AWAC from the same weights remain the same, though the critic is another one."""
    algorithm, clone = make(temperature=1e9), BC(3, 2, policy="gaussian", hidden_dim=16)
    clone.policy = make().policy
    clone.configure_optimizers()
    shake(algorithm.critic)
    before = [parameter.clone() for parameter in clone.policy.parameters()]
    for seed in range(5):
        algorithm.update(batch(seed=seed))
        clone.update(batch(seed=seed))
    for one, two, old in zip(algorithm.policy.parameters(), clone.policy.parameters(), before, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
        assert not torch.equal(two, old)


def test_training_follows_q_away_from_the_clone(monkeypatch: pytest.MonkeyPatch):
    def trained(temperature: float) -> Tensor:
        algorithm = make(temperature=temperature, learning_rate=1e-2)
        with_critics(monkeypatch, algorithm, critic=(1.0, 1.0))
        for seed in range(60):
            loss, _ = algorithm.policy_loss(batch(64, seed))
            algorithm.minimize("policy", loss)
        with torch.no_grad():
            return algorithm.sample_actions(batch(256).observations, None).mean(0)

    clone, policy = trained(1e9), trained(0.2)
    # Actions are uniform: the clone's mean is 0. Weights exp(a_1 / 0.2) have the mean coth(5) - 1/5 = 0.80.
    assert clone.abs().max() < 0.15
    assert policy[0] > 0.5
    assert abs(policy[1]) < 0.3


def test_an_update_moves_the_critic_and_the_policy_and_acts_by_the_mean():
    algorithm = make()
    assert moved(algorithm, lambda: algorithm.update(batch())) == {"critic", "policy"}
    observations = batch().observations
    assert torch.equal(algorithm.sample_actions(observations, None), algorithm.policy(observations).mean)
