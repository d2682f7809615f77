"""DTQL's losses against values worked out by hand, and where their gradients go."""

import math

import pytest
import torch
from tiny import nested, rate
from torch import Tensor, nn

from lit_offrl.algorithms import DTQL
from lit_offrl.algorithms.options import Acting
from lit_offrl.batch import Batch

BATCH = Batch(
    observations=torch.tensor([[0.1, -0.2, 0.3], [0.5, 0.4, -0.1]]),
    actions=torch.tensor([[0.2, -0.7], [0.9, 0.1]]),
    rewards=torch.tensor([-1.0, 0.0]),
    next_observations=torch.tensor([[0.2, -0.1, 0.3], [0.6, 0.4, 0.0]]),
    terminals=torch.tensor([0.0, 1.0]),
)


def make(**options: float) -> DTQL:
    torch.manual_seed(3)
    sizes = {"hidden_dim": 8, "critic__hidden_dim": 8, "pretrain_steps": 0, "acting__candidates": 16}
    algorithm = DTQL(3, 2, **nested({**sizes, **options}))
    algorithm.configure_optimizers()
    return algorithm


class Scripted(nn.Module):
    """Returns prepared values."""

    def __init__(self, *values: Tensor) -> None:
        super().__init__()
        self.values = nn.ParameterList(values)
        self.calls = 0

    def forward(self, *_: Tensor) -> Tensor:
        self.calls += 1
        return self.values[(self.calls - 1) % len(self.values)]


def test_critic_loss_by_hand():
    algorithm = make(critic__expectile=0.9, critic__discount=0.5)
    q = torch.tensor([[1.0, -2.0], [3.0, -1.0]])  # two members, two transitions
    v, next_v = torch.tensor([0.5, 0.0]), torch.tensor([4.0, 7.0])
    algorithm.critic["q"], algorithm.critic["v"] = Scripted(q), Scripted(v, next_v)
    loss, info = algorithm.critic_loss(BATCH)
    targets = [-1.0 + 0.5 * 4.0, 0.0]  # the second transition is terminal
    q_loss = sum(sum((row[i] - targets[i]) ** 2 for i in range(2)) / 2 for row in q.tolist())
    residuals = [1.0 - 0.5, -2.0 - 0.0]  # min Q - V
    v_loss = (0.9 * residuals[0] ** 2 + 0.1 * residuals[1] ** 2) / 2
    assert loss.item() == pytest.approx(q_loss + v_loss, rel=1e-6)
    assert info["critic_v_loss"].item() == pytest.approx(v_loss, rel=1e-6)
    # V learns from Q's value, not through it; the bootstrap target gives V no gradient
    gradient_v, gradient_next = torch.autograd.grad(loss, list(algorithm.critic["v"].parameters()), allow_unused=True)
    assert gradient_next is None
    expected = [-2 * 0.9 * residuals[0] / 2, -2 * 0.1 * residuals[1] / 2]
    torch.testing.assert_close(gradient_v, torch.tensor(expected))


def test_policy_loss_adds_up(monkeypatch: pytest.MonkeyPatch):
    algorithm = make(alpha=3.0, nll_weight=0.5)
    noise = torch.tensor([[0.3, -1.0], [0.5, 0.2]])
    distribution = algorithm.policy(BATCH.observations)
    actions = torch.tanh(distribution.mean + distribution.std * noise)
    level, level_noise = torch.tensor([0.3, 0.8]), torch.tensor([[1.0, 0.1], [-0.4, 0.6]])
    trust_region = algorithm.behavior.loss(
        actions, algorithm.noise_levels.quantile(level), level_noise, BATCH.observations
    )
    q = algorithm.critic["q"](BATCH.observations, actions).min(0).values.mean()
    u = torch.atanh(BATCH.actions / 1.001)
    normal = torch.distributions.Normal(distribution.mean, distribution.std)
    expected = 3.0 * trust_region - q - 0.5 * normal.log_prob(u).sum(1).mean()

    draws = iter([noise, level_noise])
    monkeypatch.setattr(algorithm.noise, "normal", lambda *_: next(draws))
    monkeypatch.setattr(algorithm.noise, "uniform", lambda *_: level)
    loss, _ = algorithm.policy_loss(BATCH)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_trust_region_gradient_reaches_the_action_through_every_path():
    algorithm = make()
    x = torch.tensor([[0.3, -0.4]], dtype=torch.float32, requires_grad=True)
    sigma, noise, s = torch.tensor([0.7]), torch.tensor([[0.5, -0.2]]), BATCH.observations[:1]
    gradient = torch.autograd.grad(algorithm.behavior.loss(x, sigma, noise, s), x)[0]
    step = 1e-2
    for i in range(2):
        shift = torch.zeros(1, 2)
        shift[0, i] = step
        with torch.no_grad():
            up = algorithm.behavior.loss(x + shift, sigma, noise, s)
            down = algorithm.behavior.loss(x - shift, sigma, noise, s)
        # central difference: truncation error ~ step^2, float32 rounding ~ 1e-7 / step
        assert gradient[0, i].item() == pytest.approx(((up - down) / (2 * step)).item(), abs=2e-3)


@pytest.mark.parametrize(
    ("stage", "moved"),
    [("update", {"critic", "behavior", "policy"}), ("pretrain_update", {"critic", "behavior"})],
)
def test_each_phase_moves_its_networks_and_no_others(stage: str, moved: set[str]):
    algorithm = make(nll_weight=1.0)
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    getattr(algorithm, stage)(BATCH)
    for name, value in algorithm.state_dict().items():
        owner = name.split(".")[0]
        if name.endswith("frequencies") or owner.startswith("observation_"):
            continue
        changed = not torch.equal(value, before[name])
        assert changed == (owner in moved) or (changed is False and _is_dead(algorithm, name)), name


def _is_dead(algorithm: DTQL, name: str) -> bool:
    """A tiny ReLU network may have units that no input of the batch activates."""
    parameter = dict(algorithm.named_parameters()).get(name)
    return parameter is not None and parameter.grad is not None and not parameter.grad.any()


def test_minimize_gives_gradients_to_the_named_networks_only():
    algorithm = make()
    loss, _ = algorithm.policy_loss(BATCH)
    algorithm.minimize("policy", loss)
    assert all(p.grad is not None for p in algorithm.policy.parameters())
    for module in (algorithm.critic, algorithm.behavior, algorithm.target_q):
        assert all(p.grad is None for p in module.parameters())


def test_selection_follows_the_softmax_of_the_smaller_target_q():
    algorithm = make()
    algorithm.acting = Acting(candidates=2, selection_temperature=0.5)

    class FirstDimension(nn.Module):
        def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
            return torch.stack([actions[..., 0], actions[..., 0] + 10])  # the minimum is the first member

    algorithm.target_q = FirstDimension()
    observations = BATCH.observations[:1].expand(40_000, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        chosen = algorithm.sample_actions(observations, generator)[:, 0]
        distribution = algorithm.policy(observations)
        noise = torch.randn(40_000, 2, 2, generator=torch.Generator().manual_seed(0))
        pairs = torch.tanh(distribution.mean[:, None] + distribution.std[:, None] * noise)[..., 0]
    expected = (pairs * torch.softmax(pairs / 0.5, dim=1)).sum(1)
    # the mean over 40,000 choices has a standard error below 0.5 / 200 = 0.0025
    assert chosen.mean().item() == pytest.approx(expected.mean().item(), abs=0.01)
    assert chosen.mean() > pairs.mean() + 0.05


def test_cosine_decay_covers_the_main_phase_only():
    algorithm = make(cosine_decay=True, learning_rate=1.0)
    algorithm.pretrain_steps, algorithm.main_steps = 10, 100
    spec = algorithm.optimizer_specs()["policy"]
    for step, expected in ((0, 1.0), (9, 1.0), (10, 1.0), (60, 0.5), (110, 0.0)):
        algorithm.gradient_step = step
        assert rate(algorithm, spec) == pytest.approx(expected, abs=1e-9)
    algorithm.gradient_step = 35
    assert rate(algorithm, spec) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_critic_learning_rate_is_its_own():
    rates = {name: spec.learning_rate for name, spec in make(learning_rate=1e-4).optimizer_specs().items()}
    assert rates == {"critic": 3e-4, "behavior": 1e-4, "policy": 1e-4}
    specs = make(learning_rate=1e-4, policy_learning_rate=1e-2).optimizer_specs()
    assert (specs["behavior"].learning_rate, specs["policy"].learning_rate) == (1e-4, 1e-2)


def test_actions_stay_in_the_box_and_observations_are_normalised():
    algorithm = make()
    algorithm.units.observation_mean.fill_(5.0)
    algorithm.units.observation_std.fill_(2.0)
    raw = BATCH.observations * 2 + 5
    ours = algorithm.act(raw, torch.Generator().manual_seed(1))
    plain = algorithm.sample_actions(BATCH.observations, torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, plain.detach(), atol=1e-5, rtol=1e-5)
    assert algorithm.act(raw, None, "behavior").abs().max() <= 1


@pytest.mark.parametrize("at_once", [1, 40, 48])
def test_scoring_candidates_in_pieces_changes_no_choice(monkeypatch: pytest.MonkeyPatch, at_once: int):
    algorithm, observations = make(), torch.randn(7, 3)
    together = algorithm.sample_actions(observations, torch.Generator().manual_seed(0))
    monkeypatch.setattr("lit_offrl.algorithms.dtql.SCORED_AT_ONCE", at_once)
    in_pieces = algorithm.sample_actions(observations, torch.Generator().manual_seed(0))
    torch.testing.assert_close(in_pieces, together, rtol=0, atol=0)
