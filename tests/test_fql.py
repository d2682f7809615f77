"""FQL and IFQL: losses by hand, the oracles of flows and of distillation, one update as the authors' single Adam."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny import batch, nested
from torch import Tensor, nn
from torch.nn import functional as F

from lit_offrl.algorithms import FQL, IFQL
from lit_offrl.algorithms.flow_policy import flow_loss, make_q
from lit_offrl.algorithms.noise import NoiseStream
from lit_offrl.batch import Batch
from lit_offrl.diffusion.flow import sample_euler

SIZES = {"hidden_dim": 16, "critic__hidden_dim": 16}


def make(cls: type[FQL] | type[IFQL] = FQL, observation_dim: int = 3, action_dim: int = 2, **options: object):
    torch.manual_seed(5)
    algorithm = cls(observation_dim, action_dim, **nested({**SIZES, **options}))
    algorithm.configure_optimizers()
    return algorithm


class Linear(nn.Module):
    """Q networks of given offsets and slopes in the action, `[members, action_dim]`."""

    def __init__(self, offsets: list[float], slopes: list[list[float]]) -> None:
        super().__init__()
        self.offsets, self.slopes = torch.tensor(offsets), torch.tensor(slopes)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return (actions @ self.slopes.T + self.offsets).movedim(-1, 0)


def constant(*values: float) -> Linear:
    return Linear([*values], [[0.0, 0.0]] * len(values))


class Table(nn.Module):
    """A policy whose actions are parameters, one for each row of the batch."""

    def __init__(self, actions: Tensor) -> None:
        super().__init__()
        self.actions = nn.Parameter(actions)

    def forward(self, observations: Tensor, noise: Tensor) -> Tensor:
        return self.actions


class MixtureField(nn.Module):
    """The exact field of a mixture of normal distributions of equal weight and deviation, in each dimension."""

    def __init__(self, means: tuple[float, ...], std: float) -> None:
        super().__init__()
        self.means, self.std = torch.tensor(means), std

    def forward(self, x: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        x, t, m = x[..., None], time[..., None, None], self.means
        variance = (1 - t) ** 2 + (t * self.std) ** 2
        responsibility = (-((x - t * m) ** 2) / (2 * variance)).softmax(-1)
        return (responsibility * (m + (t * self.std**2 - (1 - t)) * (x - t * m) / variance)).sum(-1)


# ---------------------------------------------------------------- flows


@pytest.mark.parametrize(("steps", "deviation"), [(1, 0.0), (2, 0.0385), (5, 0.1139), (10, 0.1542), (50, 0.1901)])
def test_euler_keeps_the_mean_and_shrinks_the_deviation(steps: int, deviation: float):
    """The map from noise to samples of a normal distribution is affine: its slope is the samples' deviation."""
    field = MixtureField((0.3,), 0.2)
    ends = sample_euler(lambda x, t: field(x, t, x), torch.tensor([[0.0], [1.0]]), steps)[:, 0]
    assert ends[0].item() == pytest.approx(0.3, abs=1e-5)
    assert (ends[1] - ends[0]).item() == pytest.approx(deviation, abs=1e-4)


@pytest.mark.parametrize("std", [0.2, 1.0])
def test_the_flow_loss_has_a_floor(std: float):
    """The loss of the exact field is pi s / 2, and a field that is off by 0.1 has 0.01 more."""
    rows, stream = 100_000, NoiseStream(0)
    actions = 0.3 + std * torch.randn(rows, 2, generator=torch.Generator().manual_seed(1))
    exact = MixtureField((0.3,), std)
    with stream.recording() as draws:
        loss = flow_loss(exact, actions, actions, stream)[0].item()
    assert [draw.shape for draw in draws] == [(rows, 2), (rows,)]
    # five standard errors: the square of a residual has a deviation below three times its mean
    assert loss == pytest.approx(math.pi * std / 2, rel=5 * 3 / math.sqrt(rows))

    class Off(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return exact(*inputs) + 0.1

    # the same noise: what differs is 0.01 + 0.2 times the mean residual
    error = 5 * 0.2 * math.sqrt(math.pi * std / 2) / math.sqrt(2 * rows)
    assert flow_loss(Off(), actions, actions, NoiseStream(0))[0].item() - loss == pytest.approx(0.01, abs=error)


def test_networks_are_those_of_the_authors():
    q = make_q(3, 2, 16)
    x = torch.randn(7, 5)
    layers = q.members[1]
    expected = x
    for i in range(0, 12, 3):
        hidden = expected @ layers[i].weight.T + layers[i].bias
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        expected = F.layer_norm(hidden, (16,))
    expected = (expected @ layers[12].weight.T + layers[12].bias)[:, 0]
    torch.testing.assert_close(q(x[:, :3], x[:, 3:])[1], expected)
    field = make(hidden_dim=64).behavior.layers
    assert [type(each).__name__ for each in field] == ["Linear", "GELU"] * 4 + ["Linear"]
    for layer in (each for each in field if isinstance(each, nn.Linear)):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


# ---------------------------------------------------------------- FQL


@pytest.mark.parametrize(("aggregation", "goals"), [("mean", (2.5, 1.0)), ("min", (2.0, 1.0))])
def test_critic_loss_by_hand(aggregation: str, goals: tuple[float, float]):
    algorithm = make(aggregation=aggregation, critic__discount=0.5)
    algorithm.critic, algorithm.target_critic = constant(0.0, 1.0), constant(2.0, 4.0)
    rows = batch(2)._replace(rewards=torch.ones(2), terminals=torch.tensor([0.0, 1.0]))
    expected = sum(goal**2 + (goal - 1) ** 2 for goal in goals) / 4
    assert algorithm.critic_loss(rows)[0].item() == pytest.approx(expected)


def test_the_target_has_an_action_of_the_present_policy():
    algorithm = make()
    algorithm.target_critic = Linear([0.0, 0.0], [[1.0, 2.0]] * 2)
    rows = batch()
    noise = torch.randn(12, 2)
    with algorithm.noise.replaying([noise]):
        loss = algorithm.critic_loss(rows)[0]
    actions = algorithm.policy(rows.next_observations, noise).clamp(-1, 1)
    goal = rows.rewards + 0.99 * (1 - rows.terminals) * (actions @ torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(loss, (algorithm.critic(rows.observations, rows.actions) - goal).square().mean())


def test_policy_loss_by_hand():
    """One action inside of the box, and one beyond it: Q sees that one on the border and passes it no gradient."""
    algorithm = make(alpha=3.0)
    algorithm.critic = Linear([0.0, 1.0], [[1.0, 0.0], [3.0, 0.0]])  # the mean is 0.5 + 2 a_1
    algorithm.behavior = MixtureField((0.25,), 1e-4)  # which ends at 0.25
    algorithm.policy = Table(torch.tensor([[0.5, 0.0], [1.5, 0.0]]))
    rows = batch(2)
    loss, info = algorithm.policy_loss(rows)
    distance = ((0.25**2 + 0.25**2) + (1.25**2 + 0.25**2)) / 4
    assert info["distance"].item() == pytest.approx(distance, rel=1e-3)
    assert loss.item() == pytest.approx(3 * distance - (1.5 + 2.5) / 2, rel=1e-3)
    (gradient,) = torch.autograd.grad(loss, [algorithm.policy.actions])
    expected = torch.tensor([[3 * 0.5 / 4 - 1, -3 * 0.5 / 4], [3 * 2.5 / 4, -3 * 0.5 / 4]])
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
    algorithm.normalize_q = True
    assert algorithm.policy_loss(rows)[0].item() == pytest.approx(3 * distance - 1, rel=1e-3)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_the_optimum_of_distillation_for_a_linear_q(dimensions: int):
    """It is a_flow + d g / (2 alpha), since the distance is a mean over the d dimensions; the loss is convex."""
    algorithm = make(action_dim=dimensions, alpha=8.0)
    slopes = torch.linspace(0.5, 1.5, dimensions)
    algorithm.critic = Linear([0.0, 5.0], [(0.5 * slopes).tolist(), (1.5 * slopes).tolist()])
    noise, observations = 0.1 * torch.randn(4, dimensions), torch.zeros(4, 3)
    flow_actions = algorithm.flow_actions(observations, noise).detach()
    algorithm.policy = Table(flow_actions + dimensions * slopes / (2 * 8))
    assert algorithm.policy.actions.abs().max() < 1  # no clamp is active
    rows = batch(4)._replace(observations=observations, actions=noise)
    with algorithm.noise.replaying([noise]):
        loss = algorithm.policy_loss(rows)[0]
    (gradient,) = torch.autograd.grad(loss, [algorithm.policy.actions])
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_a_large_alpha_gives_the_map_of_the_flow():
    """Distilled from the exact field of two modes: not only the law of the actions, also which noise gives which."""
    algorithm = make(action_dim=1, alpha=1e4, hidden_dim=32, learning_rate=3e-3)
    algorithm.behavior = MixtureField((-0.6, 0.6), 0.2)
    algorithm.critic = Linear([0.0, 0.0], [[1.0], [1.0]])
    rows = batch(256)
    rows = rows._replace(actions=rows.actions[:, :1], observations=torch.zeros(256, 3))
    for _ in range(300):
        algorithm.minimize("policy", algorithm.policy_loss(rows)[0])
    noise = torch.randn(2000, 1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        flow = algorithm.flow_actions(torch.zeros(2000, 3), noise)
        policy = algorithm.one_step_actions(torch.zeros(2000, 3), noise)
    assert 0.4 < flow.abs().mean() < 0.8  # two modes
    # a constant has the error 0.6, a network with noise of its own 0.85
    assert (policy - flow).square().mean().sqrt() < 0.08
    assert ((policy > 0) == (flow > 0)).float().mean() > 0.97


def test_an_update_is_a_step_of_one_adam_on_all_losses():
    algorithm = make(alpha=2.0)
    by_hand = copy.deepcopy(algorithm)
    rows = batch()
    losses = by_hand.losses(rows)
    parameters, gradients = [], []
    for name, network in (("critic", by_hand.critic), ("behavior", by_hand.behavior), ("policy", by_hand.policy)):
        parameters += [*network.parameters()]
        gradients += [*torch.autograd.grad(losses[name][0], [*network.parameters()], retain_graph=True)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    torch.optim.Adam(parameters, lr=3e-4).step()
    algorithm.update(rows)
    for (name, one), two in zip(algorithm.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=name)


def test_the_policy_acts_by_one_sample():
    algorithm = make()
    observations = torch.randn(5, 3)
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(3))
    actions = algorithm.act(observations, torch.Generator().manual_seed(3))
    torch.testing.assert_close(actions, algorithm.policy(observations, noise).clamp(-1, 1))


# ---------------------------------------------------------------- IFQL


class Values(nn.Module):
    """V(s) = the first coordinate of s."""

    def forward(self, observations: Tensor) -> Tensor:
        return observations[..., 0]


def test_implicit_losses_by_hand():
    algorithm = make(IFQL, critic__discount=0.5, critic__expectile=0.9)
    algorithm.critic = nn.ModuleDict({"q": constant(1.0, 2.0), "v": Values()})
    algorithm.target_q = constant(3.0, 4.0)
    rows = Batch(
        observations=torch.tensor([[2.0, 0, 0], [5.0, 0, 0]]),  # 1 below and 2 above the smaller target Q
        actions=torch.zeros(2, 2),
        rewards=torch.ones(2),
        next_observations=torch.tensor([[4.0, 0, 0], [6.0, 0, 0]]),
        terminals=torch.tensor([0.0, 1.0]),
    )
    info = algorithm.critic_loss(rows)[1]
    assert info["v_loss"].item() == pytest.approx((0.9 * 1 + 0.1 * 4) / 2)
    assert info["q_loss"].item() == pytest.approx(((3 - 1) ** 2 + (3 - 2) ** 2 + 0 + (1 - 2) ** 2) / 4)


def test_the_candidate_of_the_highest_online_q_is_taken():
    algorithm = make(IFQL, acting__candidates=16)
    observations = torch.randn(6, 3)
    candidates = algorithm.sample(observations, 16, torch.Generator().manual_seed(2))
    algorithm.critic["q"] = Linear([0.0, 5.0], [[1.0, 0.0], [1.0, 0.0]])
    taken = algorithm.act(observations, torch.Generator().manual_seed(2))
    torch.testing.assert_close(taken[:, 0], candidates[..., 0].amax(1))
    algorithm.critic["q"] = constant(1.0, 1.0)  # the choice knows nothing of the candidates: the law of the flow
    taken = algorithm.act(observations, torch.Generator().manual_seed(2))
    torch.testing.assert_close(taken, candidates[:, 0])
