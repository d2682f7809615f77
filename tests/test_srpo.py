"""SRPO: its losses against plain reimplementations, its phases, and its fixed point on a Gaussian behavior."""

from __future__ import annotations

import pytest
import torch
from energy_oracles import ExactNoise, ExactQ, tensor
from mixtures import ComponentQ, GaussianMixture
from tiny import ACTION_DIM, OBSERVATION_DIM, batch, moved, nested, shake
from torch import Tensor, nn

from lit_offrl.algorithms import SRPO
from lit_offrl.diffusion.schedules import VPSDE
from lit_offrl.networks.policies import Dirac

WEIGHTINGS = {
    "vds": lambda alpha, sigma: sigma**2,
    "stable": lambda alpha, sigma: 1 + 0 * sigma,
    "score": lambda alpha, sigma: alpha / sigma,
}
MEAN, STD, SLOPE = [0.2, -0.3], 0.4, [1.0, -0.5]


def make(**options: object) -> SRPO:
    torch.manual_seed(5)
    sizes = {"hidden_dim": 16, "policy_hidden_dim": 16, "critic__hidden_dim": 16}
    algorithm = SRPO(
        OBSERVATION_DIM, ACTION_DIM, **nested({**sizes, "pretrain_steps": 0, "critic__steps": 0, **options})
    )
    algorithm.configure_optimizers()
    algorithm.main_steps = 1000
    shake(algorithm.target_q)
    return algorithm


class GivenAction(nn.Module):
    """A policy that is one action."""

    def __init__(self, action: Tensor) -> None:
        super().__init__()
        self.action = nn.Parameter(action)

    def forward(self, observations: Tensor) -> Dirac:
        return Dirac(self.action.expand(len(observations), -1))


def on_a_gaussian(**options: object) -> SRPO:
    """Return an algorithm with the exact noise of N((0.2, -0.3), 0.4^2 I) and Q = a_1 - a_2 / 2."""
    algorithm = make(**options)
    algorithm.behavior = ExactNoise(GaussianMixture.isotropic(tensor([MEAN]), STD))
    algorithm.target_q = ExactQ(ComponentQ(slope=tensor(SLOPE)))
    return algorithm


def pull(weighting: str) -> float:
    """Return E_t [ w alpha sigma / (alpha^2 s^2 + sigma^2) ], the slope of the expected weighted noise."""
    time = torch.linspace(0.02, 0.98, 100_001, dtype=torch.float64)
    alpha, sigma = VPSDE().alpha(time), VPSDE().sigma(time)
    slope = WEIGHTINGS[weighting](alpha, sigma) * alpha * sigma / (alpha**2 * STD**2 + sigma**2)
    return slope.mean().item()


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_behavior_loss_is_the_summed_error_of_the_noise(dropout: float):
    algorithm, rows = make(dropout=dropout), batch()
    before = algorithm.noise.get_state()
    loss, _ = algorithm.behavior_loss(rows)
    algorithm.noise.set_state(before)
    time, noisy, noise = algorithm.process.noised(rows.actions, algorithm.noise)
    masks = algorithm.noise.dropout_masks(dropout, 12, 3, 16) if dropout else None
    error = algorithm.behavior(noisy, time, rows.observations, masks) - noise
    torch.testing.assert_close(loss, (error**2).sum() / 12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("variant", [{}, {"subtract_noise": True}, {"normalize_q_gradient": True}])
def test_gradient_of_the_policy_by_hand(weighting: str, variant: dict[str, bool]):
    algorithm, rows = make(beta=0.3, weighting=weighting, **variant), batch()
    before = algorithm.noise.get_state()
    loss, _ = algorithm.policy_loss(rows)
    ours = torch.autograd.grad(loss, [*algorithm.policy.parameters()])
    algorithm.noise.set_state(before)
    time = (0.02 + 0.96 * algorithm.noise.stratified(12)).float()
    noise = algorithm.noise.normal(12, ACTION_DIM)
    alpha, sigma = VPSDE().alpha(time)[:, None], VPSDE().sigma(time)[:, None]
    actions = algorithm.policy(rows.observations).action
    leaf = actions.detach().requires_grad_()
    q = (algorithm.target_q(rows.observations, leaf)[0] + algorithm.target_q(rows.observations, leaf)[1]) / 2
    (gradient,) = torch.autograd.grad(q.sum(), leaf)
    if "normalize_q_gradient" in variant:
        gradient = gradient / (gradient**2).mean(-1, keepdim=True).sqrt()
    epsilon = algorithm.behavior(alpha * leaf + sigma * noise, time, rows.observations)
    if "subtract_noise" in variant:
        epsilon = epsilon - noise
    direction = WEIGHTINGS[weighting](alpha, sigma) * epsilon - 0.3 * gradient
    expected = torch.autograd.grad(actions, [*algorithm.policy.parameters()], direction.detach() / 12)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)  # float32, in another order


def test_a_gradient_of_zero_stays_zero_when_it_is_normalized():
    algorithm = make(normalize_q_gradient=True)
    for parameter in algorithm.target_q.parameters():
        parameter.zero_()
    assert not algorithm.q_gradient(batch().observations, batch().actions).any()


# ---------------------------------------------------------------- the fixed point


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_fixed_point_on_a_gaussian_and_the_pull_towards_it(weighting: str, beta: float):
    """E_t [ w sigma (alpha a - alpha m) / (alpha^2 s^2 + sigma^2) ] = beta g; with beta = 0 it is the mode m."""
    algorithm = on_a_gaussian(weighting=weighting, beta=beta)
    fixed_point = tensor(MEAN) + beta * tensor(SLOPE) / pull(weighting)
    rows = batch(20_000)
    for offset in ([0.0, 0.0], [0.5, -0.4]):
        algorithm.policy = GivenAction((fixed_point + tensor(offset)).float())
        loss, _ = algorithm.policy_loss(rows)
        (gradient,) = torch.autograd.grad(loss, [algorithm.policy.action])
        # Noise of the estimate: at most 1 / (2 s) = 1.25 for each of 20,000 rows, 0.009; four of it.
        assert gradient.tolist() == pytest.approx((pull(weighting) * tensor(offset)).tolist(), abs=0.036)
        if any(offset):
            assert gradient[0] > 0.05, "the test would see nothing"


def test_the_policy_reaches_the_fixed_point():
    algorithm = make(beta=0.05, policy_learning_rate=3e-3, policy_batch_size=256)
    oracle = on_a_gaussian()
    algorithm.behavior, algorithm.target_q = oracle.behavior, oracle.target_q
    algorithm.main_steps = 400
    for step in range(400):
        algorithm.optimizer_set.set_rates(step, 400)
        algorithm.update(batch(256, seed=step))
    actions = algorithm.act(batch(200, seed=1000).observations)
    expected = tensor(MEAN) + 0.05 * tensor(SLOPE) / pull("vds")
    assert actions.mean(0).tolist() == pytest.approx(expected.tolist(), abs=0.05)
    assert (expected - tensor(MEAN)).abs().min() > 0.1, "the test would not tell it from the mode"


def test_the_behavior_actor_samples_the_gaussian():
    algorithm = on_a_gaussian(solver_steps=101)  # with 15 the deviation is 0.34
    samples = algorithm.sample_behavior(torch.zeros(4000, OBSERVATION_DIM), torch.Generator().manual_seed(0))
    assert samples.mean(0).tolist() == pytest.approx(MEAN, abs=4 * STD / 4000**0.5)
    assert samples.std(0).tolist() == pytest.approx([STD] * 2, rel=0.05)  # 0.011 from 4,000 samples, and the solver


# ---------------------------------------------------------------- phases


def test_each_phase_moves_its_own_networks_on_its_own_batch():
    algorithm = make(pretrain_steps=2, critic__steps=3, critic__batch_size=5, policy_batch_size=4)
    names = [(phase.name, phase.steps) for phase in algorithm.phases()]
    assert names == [("behavior", 2), ("critic", 3), ("training", 0)]
    sizes: dict[str, list[int]] = {"behavior": [], "critic": [], "policy": []}
    for name in sizes:
        network = algorithm.critic["v"] if name == "critic" else getattr(algorithm, name)
        network.register_forward_pre_hook(lambda _, inputs, name=name: sizes[name].append(len(inputs[0])))
    for phase, name in zip(algorithm.phases(), sizes, strict=True):
        assert moved(algorithm, lambda phase=phase: phase.update(batch())) == {name}
    assert {name: seen[0] for name, seen in sizes.items()} == {"behavior": 12, "critic": 5, "policy": 4}
    (target,) = algorithm.targets()
    assert [target.moves_at(step - 5) for step in range(1, 8)] == [False, False, True, True, True, False, False]
