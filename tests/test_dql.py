"""Diffusion-QL: the gradient through the chain, the losses by hand, how it acts."""

from __future__ import annotations

import pytest
import torch
from tiny import batch, double, nested, shake
from torch import Tensor, nn

from lit_offrl.algorithms import DQL
from lit_offrl.algorithms.base import select


def make(**options: object) -> DQL:
    torch.manual_seed(5)
    return DQL(3, 2, **nested({"hidden_dim": 16, "critic__hidden_dim": 16, **options}))


class Heads(nn.Module):
    """Q_1 = a_1 and Q_2 = 1 - a_1, in which a_1 is the first coordinate of the action."""

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return torch.stack([actions[..., 0], 1 - actions[..., 0]])


def gradient(loss: Tensor, module: nn.Module) -> Tensor:
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, [*module.parameters()])])


@pytest.mark.parametrize("clip", [1.0, 100.0])  # the estimates of half of the steps are clipped, and of none
def test_gradient_through_the_chain_is_that_of_finite_differences(clip: float):
    algorithm = make(clip=clip).double()
    rows, noise = double(batch()), torch.randn(12, 5, 1, 2, dtype=torch.float64)

    def value() -> Tensor:
        return algorithm.critic(rows.observations, algorithm.denoise(algorithm.actor, rows.observations, noise)[:, 0])

    parameters = [*algorithm.actor.parameters()]
    flat = gradient(value().mean(), algorithm.actor)
    directions = torch.randn(5, len(flat), dtype=torch.float64)
    start = nn.utils.parameters_to_vector(parameters).detach()
    for direction in directions:
        sides = []
        for step in (1e-6, -1e-6):
            nn.utils.vector_to_parameters(start + step * direction, parameters)
            sides.append(value().mean().item())
        expected = (sides[0] - sides[1]) / 2e-6
        assert (flat @ direction).item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert flat.abs().max() > 1e-4, "the test would see nothing"


def test_an_action_on_the_border_of_the_box_passes_no_gradient():
    algorithm = make(clip=1e-4)  # every estimate is outside
    rows = batch()
    actions = algorithm.sample(algorithm.actor, rows.observations, 1)
    assert torch.equal(actions.abs(), torch.full_like(actions, 1e-4))
    assert not gradient(actions.sum(), algorithm.actor).any()


def test_eta_0_leaves_the_gradient_of_behavior_cloning():
    gradients = []
    for eta in (0.0, 1.0):
        algorithm = make(eta=eta)
        with algorithm.noise.independent(3):
            gradients.append(gradient(algorithm.actor_loss(batch())[0], algorithm.actor))
    with algorithm.noise.independent(3):
        cloning = gradient(algorithm.bc_loss(batch()), algorithm.actor)
    torch.testing.assert_close(gradients[0], cloning)
    assert (gradients[1] - cloning).abs().max() > 1e-3


def test_noise_prediction_by_hand():
    algorithm, rows = make(), batch(4)
    epsilon = torch.randn(4, 2)
    with algorithm.noise.replaying([torch.tensor([0.0, 0.21, 0.5, 0.999]), epsilon]):
        loss = algorithm.bc_loss(rows)
    step = torch.tensor([1, 2, 3, 5])
    signal = (1 - algorithm.schedule.betas).cumprod(0)[step][:, None]  # alpha_bar_n
    noisy = signal.sqrt() * rows.actions + (1 - signal).sqrt() * epsilon
    error = algorithm.actor(noisy, step, rows.observations) - epsilon
    torch.testing.assert_close(loss, error.square().sum() / 8)


@pytest.mark.parametrize("max_q_backup", [False, True])
def test_target_of_q_by_hand(max_q_backup: bool, monkeypatch: pytest.MonkeyPatch):
    algorithm = make(max_q_backup=max_q_backup, critic__discount=0.9)
    rows = batch(2)._replace(terminals=torch.tensor([0.0, 1.0]))
    asked = []

    def sample(actor: nn.Module, observations: Tensor, samples: int) -> Tensor:
        asked.append((actor, observations, samples))
        return torch.tensor([[[-0.5, 0.0], [1.0, 0.0]]] * 2)[:, :samples]

    monkeypatch.setattr(algorithm, "sample", sample)
    algorithm.target_critic = Heads()
    loss, _ = algorithm.critic_loss(rows)
    # Q_1 is -0.5 and 1, Q_2 1.5 and 0 at the two actions. The smaller of the maxima is 1, the largest smaller Q only 0.
    goal = rows.rewards + 0.9 * torch.tensor([1.0 if max_q_backup else -0.5, 0.0])
    q = algorithm.critic(rows.observations, rows.actions)
    torch.testing.assert_close(loss, ((q - goal) ** 2).mean(1).sum())
    assert asked == [(algorithm.target_actor, rows.next_observations, 10 if max_q_backup else 1)]


@pytest.mark.parametrize(("draw", "expected"), [(0.9, -0.2 / 0.8), (0.1, -0.8 / 0.3)])
def test_one_critic_is_divided_by_the_scale_of_the_other(draw: float, expected: float):
    algorithm = make()
    algorithm.critic = Heads()
    actions = torch.tensor([[0.5, 0.0], [-0.1, 0.0]], requires_grad=True)  # Q_1: mean 0.2, mean|.| 0.3; Q_2: 0.8, 0.8
    with algorithm.noise.replaying([torch.tensor([draw])]):
        loss = algorithm.q_loss(torch.zeros(2, 3), actions)
    assert loss.item() == pytest.approx(expected)
    (slope,) = torch.autograd.grad(loss, actions)
    of_the_mean = -0.5 / 0.8 if draw > 0.5 else 0.5 / 0.3  # the scale has no part in it
    assert slope[:, 0].tolist() == pytest.approx([of_the_mean] * 2)


def test_acts_by_the_actor_and_the_target_critics():
    algorithm = make(acting__candidates=6, acting__selection_temperature=0.5)
    for module in (algorithm.actor, algorithm.target_critic):
        shake(module, scale=0.3)
    observations = batch().observations
    with torch.no_grad():
        actions = algorithm.sample_actions(observations, torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        candidates = algorithm.denoise(algorithm.actor, observations, torch.randn(12, 5, 6, 2, generator=generator))
        q = torch.stack([algorithm.target_critic(observations, each).amin(0) for each in candidates.unbind(1)], dim=1)
    assert torch.equal(actions, select(candidates, q, 0.5, generator))
    assert actions.abs().max() <= 1


def test_the_target_actor_waits_a_thousand_steps():
    critic, actor = make().targets()
    assert [step for step in range(990, 1012) if actor.moves_at(step)] == [1005, 1010]
    assert critic.moves_at(1)
    assert (actor.rate, critic.rate) == (0.005, 0.005)
