"""SfBC: planned returns by hand, rounds of planning, and what resampling does to the behavior's law."""

from __future__ import annotations

import pytest
import torch
from energy_oracles import ExactNoise, tensor
from mixtures import GaussianMixture
from tiny import ACTION_DIM, OBSERVATION_DIM, STATES, batch, moved, nested, shake
from torch import Tensor, nn

from lit_offrl.algorithms import SfBC
from lit_offrl.algorithms.sfbc import planned_returns
from lit_offrl.errors import UserError

REWARDS = torch.tensor([1.0, 0.0, 2.0, -1.0, 3.0])
ENDS = torch.tensor([False, False, True, False, True])  # two episodes, of three and two steps


def make(**options: object) -> SfBC:
    """Return a small algorithm whose behavior model is final, on a dataset of 20 transitions."""
    torch.manual_seed(5)
    sizes = {"diffusion__hidden_dim": 16, "critic__hidden_dims": (16, 16), "pretrain_steps": 0, "critic__steps": 0}
    algorithm = SfBC(OBSERVATION_DIM, ACTION_DIM, **nested({**sizes, **options}))
    algorithm.configure_optimizers()
    algorithm.dataset_observations = torch.randn(STATES, OBSERVATION_DIM)
    algorithm.dataset_rewards = torch.randn(STATES)
    algorithm.dataset_episode_ends = torch.arange(STATES) % 5 == 4
    return algorithm


def enter(algorithm: SfBC, number: int) -> Tensor:
    """Begin a round; return its planned returns."""
    phase = algorithm.phases()[number]
    phase.begin()
    phase.prepare(batch())
    return algorithm.critic.restore(algorithm.returns)


class GivenQ(nn.Module):
    """Q = slope a_1 in the place of the critic."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.slope * actions[..., 0]


# ---------------------------------------------------------------- planned returns


def test_monte_carlo_returns_by_hand():
    returns = planned_returns(REWARDS, ENDS, None, discount=0.5)
    assert returns.tolist() == [1 + 0.5 * 1, 0.5 * 2, 2, -1 + 0.5 * 3, 3]


def test_planned_returns_by_hand():
    values = torch.tensor([0.0, 4.0, 1.0, 0.4, 3.5])
    # from the end: 3.5 by V, -1 + 0.5 * 3.5 = 0.75; 2, 4 by V, and 1 + 0.5 * 4, which V at the next state raised
    assert planned_returns(REWARDS, ENDS, values, discount=0.5).tolist() == [3, 4, 2, 0.75, 3.5]


def test_nothing_counts_after_a_terminal_step_of_an_episode_that_goes_on():
    algorithm = make()
    place = torch.arange(STATES) % 5
    algorithm.dataset_terminals = (place == 2).float()
    returns = enter(algorithm, 1)
    assert algorithm.dataset_rewards is not None
    torch.testing.assert_close(
        returns, planned_returns(algorithm.dataset_rewards, (place == 2) | (place == 4), None, 0.99)
    )


def test_returns_are_standardized_over_the_dataset_with_a_smallest_deviation():
    algorithm = make()
    returns = enter(algorithm, 1)
    expected = planned_returns(algorithm.dataset_rewards, algorithm.dataset_episode_ends, None, 0.99)
    torch.testing.assert_close(returns, expected)
    assert algorithm.returns.mean().item() == pytest.approx(0, abs=1e-6)
    assert algorithm.returns.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    algorithm.dataset_rewards = 1e-3 * algorithm.dataset_rewards
    enter(algorithm, 1)
    assert algorithm.critic.std.item() == pytest.approx(0.1)


def test_values_are_softmax_means_over_behavior_actions_by_the_critic_of_the_round_before():
    algorithm = make(critic__alpha=2.0, critic__behavior_actions=3)
    enter(algorithm, 1)
    shake(algorithm.critic)
    mean, std = algorithm.critic.mean.clone(), algorithm.critic.std.clone()
    critic = [parameter.clone() for parameter in algorithm.critic.parameters()]
    returns = enter(algorithm, 2)
    assert all(torch.equal(a, b) for a, b in zip(critic, algorithm.planning_critic.parameters(), strict=True))
    seen: list[Tensor] = []
    handle = algorithm.planning_critic.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    values = algorithm.state_values()
    handle.remove()
    (actions,) = seen
    for i, state in enumerate(algorithm.dataset_observations):
        q = algorithm.planning_critic(state.expand(3, -1), actions[i])
        v = mean + std * ((2 * q).softmax(0) * q).sum()
        assert values[i].item() == pytest.approx(v.item(), rel=1e-4, abs=1e-5)
    expected = planned_returns(algorithm.dataset_rewards, algorithm.dataset_episode_ends, values, 0.99)
    torch.testing.assert_close(returns, expected)


def test_planned_returns_grow_with_the_values():
    """Larger V make larger returns, so returns do not fall from round to round where V does not."""
    algorithm = make()
    rewards, ends = algorithm.dataset_rewards, algorithm.dataset_episode_ends
    returns, values = planned_returns(rewards, ends, None, 0.99), torch.full((STATES,), -torch.inf)
    for seed in range(3):
        surprise = torch.rand(STATES, generator=torch.Generator().manual_seed(seed)) - 0.5
        values = torch.maximum(values, returns + surprise)
        planned = planned_returns(rewards, ends, values, 0.99)
        assert (planned >= returns).all()
        assert (planned > returns).any()
        assert (planned >= values).all()
        returns = planned


def test_each_round_plans_upon_monte_carlo_returns_and_starts_the_critic_again():
    algorithm = make(critic__rounds=3)
    monte_carlo, first = enter(algorithm, 1), [p.clone() for p in algorithm.critic.parameters()]
    for number in (2, 3):
        for seed in range(3):
            algorithm.update(batch(seed=seed))
        adam = algorithm.optimizer_set.adams["critic"]
        assert float(adam.state[adam.parameters[0]]["step"]) == 3
        returns = enter(algorithm, number)
        assert all(torch.equal(a, b) for a, b in zip(first, algorithm.critic.parameters(), strict=True))
        assert not any(each.any() for state in adam.state.values() for each in state.values())
        assert (returns >= monte_carlo - 1e-5).all()  # float32: to standardized returns and back
        assert (returns > monte_carlo + 1e-3).any()
        torch.testing.assert_close(algorithm.critic.mean, returns.mean())


def test_a_resumed_run_plans_the_same_returns():
    algorithm, resumed = make(), make()
    enter(algorithm, 1)
    algorithm.update(batch())
    enter(algorithm, 2)
    algorithm.update(batch())
    resumed.load_state_dict(algorithm.state_dict())
    resumed.prepare_returns(2, batch())  # without the beginning of the round
    assert torch.equal(resumed.returns, algorithm.returns)
    assert torch.equal(resumed.critic.std, algorithm.critic.std)


# ---------------------------------------------------------------- losses and phases


def test_losses_by_hand():
    algorithm, rows = make(), batch()
    enter(algorithm, 1)
    q = algorithm.critic.layers(torch.cat([rows.observations, rows.actions], 1))[:, 0]
    expected = ((q - algorithm.returns[rows.rows]) ** 2).mean()
    torch.testing.assert_close(algorithm.critic_loss(rows)[0], expected)
    before = algorithm.noise.get_state()
    loss, _ = algorithm.behavior_loss(rows)
    algorithm.noise.set_state(before)
    time, noisy, noise = algorithm.process.noised(rows.actions, algorithm.noise)
    torch.testing.assert_close(loss, ((algorithm.behavior(noisy, time, rows.observations) - noise) ** 2).sum() / 12)


def test_phases_are_the_behavior_model_and_the_rounds():
    algorithm = make(pretrain_steps=4, critic__steps=3, critic__rounds=3)
    names = [(phase.name, phase.steps) for phase in algorithm.phases()]
    assert names == [("behavior", 4), ("round 1", 3), ("round 2", 3), ("round 3", 3)]
    assert algorithm.main_start == 10
    behavior, first, *_ = algorithm.phases()
    assert moved(algorithm, lambda: behavior.update(batch())) == {"behavior"}
    first.prepare(batch())
    assert moved(algorithm, lambda: first.update(batch())) == {"critic"}


def test_no_more_actions_are_drawn_than_there_are():
    with pytest.raises(UserError, match=r"acting\.average_of: must be at most acting.candidates, 3"):
        make(acting__candidates=3, acting__average_of=4)


# ---------------------------------------------------------------- acting


def on_a_gaussian(slope: float, **options: object) -> SfBC:
    algorithm = make(diffusion__conditional=False, **{f"acting__{name}": value for name, value in options.items()})
    algorithm.behavior = ExactNoise(GaussianMixture.isotropic(tensor([[0.2, -0.3]]), 0.3))
    algorithm.critic = GivenQ(slope)
    return algorithm


def test_constant_q_reproduces_the_behavior_law():
    algorithm = on_a_gaussian(0.0, candidates=8, average_of=1)
    observations = torch.zeros(4000, OBSERVATION_DIM)
    policy, behavior = (
        algorithm.actors()[name](observations, torch.Generator().manual_seed(0)) for name in ("policy", "behavior")
    )
    # Standard errors of a mean and a deviation: 0.3 / sqrt(4,000) = 0.0047 and 0.0034; five of a difference.
    assert (policy.mean(0) - behavior.mean(0)).abs().max() < 5 * 0.0047 * 2**0.5
    assert (policy.std(0) - behavior.std(0)).abs().max() < 5 * 0.0034 * 2**0.5


def test_resampling_tilts_a_gaussian_by_alpha_q():
    """N(m, s^2) times exp(alpha g a) is N(m + alpha g s^2, s^2); 64 candidates come near to it."""
    observations = torch.zeros(4000, OBSERVATION_DIM)
    algorithm = on_a_gaussian(1.0, candidates=64, alpha=2.0, average_of=1)
    behavior = algorithm.sample_behavior(observations, torch.Generator().manual_seed(1))
    policy = algorithm.sample_actions(observations, torch.Generator().manual_seed(0))
    shift = (policy.mean(0) - behavior.mean(0)).tolist()
    variance = behavior[:, 0].var().item()  # of the samples: the solver has a bias
    assert shift == pytest.approx([2 * variance, 0], abs=0.035)  # errors of 0.007, and 64 candidates only


def test_the_best_are_averaged_without_replacement_even_where_one_leads_by_far():
    algorithm = make(acting__candidates=4, acting__average_of=2, acting__alpha=100.0)
    actions = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]]).expand(50, 4, 2)
    # Logits 0, 300, 50 and -50. The largest is capped at 90; the two largest are drawn, each of them once.
    q = torch.tensor([[0.0, 3.0, 0.5, -0.5]]).expand(50, 4)
    mean = algorithm.resample(actions, q, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean, torch.tensor([[0.5, 0.5]]).expand(50, 2))


def test_draws_follow_the_softmax_of_alpha_q():
    algorithm = make(acting__candidates=3, acting__average_of=1, acting__alpha=2.0)
    actions = torch.eye(3)[None, :, :2].expand(4000, 3, 2)  # the third is (0, 0)
    q = torch.tensor([[0.0, 0.5, -0.5]]).expand(4000, 3)
    drawn = algorithm.resample(actions, q, torch.Generator().manual_seed(0)).mean(0)
    # Four standard errors of 0.008.
    assert drawn.tolist() == pytest.approx((2 * q[0]).softmax(0)[:2].tolist(), abs=0.032)
