"""DAC: hand-computed losses, the weight of cloning, and its pointwise optimum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ACTION_DIM, OBSERVATION_DIM, batch, drawn, shake

from lit_offrl import DAC
from lit_offrl.algorithms.options import Acting, EnsembleCritic
from lit_offrl.diffusion.denoisers import diffuse


def make(**options: Any) -> DAC:
    torch.manual_seed(0)
    small = {"hidden_dim": 16, "critic": EnsembleCritic(hidden_dim=16, members=3), "samples": 4}
    algorithm = DAC(OBSERVATION_DIM, ACTION_DIM, **{**small, **options})
    shake(algorithm.target_critic)
    shake(algorithm.target_actor)
    algorithm.configure_optimizers()
    algorithm.main_steps = 1000
    return algorithm


@pytest.mark.parametrize("max_backup", [False, True])
def test_the_critics_target_by_hand(max_backup: bool):
    algorithm, rows = make(rho=0.7, max_backup=max_backup), batch()
    (loss, _), (noise,) = drawn(algorithm, lambda: algorithm.critic_loss(rows))
    with torch.no_grad():
        actions = algorithm.sample(algorithm.target_actor, rows.next_observations, noise.movedim(1, 0))
        assert actions.shape == (len(rows.rewards), 4, ACTION_DIM)
        heads = []
        for member in algorithm.target_critic.members:
            states = rows.next_observations[:, None].expand(-1, 4, -1)
            values = member(torch.cat([states, actions], -1))[..., 0]
            heads.append(values.max(-1).values if max_backup else values.mean(-1))
        stacked = torch.stack(heads)
        mean = stacked.mean(0)
        lower = mean - 0.7 * ((stacked - mean) ** 2).mean(0).sqrt()
        goal = rows.rewards + 0.99 * (1 - rows.terminals) * lower
    torch.testing.assert_close(loss, ((algorithm.critic(rows.observations, rows.actions) - goal) ** 2).mean())


def test_the_actors_gradient_is_cloning_plus_the_slope_of_q():
    algorithm, rows = make(eta=0.5), batch()
    (loss, cloning), (shift, noise) = drawn(algorithm, lambda: algorithm.actor_loss(rows))
    count = len(rows.actions)
    step = 1 + (5 * (torch.arange(count) + shift.double()) / count).long()
    alpha, sigma = algorithm.schedule.alpha(step)[:, None], algorithm.schedule.sigma(step)[:, None]
    noisy = diffuse(rows.actions, noise, alpha, sigma).requires_grad_()
    q = algorithm.target_critic(rows.observations, noisy).mean(0)
    (slope,) = torch.autograd.grad(q.sum(), noisy)
    scale = algorithm.target_critic(rows.observations, rows.actions).abs().mean()
    epsilon = algorithm.actor(noisy.detach(), step, rows.observations)
    expected = 0.5 * ((epsilon - noise) ** 2).mean() + (sigma * epsilon * slope).mean() / scale
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(cloning, ((epsilon - noise) ** 2).mean().detach())
    assert all(parameter.grad is None for parameter in algorithm.target_critic.parameters())
    # Where the loss of one prediction is stationary: epsilon* - sigma slope / (2 eta scale).
    best = (noise - sigma * slope / (2 * 0.5 * scale)).detach().requires_grad_()
    stationary = 0.5 * (best - noise) ** 2 + sigma * best * slope / scale
    (gradient,) = torch.autograd.grad(stationary.sum(), best)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


def test_eta_holds_the_cloning_loss_near_the_threshold():
    algorithm = make(eta=1.0, eta_rate=0.1, threshold=0.2)
    info = algorithm.update(batch())
    expected = 1.0 + 0.1 * min(max(info["cloning_loss"].item() - 0.2, -1), 1)
    assert algorithm.eta.item() == pytest.approx(expected)
    assert info["eta"].item() == pytest.approx(expected)
    above = make(eta=1.0, eta_rate=100.0, threshold=1e6)
    above.update(batch())
    assert above.eta.item() == pytest.approx(1e-3)  # its smallest
    constant = make(eta=0.1, eta_rate=0.0)
    constant.update(batch())
    assert constant.eta.item() == pytest.approx(0.1)


def test_it_acts_by_the_best_candidate():
    algorithm = make(acting=Acting(candidates=6))
    observations = torch.randn(5, OBSERVATION_DIM)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(5, 5, 6, ACTION_DIM, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        candidates = algorithm.sample(algorithm.actor, observations, noise)
        q = algorithm.target_critic(observations[:, None], candidates).mean(0)
        expected = candidates[torch.arange(5), q.argmax(1)]
        torch.testing.assert_close(algorithm.sample_actions(observations, generator), expected)
