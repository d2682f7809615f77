"""TD3+BC and ReBRAC: hand-computed losses, limits and invariances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ACTION_DIM, OBSERVATION_DIM, batch, drawn, segments, shake
from torch import Tensor, nn

from lit_offrl import TD3BC, ReBRAC
from lit_offrl.algorithms.options import CriticOptions


def make(cls: type[TD3BC] = TD3BC, **options: Any) -> TD3BC:
    torch.manual_seed(0)
    critic = CriticOptions(hidden_dim=16)
    algorithm = cls(OBSERVATION_DIM, ACTION_DIM, **{"hidden_dim": 16, "critic": critic, **options})
    shake(algorithm.target_critic)
    shake(algorithm.target_policy)
    algorithm.configure_optimizers()
    return algorithm


def test_the_critics_target_by_hand():
    algorithm, rows = make(target_noise=0.4), batch()
    (loss, _), (noise,) = drawn(algorithm, lambda: algorithm.critic_loss(rows))
    s, a, r, s2, d = rows[:5]
    action = (algorithm.target_policy(s2).action + (0.4 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)
    assert ((0.4 * noise).abs() > 0.5).any()  # the bound acts
    goal = r + 0.99 * (1 - d) * torch.minimum(*algorithm.target_critic(s2, action))
    one, two = algorithm.critic(s, a)
    torch.testing.assert_close(loss, ((one - goal) ** 2).mean() + ((two - goal) ** 2).mean())


def test_the_policys_loss_by_hand_and_without_q_it_clones():
    algorithm, rows = make(), batch()
    action = algorithm.policy(rows.observations).action
    q = algorithm.critic(rows.observations, action)[0]
    distance = ((action - rows.actions) ** 2).mean()
    torch.testing.assert_close(algorithm.policy_loss(rows)[0], -2.5 * q.mean() / q.abs().mean().detach() + distance)
    torch.testing.assert_close(make(alpha=0.0).policy_loss(rows)[0], distance)


class LinearQ(nn.Module):
    """Q = scale * w . a, twice."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        q = self.scale * (actions * torch.tensor([1.0, -2.0])).sum(-1)
        return torch.stack([q, q])


@pytest.mark.parametrize("cls", [TD3BC, ReBRAC])
def test_the_scale_of_the_rewards_does_not_reach_the_policys_gradient(cls: type[TD3BC]):
    gradients = []
    for scale in (1.0, 1000.0):
        algorithm = make(cls)
        algorithm.critic = LinearQ(scale)  # type: ignore[assignment]
        loss, _ = algorithm.policy_loss(segments(batch(), cls.segment_length))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*algorithm.policy.parameters()])]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_policy_and_targets_move_at_every_second_step():
    algorithm = make()
    steps = [algorithm.active_at(step) for step in (1, 2, 3, 4)]
    assert steps == [("critic",), ("critic", "policy")] * 2
    assert [[target.moves_at(step) for target in algorithm.targets()] for step in (1, 2)] == [[False] * 2, [True] * 2]


def test_the_penalty_lowers_rebracs_target_by_the_distance_where_the_next_action_is_known():
    rows = segments(batch(rows=8), 2)
    assert rows.mask is not None
    goals = []
    for beta in (0.0, 0.5):
        algorithm = make(ReBRAC, beta_critic=beta)
        assert isinstance(algorithm, ReBRAC)
        seen: list[Tensor] = []
        q = algorithm.critic.forward
        algorithm.critic.forward = lambda s, a, q=q: q(s, a) * 0  # type: ignore[method-assign]
        (loss, _), (noise,) = drawn(algorithm, lambda algorithm=algorithm: algorithm.critic_loss(rows))
        now = rows.at(0)
        actions = (algorithm.target_policy(now.next_observations).action + (0.2 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)
        distance = ((actions - rows.actions[:, 1]) ** 2).sum(-1) * rows.mask[:, 1]
        next_q = algorithm.target_critic(now.next_observations, actions).amin(0)
        goal = now.rewards + 0.99 * (1 - now.terminals) * (next_q - beta * distance)
        torch.testing.assert_close(loss, 2 * (goal**2).mean())
        goals.append(goal)
        seen.append(distance)
    lowered = goals[0] - goals[1]
    torch.testing.assert_close(lowered, 0.99 * (1 - now.terminals) * 0.5 * distance)
    assert (lowered[::4] == 0).all()  # there the episode was cut
    assert (lowered > 0).any()


def test_rebracs_policy_loss_by_hand():
    algorithm, rows = make(ReBRAC, beta_actor=0.3), segments(batch(), 2)
    now = rows.at(0)
    action = algorithm.policy(now.observations).action
    q = algorithm.critic(now.observations, action).amin(0)
    distance = ((action - now.actions) ** 2).sum(-1).mean()
    torch.testing.assert_close(algorithm.policy_loss(rows)[0], 0.3 * distance - q.mean() / q.abs().mean().detach())


def test_rebrac_starts_as_its_authors_say():
    algorithm = make(ReBRAC)
    first, *_, last = (layer for layer in algorithm.policy.layers if isinstance(layer, nn.Linear))
    assert first.weight.abs().max() <= OBSERVATION_DIM**-0.5
    assert (first.bias == 0.1).all()
    assert last.weight.abs().max() <= 1e-3
    kinds = [type(layer).__name__ for layer in algorithm.critic.members[0]]  # type: ignore[arg-type]
    assert kinds == ["Linear", "ReLU", "LayerNorm"] * 3 + ["Linear"]
