"""IQL: hand-computed losses, and the limits of its expectile and temperature."""

from __future__ import annotations

import pytest
import torch
from tiny import ACTION_DIM, OBSERVATION_DIM, batch, moved, shake
from torch import Tensor

from lit_offrl import BC, IQL
from lit_offrl.algorithms.critic_losses import advantage_weights
from lit_offrl.algorithms.options import ImplicitQ


def make(expectile: float = 0.7, **options: object) -> IQL:
    torch.manual_seed(0)
    critic = ImplicitQ(hidden_dim=16, expectile=expectile, learning_rate=1e-2)
    algorithm = IQL(OBSERVATION_DIM, ACTION_DIM, **{"hidden_dim": 16, "critic": critic, **options})
    shake(algorithm.target_q)
    algorithm.configure_optimizers()
    algorithm.main_steps = 1000
    return algorithm


def test_the_losses_by_hand():
    algorithm, rows = make(beta=2.0), batch()
    s, a, r, s2, d = rows[:5]
    q, v, target = algorithm.critic["q"], algorithm.critic["v"], algorithm.target_q
    u = torch.minimum(*target(s, a)) - v(s)
    torch.testing.assert_close(algorithm.v_loss(rows)[0], (torch.where(u < 0, 0.3, 0.7) * u**2).mean())
    goal = r + 0.99 * (1 - d) * v(s2)
    torch.testing.assert_close(algorithm.q_loss(rows)[0], ((q(s, a) - goal) ** 2).mean())
    normal = torch.distributions.Normal(algorithm.policy(s).mean, algorithm.policy(s).std)
    expected = -(torch.exp(2 * u).clamp(max=100) * normal.log_prob(a).sum(-1)).mean()
    torch.testing.assert_close(algorithm.policy_loss(rows)[0], expected)


def test_gradients_reach_only_the_network_that_the_loss_is_for():
    algorithm, rows = make(), batch()
    for name, loss in (("v", algorithm.v_loss), ("q", algorithm.q_loss)):
        loss(rows)[0].backward()
        reached = {key for key, p in algorithm.named_parameters() if p.grad is not None}
        assert reached
        assert all(key.startswith(f"critic.{name}.") for key in reached), name
        algorithm.zero_grad()
    algorithm.policy_loss(rows)[0].backward()
    assert all(p.grad is None for p in algorithm.critic.parameters())


def test_weights_are_bounded_and_take_no_gradients():
    advantages = torch.tensor([-1.0, 0.0, 2.0, 1e6], requires_grad=True)
    weights = advantage_weights(advantages, 3.0)
    torch.testing.assert_close(weights, torch.tensor([-3.0, 0.0, 6.0, 1e6]).exp().clamp(max=100))
    assert weights[2] == pytest.approx(100)
    assert not weights.requires_grad


def test_at_beta_0_it_is_gaussian_behavior_cloning():
    algorithm, rows = make(beta=0.0), batch()
    clone = BC(OBSERVATION_DIM, ACTION_DIM, policy="gaussian", hidden_dim=16)
    clone.policy.load_state_dict(algorithm.policy.state_dict())
    torch.testing.assert_close(algorithm.policy_loss(rows)[0], clone.policy_loss(rows))


def fitted_values(expectile: float) -> Tensor:
    """Return V at one state whose data hold two actions worth 0 and 1, by a frozen Q that equals the first action."""
    algorithm = make(expectile)
    rows = batch(rows=64)
    actions = (torch.arange(64) % 2).float()[:, None].expand(-1, ACTION_DIM)
    rows = rows._replace(observations=torch.zeros(64, OBSERVATION_DIM), actions=actions)
    algorithm.target_q.forward = lambda s, a: a[:, 0].expand(2, -1)  # type: ignore[method-assign]
    for _ in range(300):
        algorithm.minimize("v", algorithm.v_loss(rows)[0])
    v: Tensor = algorithm.critic["v"](rows.observations)[0].detach()
    return v


@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_v_is_the_expectile_of_q_between_mean_and_maximum(expectile: float):
    """Of two equally likely values 0 and 1 the expectile tau is tau; at 0.5 it is the mean, which makes Q SARSA's."""
    assert fitted_values(expectile).item() == pytest.approx(expectile, abs=0.01)


def test_an_update_moves_all_and_dropout_is_for_training_only():
    algorithm, rows = make(dropout=0.5), batch()
    assert moved(algorithm, lambda: algorithm.update(rows)) == {"critic", "policy"}
    one, two = (algorithm.policy_loss(rows)[0] for _ in range(2))
    assert one != two
    algorithm.eval()
    one, two = (algorithm.policy_loss(rows)[0] for _ in range(2))
    assert one == two
