"""EDP: the one-step estimate of the action on a Gaussian, the three losses by hand, both samplers."""

from __future__ import annotations

import math

import pytest
import torch
from test_dql import Heads, gradient
from tiny import batch, moved, nested, shake
from torch import Tensor, nn
from torch.distributions import Normal

from lit_offrl.algorithms import EDP
from lit_offrl.batch import Batch
from lit_offrl.errors import UserError

MEAN, STD = 0.3, 0.2  # of the actions


def make(**options: object) -> EDP:
    torch.manual_seed(5)
    sizes = {"hidden_dim": 16, "critic__hidden_dim": 16, "diffusion_steps": 10}
    algorithm = EDP(3, 2, **nested({**sizes, **options}))
    algorithm.configure_optimizers()
    return algorithm


class GaussianNoise(nn.Module):
    """E[epsilon | a_n] where the actions are normal."""

    def __init__(self, algorithm: EDP, std: float = STD) -> None:
        super().__init__()
        self.schedule, self.variance = algorithm.schedule, std**2

    def forward(self, noisy_actions: Tensor, step: Tensor, observations: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha(step)[:, None], self.schedule.sigma(step)[:, None]
        return sigma * (noisy_actions - alpha * MEAN) / (alpha**2 * self.variance + sigma**2)


class FirstCoordinate(nn.Module):
    """V = s_1."""

    def forward(self, observations: Tensor) -> Tensor:
        return observations[..., 0]


def test_the_estimate_is_the_posterior_mean_of_a_gaussian():
    algorithm = make(clip=5.0, diffusion_steps=100).double()
    step = torch.arange(1, 101)
    noisy_actions = torch.randn(100, 2, dtype=torch.float64)
    epsilon = GaussianNoise(algorithm)(noisy_actions, step, torch.zeros(100, 3))
    actions = algorithm.approximate(noisy_actions, step, epsilon)
    signal = (1 - algorithm.schedule.betas).cumprod(0)[step][:, None]
    precision = 1 / STD**2 + signal / (1 - signal)  # of a normal prior and one observation
    expected = (MEAN / STD**2 + signal.sqrt() * noisy_actions / (1 - signal)) / precision
    torch.testing.assert_close(actions, expected, rtol=1e-4, atol=1e-4)  # the tables are those of float32


def test_the_estimate_is_in_the_box_and_that_of_the_cloned_noise(monkeypatch: pytest.MonkeyPatch):
    algorithm, rows, seen = make(), batch(4), []
    epsilon, draw = torch.randn(4, 2), torch.tensor([0.05, 0.3, 0.6, 0.99])
    monkeypatch.setattr(algorithm, "q_loss", lambda *inputs: seen.append(inputs) or torch.zeros(()))
    with algorithm.noise.replaying([draw, epsilon]):
        loss, _ = algorithm.actor_loss(rows)
    step = torch.tensor([1, 4, 7, 10])
    signal = (1 - algorithm.schedule.betas).cumprod(0)[step][:, None]
    noisy_actions = signal.sqrt() * rows.actions + (1 - signal).sqrt() * epsilon
    predicted = algorithm.actor(noisy_actions, step, rows.observations)
    ((_, actions),) = seen
    estimate = (noisy_actions - (1 - signal).sqrt() * predicted) / signal.sqrt()
    assert (estimate.abs() > 1).any()
    torch.testing.assert_close(actions, estimate.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, (predicted - epsilon).square().sum() / 8)


def test_the_schedule_is_linear():
    betas = make(diffusion_steps=100).schedule.betas
    assert betas[[1, 50, 100]].tolist() == pytest.approx([1e-3, 1e-3 + 49 / 99 * 0.199, 0.2], rel=1e-4)


# ---------------------------------------------------------------- losses


def test_alpha_0_leaves_the_gradient_of_behavior_cloning():
    gradients = []
    for alpha in (0.0, 2.0):
        algorithm = make(alpha=alpha)
        with algorithm.noise.independent(3):
            gradients.append(gradient(algorithm.actor_loss(batch())[0], algorithm.actor))
    with algorithm.noise.independent(3):
        cloning = gradient(algorithm.bc_loss(batch()), algorithm.actor)
    torch.testing.assert_close(gradients[0], cloning)
    assert (gradients[1] - cloning).abs().max() > 1e-3


@pytest.mark.parametrize(("draw", "expected"), [(0.9, -2 * 0.2 / 0.3), (0.1, -2.0)])
def test_td3_takes_a_critic_on_its_own_scale(draw: float, expected: float):
    algorithm = make()
    algorithm.critic = Heads()
    actions = torch.tensor([[0.5, 0.0], [-0.1, 0.0]])  # Q_1: mean 0.2, mean|.| 0.3; Q_2: 0.8 and 0.8
    with algorithm.noise.replaying([torch.tensor([draw])]):
        assert algorithm.q_loss(torch.zeros(2, 3), actions).item() == pytest.approx(expected)


def test_weights_of_crr_by_hand():
    algorithm = make(loss="crr", beta_crr=4.0)
    algorithm.critic = Heads()  # the smaller is a_1 below a half, 1 - a_1 above
    rows = batch(2)._replace(actions=torch.tensor([[0.4, 0.0], [0.5, 0.0]]))
    actions = torch.tensor([[0.1, 0.0], [-1.0, 0.0]])
    noise = torch.zeros(2, 10, 2)
    noise[0, :5, 0] = 0.8  # half of the actions at 0.9, whose smaller Q is 0.1, as is that of the others
    with algorithm.noise.replaying([noise]):
        weights = algorithm.weights(rows, actions)
    assert weights.tolist() == pytest.approx([math.exp(4 * (0.4 - 0.1)), 20.0])  # exp(4 (0.5 + 1)) is above the bound


def test_weights_of_iql_by_hand():
    algorithm = make(loss="iql")
    algorithm.target_critic, algorithm.v = Heads(), FirstCoordinate()
    rows = batch(2)._replace(
        actions=torch.tensor([[0.4, 0.0], [0.7, 0.0]]), observations=torch.tensor([[0.5, 0, 0], [-3.0, 0, 0]])
    )
    weights = algorithm.weights(rows, rows.actions)
    assert weights.tolist() == pytest.approx([math.exp(3 * (0.4 - 0.5)), 100.0])  # exp(3 (0.3 + 3)) is above the bound


def test_likelihood_is_that_of_a_normal_distribution_around_the_estimate():
    algorithm, rows = make(loss="iql"), batch()
    with algorithm.noise.independent(3):
        loss, info = algorithm.actor_loss(rows)
    with algorithm.noise.independent(3):
        step, noisy_actions, _ = algorithm.noised(rows)
    predicted = algorithm.actor(noisy_actions, step, rows.observations)
    actions = algorithm.approximate(noisy_actions, step, predicted)
    log_likelihood = Normal(actions, 1.0).log_prob(rows.actions).sum(1)
    expected = info["bc_loss"] - (algorithm.weights(rows, actions) * log_likelihood).mean()
    torch.testing.assert_close(loss, expected)


def test_the_critic_of_iql_bootstraps_from_v_and_samples_nothing(monkeypatch: pytest.MonkeyPatch):
    algorithm = make(loss="iql", critic__discount=0.9, critic__expectile=0.8)
    monkeypatch.setattr(algorithm, "sample", lambda *_: pytest.fail("an action was sampled"))
    algorithm.v = FirstCoordinate()
    rows = batch()
    goal = rows.rewards + 0.9 * (1 - rows.terminals) * rows.next_observations[:, 0]
    q = algorithm.critic(rows.observations, rows.actions)
    torch.testing.assert_close(algorithm.critic_loss(rows)[0], (q - goal).square().mean())
    gap = algorithm.target_critic(rows.observations, rows.actions).amin(0) - rows.observations[:, 0]
    expected = (torch.where(gap > 0, 0.8, 0.2) * gap**2).mean()
    torch.testing.assert_close(algorithm.v_loss(rows)[0], expected)


# ---------------------------------------------------------------- the order of an update


@pytest.mark.parametrize("loss", ["td3", "crr"])
def test_the_policy_is_trained_with_q_before_its_step(loss: str):
    algorithm = make(loss=loss)
    with algorithm.noise.independent(3):
        before = algorithm.actor_loss(batch())[0]
    with algorithm.noise.independent(3):
        assert torch.equal(algorithm.update(batch())["actor_loss"], before)


def test_v_comes_first():
    algorithm, other = make(loss="iql"), make(loss="iql")
    other.minimize("v", other.v_loss(batch())[0])
    with algorithm.noise.independent(3):
        info = algorithm.update(batch())
    with other.noise.independent(3):
        assert torch.equal(info["actor_loss"], other.actor_loss(batch())[0])
    assert torch.equal(info["q_loss"], other.critic_loss(batch())[0])


@pytest.mark.parametrize(("loss", "names"), [("td3", {"actor", "critic"}), ("iql", {"actor", "critic", "v"})])
def test_an_update_moves_the_networks_of_its_loss(loss: str, names: set[str]):
    algorithm = make(loss=loss)
    assert moved(algorithm, lambda: algorithm.update(batch())) == names
    assert {*algorithm.validation_losses(batch())} >= {"actor_loss", "bc_loss", "q_mean"}


# ---------------------------------------------------------------- sampling


def samples(algorithm: EDP, std: float) -> Tensor:
    algorithm.actor = GaussianNoise(algorithm, std)
    noise = torch.randn(4000, algorithm.noises_per_action, 1, 2, generator=torch.Generator().manual_seed(0))
    actions: Tensor = algorithm.denoise(algorithm.actor, torch.zeros(4000, 3), noise)
    return actions


def test_the_chain_on_a_gaussian():
    algorithm = make(diffusion_steps=100, clip=3.0)
    schedule, variance = algorithm.schedule, torch.ones(())
    for n in range(100, 0, -1):  # a_{n-1} is linear in a_n, and its noise has the posterior variance
        alpha, sigma = schedule.alphas[n], schedule.sigmas[n]
        slope = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        slope = schedule.posterior_clean[n] * slope + schedule.posterior_noisy[n]
        variance = slope**2 * variance + schedule.betas[n] * (schedule.sigmas[n - 1] / sigma) ** 2
    actions = samples(algorithm, STD)
    # four standard errors of 8,000 numbers of this deviation, 0.175, are 0.008 and 0.006
    assert actions.mean().item() == pytest.approx(MEAN, abs=0.008)
    assert actions.std().item() == pytest.approx(variance.sqrt().item(), abs=0.006)


def test_the_solver_on_a_gaussian():
    actions = samples(make(diffusion_steps=1000, sampler="dpm", clip=6.0), 1.0)
    # four standard errors of 8,000 numbers; the last step, of order 1, makes the deviation a few percent too small
    assert actions.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert 0.93 < actions.std().item() < 1.03
    assert samples(make(diffusion_steps=1000, sampler="dpm", clip=0.5), 1.0).abs().max() <= 0.5


def test_dpm_visits_whole_steps_from_the_last_to_the_first():
    levels = make(diffusion_steps=1000, sampler="dpm").levels
    assert [levels[i].time for i in (0, 1, 14, 15)] == [1000, 933, 68, 1]
    with pytest.raises(UserError, match="diffusion_steps: must be above 15 with the sampler dpm"):
        make(diffusion_steps=15, sampler="dpm")


def test_candidates_are_compared_by_q_itself():
    algorithm = make()
    shake(algorithm.critic, scale=0.3)
    rows: Batch = batch()
    q = algorithm.critic(rows.observations, rows.actions).amin(0)
    assert torch.equal(algorithm.value_of(rows.observations, rows.actions), q)
