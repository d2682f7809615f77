"""BCQ's losses by hand, its candidates, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import TINY, batch, moved, nested, shake
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lit_offrl.algorithms import BCQ
from lit_offrl.algorithms.bcq import narrowing, soft_minimum


def make(**options: object) -> BCQ:
    torch.manual_seed(5)
    algorithm = BCQ(3, 2, **nested({**TINY["BCQ"], **options}))
    algorithm.configure_optimizers()
    return algorithm


def known_q(observations: Tensor, actions: Tensor) -> Tensor:
    """Return the values of two known functions of an observation and an action."""
    return torch.stack([2 * actions[..., 0] + observations[..., 0], -3 * actions[..., 1] * observations[..., 1]])


def with_known_q(monkeypatch: pytest.MonkeyPatch, algorithm: BCQ) -> None:
    for network in (algorithm.critic, algorithm.target_critic):
        monkeypatch.setattr(network, "forward", known_q)


# ---------------------------------------------------------------- losses


def test_soft_minimum_by_hand():
    q = torch.tensor([[1.0, -2.0], [5.0, -6.0]])
    assert soft_minimum(q, 0.75).tolist() == [2.0, -5.0]
    assert soft_minimum(q, 1.0).tolist() == [1.0, -6.0]
    assert soft_minimum(q, 0.0).tolist() == [5.0, -2.0]


def test_behavior_loss_is_the_error_plus_half_the_divergence():
    algorithm, rows = make(), batch()
    shake(algorithm.behavior, scale=0.3)
    noise = torch.randn(12, 4)
    with algorithm.noise.replaying([noise]):
        loss, _ = algorithm.behavior_loss(rows)
    mean, std = algorithm.behavior.encode(rows.observations, rows.actions)
    actions = algorithm.behavior.decode(rows.observations, mean + std * noise)
    divergence = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(actions, rows.actions) + 0.5 * divergence)


def test_the_best_candidate_backs_up(monkeypatch: pytest.MonkeyPatch):
    algorithm, rows = make(target_candidates=4, phi=0.5), batch()
    with_known_q(monkeypatch, algorithm)
    shake(algorithm.target_perturbation, scale=0.5)
    state = algorithm.noise.get_state()
    loss, _ = algorithm.critic_loss(rows)
    algorithm.noise.set_state(state)
    noise = algorithm.noise.normal(12, 4, 4)
    best = torch.full((12,), -torch.inf)
    for each in noise.unbind(1):
        actions = algorithm.behavior.decode(rows.next_observations, each.clamp(-0.5, 0.5))
        change = algorithm.target_perturbation(torch.cat([rows.next_observations, actions], -1)).tanh()
        q = known_q(rows.next_observations, (actions + 0.5 * change).clamp(-1, 1))
        best = torch.maximum(best, 0.75 * q.amin(0) + 0.25 * q.amax(0))
    goal = rows.rewards + 0.99 * (1 - rows.terminals) * best
    q = known_q(rows.observations, rows.actions)
    torch.testing.assert_close(loss, (q - goal).square().mean(1).sum())


def test_the_perturbation_climbs_the_first_q_alone(monkeypatch: pytest.MonkeyPatch):
    algorithm, rows = make(phi=0.3, learning_rate=1e-2), batch(64)
    with_known_q(monkeypatch, algorithm)
    first = algorithm.perturbation_loss(rows)[0].item()
    for _ in range(60):
        algorithm.minimize("perturbation", algorithm.perturbation_loss(rows)[0])
    with torch.no_grad():
        actions = algorithm.sample_behavior_in_training(rows.observations, 1)
        change = algorithm.perturbed(algorithm.perturbation, rows.observations, actions) - actions
    # Q_1 = 2 a_1 + s_1: the first coordinate grows by phi, which the tanh approaches.
    assert change[..., 0].min() > 0.25
    assert change[..., 0].max() <= 0.3 + 1e-6
    assert first - algorithm.perturbation_loss(rows)[0].item() > 0.4


# ---------------------------------------------------------------- acting


def test_latents_are_clipped():
    algorithm, observations = make(), batch().observations
    far = torch.full((12, 1, 4), 7.0)
    near = torch.full((12, 1, 4), 0.5)
    assert torch.equal(algorithm.decode(observations, far), algorithm.decode(observations, near))
    assert not torch.equal(algorithm.decode(observations, near), algorithm.decode(observations, near / 2))


def test_without_perturbation_one_candidate_is_an_action_of_the_behavior_model():
    algorithm, observations = make(phi=0.0, acting__candidates=1), batch().observations
    policy, behavior = (
        algorithm.act(observations, torch.Generator().manual_seed(3), actor) for actor in ("policy", "behavior")
    )
    assert torch.equal(policy, behavior)
    noise = torch.randn(12, 1, 4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(policy, algorithm.decode(observations, noise)[:, 0].detach())


def test_actions_have_the_law_of_the_behavior_model():
    """A decoder that returns tanh(z): z is normal and clipped, so that a share of 0.309 lies at each end."""
    algorithm = make(phi=0.0, acting__candidates=1)
    algorithm.behavior.decode = lambda observations, latents: torch.tanh(latents[..., :2])
    with torch.no_grad():
        actions = algorithm.sample_actions(torch.zeros(20_000, 3), torch.Generator().manual_seed(0)).atanh()
    tail = 0.5 * math.erfc(0.5 / math.sqrt(2))
    for end in (-0.5, 0.5):
        # 4 standard errors of a share of 40,000 numbers
        assert ((actions - end).abs() < 1e-4).float().mean().item() == pytest.approx(tail, abs=4 * 0.462 / 200)
    inside = actions[(actions.abs() < 0.49)]
    normal = Normal(0.0, 1.0)
    expected = (normal.cdf(torch.tensor(0.2)) - 0.5) / (2 * (normal.cdf(torch.tensor(0.49)) - 0.5))
    assert ((inside > 0) & (inside < 0.2)).float().mean().item() == pytest.approx(expected.item(), abs=0.02)


def test_the_largest_first_q_acts(monkeypatch: pytest.MonkeyPatch):
    algorithm, observations = make(acting__candidates=50), batch().observations
    with_known_q(monkeypatch, algorithm)
    with torch.no_grad():
        chosen = algorithm.sample_actions(observations, torch.Generator().manual_seed(0))
        candidates = algorithm.sample_candidates(observations, 50, torch.Generator().manual_seed(0))
        perturbed = algorithm.perturbed(algorithm.perturbation, observations, candidates)
    assert torch.equal(chosen[:, 0], perturbed[..., 0].amax(1))
    assert (perturbed - candidates).abs().max() <= 0.05 + 1e-6


# ---------------------------------------------------------------- training


def test_the_autoencoder_learns_the_data():
    """Actions of two values that the observation decides."""
    algorithm = make(learning_rate=3e-3)
    for seed in range(150):
        rows = batch(64, seed)
        algorithm.minimize(
            "behavior",
            algorithm.behavior_loss(rows._replace(actions=0.5 * rows.observations[:, :2].sign()))[0],
        )
    observations = batch(256, 999).observations
    clear = observations[:, :2].abs().amin(1) > 0.3
    actions = algorithm.act(observations, torch.Generator().manual_seed(0), "behavior")
    assert (actions[clear] - 0.5 * observations[clear, :2].sign()).abs().mean() < 0.15


def test_widths_are_those_of_the_paper():
    assert narrowing(400) == (400, 300)
    assert narrowing(1) == (1, 1)
    algorithm = BCQ(3, 2)
    assert [each.out_features for each in algorithm.perturbation if isinstance(each, torch.nn.Linear)] == [400, 300, 2]
    assert algorithm.behavior.encoder[-1].out_features == 8  # mean and deviation of 4 latent variables


def test_an_update_moves_three_networks():
    algorithm = make()
    assert moved(algorithm, lambda: algorithm.update(batch())) == {"behavior", "critic", "perturbation"}
