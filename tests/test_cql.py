"""CQL's log-sum-exp against quadrature, its losses by hand, its limits, and that it is conservative."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import TINY, batch, moved, nested, shake
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from lit_offrl.algorithms import CQL
from lit_offrl.batch import Batch


def make(action_dim: int = 2, **options: object) -> CQL:
    torch.manual_seed(5)
    algorithm = CQL(3, action_dim, **nested({**TINY["CQL"], **options}))
    algorithm.configure_optimizers()
    return algorithm


def known_q(observations: Tensor, actions: Tensor) -> Tensor:
    """Return the values of two known functions of an observation and an action."""
    first = 3 * torch.cos(4 * actions[..., 0] + observations[..., 0]) - actions[..., -1].square()
    return torch.stack([first, 2 * actions[..., 0] + observations[..., 1]])


def with_known_q(monkeypatch: pytest.MonkeyPatch, algorithm: CQL) -> None:
    for network in (algorithm.critic, algorithm.target_critic):
        monkeypatch.setattr(network, "forward", known_q)


# ---------------------------------------------------------------- the gap


@pytest.mark.parametrize("limit", [1.0, 1.5])
def test_log_sum_exp_estimates_the_log_of_the_integral(monkeypatch: pytest.MonkeyPatch, limit: float):
    """Each of the three distributions gives an estimate of the same integral; the sum has n of each.

    A policy does not reach beyond 1, so that with wider actions its two shares are integrals over [-1, 1] alone.
    """
    count = 20_000
    algorithm, rows = make(1, samples=count), batch(4)
    algorithm.units.limit.fill_(limit)
    with torch.no_grad():  # wide: rare actions of a narrow policy would have all the weight
        algorithm.policy.offset.fill_(0.2)
    with_known_q(monkeypatch, algorithm)
    with torch.no_grad():
        found = algorithm.log_sum_exp(rows._replace(actions=rows.actions[:, :1]))

    def integral(end: float) -> Tensor:
        grid = torch.linspace(-end, end, 20_001, dtype=torch.float64)
        values = known_q(rows.observations.double()[:, None], grid.expand(4, -1)[..., None]).exp()
        return torch.trapezoid(values, grid)

    expected = (count * (integral(limit) + 2 * integral(1.0))).log()
    # The deviation of one weighted action is up to twice its mean: that of the mean over 60,000 is below 0.01.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.03)


def test_gap_by_hand(monkeypatch: pytest.MonkeyPatch):
    algorithm, rows = make(alpha=0.5, samples=3), batch()
    shake(algorithm.policy, scale=0.3)  # the first policy hardly depends on the observation
    with_known_q(monkeypatch, algorithm)
    uniform = torch.rand(12, 3, 2)
    first, present, following = torch.randn(12, 1, 2), torch.randn(12, 3, 2), torch.randn(12, 3, 2)
    with algorithm.noise.replaying([first, uniform, present, following]):
        loss, info = algorithm.critic_loss(rows)

    terms = [known_q(rows.observations[:, None], 2 * uniform - 1) + 2 * math.log(2)]
    for observations, noise in ((rows.observations, present), (rows.next_observations, following)):
        mean, std = (each[:, None] for each in algorithm.policy(observations))
        actions = torch.tanh(mean + std * noise)
        density = TransformedDistribution(Normal(mean, std), [TanhTransform()])
        terms.append(known_q(rows.observations[:, None], actions) - density.log_prob(actions).sum(-1))
    q = known_q(rows.observations, rows.actions)
    gap = torch.cat(terms, -1).logsumexp(-1) - q
    mean, std = algorithm.policy(rows.next_observations)
    next_q = known_q(rows.next_observations, torch.tanh(mean + std * first[:, 0])).amin(0)
    goal = rows.rewards + 0.99 * (1 - rows.terminals) * next_q
    expected = (q - goal).square().mean(1).sum() + 0.5 * gap.mean(1).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(info["gap"], gap.mean(), rtol=1e-4, atol=1e-4)


def test_without_alpha_the_critics_loss_is_that_of_soft_actor_critic():
    """Its gradient, too, which the sampled actions then have no part in."""
    algorithm, rows = make(alpha=0.0), batch()
    state = algorithm.noise.get_state()
    loss, _ = algorithm.critic_loss(rows)
    algorithm.noise.set_state(state)
    with torch.no_grad():
        actions = algorithm.policy(rows.next_observations).sample(algorithm.noise.normal(12, 1, 2)[:, 0])
        next_q = algorithm.target_critic(rows.next_observations, actions).amin(0)
    goal = rows.rewards + 0.99 * (1 - rows.terminals) * next_q
    expected = sum((q - goal).square().mean() for q in algorithm.critic(rows.observations, rows.actions))
    torch.testing.assert_close(loss, expected)
    parameters = [*algorithm.critic.parameters()]
    gradients = [torch.autograd.grad(each, parameters) for each in (loss, expected)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_the_best_of_several_next_actions_backs_up(monkeypatch: pytest.MonkeyPatch):
    algorithm, rows = make(max_target_backup=True, samples=4), batch()
    shake(algorithm.policy, scale=0.3)  # the first policy hardly depends on the observation
    with_known_q(monkeypatch, algorithm)
    state = algorithm.noise.get_state()
    loss, q = algorithm.temporal_difference_loss(rows)
    algorithm.noise.set_state(state)
    noise = algorithm.noise.normal(12, 4, 2)
    best = torch.full((12,), -torch.inf)
    for each in noise.unbind(1):
        actions = algorithm.policy(rows.next_observations).sample(each)
        best = torch.maximum(best, known_q(rows.next_observations, actions).amin(0))
    goal = rows.rewards + 0.99 * (1 - rows.terminals) * best
    torch.testing.assert_close(loss, (q - goal).square().mean(1).sum())


def test_gaps_are_cut_one_by_one():
    algorithm, rows = make(), batch()
    state = algorithm.noise.get_state()
    _, q = algorithm.temporal_difference_loss(rows)
    gap = algorithm.log_sum_exp(rows) - q
    algorithm.noise.set_state(state)
    algorithm.smallest_gap = gap.median().item()
    _, info = algorithm.critic_loss(rows)
    expected = gap.clamp_min(gap.median()).mean()
    assert expected > gap.mean() + 1e-4
    torch.testing.assert_close(info["gap"], expected)


# ---------------------------------------------------------------- multipliers and the policy


def test_a_multiplier_weighs_the_gap_and_grows_above_the_threshold():
    rows = batch()
    for threshold, grows in ((-50.0, True), (50.0, False)):
        algorithm, plain = make(threshold=threshold), make()
        assert algorithm.multiplier().item() == pytest.approx(math.e)
        loss, info = algorithm.critic_loss(rows)
        plain_loss, plain_info = plain.critic_loss(rows)
        assert torch.equal(info["gap"], plain_info["gap"])
        # the gap counts once for each of two networks, with alpha = 10
        torch.testing.assert_close(loss - plain_loss, (math.e - 1) * 10 * 2 * info["gap"])
        torch.testing.assert_close(algorithm.multiplier_loss(info["gap"]), -math.e * 10 * (info["gap"] - threshold))
        algorithm.update(rows)
        assert (algorithm.multiplier().item() > math.e) == grows


def test_policy_loss_by_hand(monkeypatch: pytest.MonkeyPatch):
    algorithm, rows = make(), batch()
    shake(algorithm.policy, scale=0.3)
    with_known_q(monkeypatch, algorithm)
    with torch.no_grad():
        algorithm.log_entropy_weight[0].fill_(math.log(0.3))
    noise = torch.randn(12, 1, 2)
    with algorithm.noise.replaying([noise]):
        loss, info = algorithm.policy_loss(rows)
    mean, std = algorithm.policy(rows.observations)
    actions = torch.tanh(mean + std * noise[:, 0])
    log_density = TransformedDistribution(Normal(mean, std), [TanhTransform()]).log_prob(actions).sum(-1)
    torch.testing.assert_close(loss, (0.3 * log_density - known_q(rows.observations, actions).amin(0)).mean())
    torch.testing.assert_close(info["log_density"], log_density.mean())


def test_the_entropys_weight_grows_where_the_entropy_is_below_its_target():
    algorithm = make()
    weight = algorithm.log_entropy_weight[0]
    for log_density, sign in ((5.0, -1), (1.0, 1)):  # the target is -2: log pi is 2 there
        (gradient,) = torch.autograd.grad(algorithm.entropy_loss(torch.tensor(log_density)), [weight])
        assert gradient.sign().item() == sign


def test_the_first_policy_is_near_the_middle_with_the_deviation_of_its_offset():
    mean, std = make().policy(batch().observations)
    assert mean.abs().max() < 0.05
    torch.testing.assert_close(std, torch.full_like(std, math.exp(-1)), rtol=0.05, atol=0)


def test_critic_layers_is_the_depth_of_both_networks():
    for layers in (3, 5):
        for member in make(critic_layers=layers).critic.members:
            assert [type(each) for each in member].count(nn.Linear) == layers + 1


# ---------------------------------------------------------------- training


def narrow(rows: int, seed: int) -> Batch:
    """Return one-step problems: actions near -0.5, rewards that would be the larger the larger the action."""
    generator = torch.Generator().manual_seed(seed)
    actions = -0.5 + 0.02 * torch.randn(rows, 1, generator=generator)
    observations, next_observations = torch.randn(2, rows, 3, generator=generator)
    return Batch(observations, actions, actions[:, 0], next_observations, torch.ones(rows))


def test_a_conservative_critic_prefers_the_data():
    """E_D Q > E_pi Q for CQL; without its weight the policy finds actions that seem better than the data's.

    The data is narrower than the policy, whose entropy is held at -1: it cannot become a copy of the data.
    """

    def difference(alpha: float) -> float:
        algorithm = make(1, alpha=alpha, learning_rate=1e-2, critic__learning_rate=1e-2)
        for step in range(120):
            algorithm.update(narrow(32, step))
        rows = narrow(512, 999)
        with torch.no_grad():
            own, _ = algorithm.sample_policy(rows.observations, 1)
            data_q, own_q = (algorithm.value_of(rows.observations, each) for each in (rows.actions, own[:, 0]))
        return (data_q - own_q).mean().item()

    assert difference(1.0) > 0.2
    assert difference(0.0) < 0


def test_an_update_moves_all_networks_and_acts_by_the_mean():
    algorithm = make(threshold=1.0)
    names = {"critic", "policy", "log_entropy_weight", "log_multiplier"}
    assert moved(algorithm, lambda: algorithm.update(batch())) == names
    observations = batch().observations
    assert torch.equal(algorithm.sample_actions(observations, None), algorithm.policy(observations).mean.tanh())
