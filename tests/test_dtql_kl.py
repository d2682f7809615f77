"""DTQLKL: its KL gradient by hand and against closed forms, how its networks start, and where gradients go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_words
from mixtures import GaussianMixture
from tiny import nested
from torch import Tensor, nn

from lit_offrl.algorithms import DTQLKL
from lit_offrl.batch import Batch
from lit_offrl.cli import main

BATCH = Batch(
    observations=torch.tensor([[0.1, -0.2, 0.3], [0.5, 0.4, -0.1]]),
    actions=torch.tensor([[0.2, -0.7], [0.9, 0.1]]),
    rewards=torch.tensor([-1.0, 0.0]),
    next_observations=torch.tensor([[0.2, -0.1, 0.3], [0.6, 0.4, 0.0]]),
    terminals=torch.tensor([0.0, 1.0]),
)


def make(**options: object) -> DTQLKL:
    torch.manual_seed(3)
    algorithm = DTQLKL(
        3,
        2,
        **nested({"hidden_dim": 8, "critic__hidden_dim": 8, "pretrain_steps": 0, "acting__candidates": 16, **options}),
    )
    algorithm.configure_optimizers()
    return algorithm


def gradient(algorithm: DTQLKL, actions: Tensor) -> Tensor:
    """Return the gradient of the KL loss at `actions`."""
    actions = actions.clone().requires_grad_(True)
    return torch.autograd.grad(algorithm.kl_loss(actions, torch.zeros(len(actions), 3)), actions)[0]


# ---------------------------------------------------------------- the KL gradient


class Estimate(nn.Module):
    """A denoiser whose estimate is given; keeps what it was asked."""

    def __init__(self, estimate: list[list[float]]) -> None:
        super().__init__()
        self.estimate = torch.tensor(estimate)

    def forward(self, x: Tensor, sigma: Tensor, _: Tensor) -> Tensor:
        self.asked = x, sigma
        return self.estimate


def test_gradient_by_hand(monkeypatch: pytest.MonkeyPatch):
    algorithm = make()
    actions = torch.tensor([[0.2, -0.7], [0.9, 1.5]])  # a generated action may lie outside the box
    algorithm.behavior = Estimate([[0.1, -0.4], [0.5, 1.0]])
    algorithm.fake = Estimate([[0.3, -0.4], [0.8, 0.2]])
    level, noise = torch.tensor([0.3, 0.8]), torch.tensor([[1.0, 0.1], [-0.4, 0.6]])
    monkeypatch.setattr(algorithm.noise, "uniform", lambda *_: level)
    monkeypatch.setattr(algorithm.noise, "normal", lambda *_: noise)
    weights = [(0.1 + 0.3) / 2, (0.4 + 0.5) / 2]  # mean over dimensions of |a - D_real|
    differences = [[0.2, 0.0], [0.3, -0.8]]  # D_fake - D_real
    elements = 4  # the loss is a mean over batch and dimensions
    expected = [[d / w / elements for d in row] for row, w in zip(differences, weights, strict=True)]
    torch.testing.assert_close(gradient(algorithm, actions), torch.tensor(expected))
    sigma = algorithm.noise_levels.quantile(level)
    for model in (algorithm.behavior, algorithm.fake):  # both at the same noisy action
        torch.testing.assert_close(model.asked[0], actions + sigma[:, None] * noise)
        torch.testing.assert_close(model.asked[1], sigma)


def test_an_action_that_meets_its_estimate_has_a_finite_gradient():
    algorithm = make()
    smallest = 0.002  # the smallest noise level takes the place of a weight of 0
    algorithm.behavior = Estimate([[1.0, -1.0], [1.0, 1.0]])
    algorithm.fake = Estimate([[1.0, -1.0], [1.0, 0.5]])
    expected = torch.tensor([[0.0, 0.0], [0.0, -0.5 / smallest / 4]])
    torch.testing.assert_close(gradient(algorithm, torch.tensor([[1.0, -1.0], [1.0, 1.0]])), expected)


def test_a_fake_score_equal_to_the_real_one_gives_no_gradient():
    algorithm = make()
    algorithm.fake.load_state_dict(algorithm.behavior.state_dict())
    algorithm.behavior.clip = None  # as the fake score's
    assert not gradient(algorithm, torch.randn(64, 2)).any()


class Exact(nn.Module):
    """The denoiser of a mixture: E[x_0 | x_0 + sigma epsilon = x]."""

    def __init__(self, mixture: GaussianMixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor, sigma: Tensor, _: Tensor) -> Tensor:
        return self.mixture.posterior(x, 1.0, sigma.double()).mean()


def gaussian(mean: Tensor, log_std: Tensor) -> GaussianMixture:
    return GaussianMixture(torch.zeros(1, dtype=torch.float64), mean[None], log_std.exp().square()[None])


REAL_MEAN = torch.tensor([0.2, -0.1], dtype=torch.float64)
REAL_LOG_STD = torch.tensor([0.15, 0.4], dtype=torch.float64).log()
FAKE_MEAN = torch.tensor([-0.3, 0.3], dtype=torch.float64)
FAKE_LOG_STD = torch.tensor([0.3, 0.2], dtype=torch.float64).log()


def diffused_kl(mean: Tensor, log_std: Tensor, sigma: float) -> Tensor:
    """KL(N(mean, std^2 + sigma^2) || the real Gaussian, as noisy), in closed form."""
    fake, real = log_std.exp().square() + sigma**2, REAL_LOG_STD.exp().square() + sigma**2
    return 0.5 * ((fake + (mean - REAL_MEAN).square()) / real - 1 - (fake / real).log()).sum()


def test_gradient_is_the_difference_of_scores(monkeypatch: pytest.MonkeyPatch):
    algorithm = make()
    fake, real = gaussian(FAKE_MEAN, FAKE_LOG_STD), gaussian(REAL_MEAN, REAL_LOG_STD)
    algorithm.fake, algorithm.behavior = Exact(fake), Exact(real)
    actions, noise = torch.randn(2, 50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    level = torch.linspace(0.05, 0.95, 50)
    monkeypatch.setattr(algorithm.noise, "uniform", lambda *_: level)
    monkeypatch.setattr(algorithm.noise, "normal", lambda *_: noise)
    sigma = algorithm.noise_levels.quantile(level).double()[:, None]
    noisy = actions + sigma * noise
    weight = (actions - algorithm.behavior(noisy, sigma[:, 0], noisy)).abs().mean(1, keepdim=True)
    scores = fake.diffused(1.0, sigma[:, 0]).score(noisy) - real.diffused(1.0, sigma[:, 0]).score(noisy)
    # Appendix C: w_t alpha_t (s_fake - s_real) with w_t = sigma^2 / weight; a mean over 100 elements
    torch.testing.assert_close(gradient(algorithm, actions), sigma**2 / weight * scores / 100, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
def test_gradient_points_along_that_of_the_diffused_divergence(sigma: float, monkeypatch: pytest.MonkeyPatch):
    algorithm = make()
    algorithm.fake, algorithm.behavior = (
        Exact(gaussian(mean, log_std)) for mean, log_std in ((FAKE_MEAN, FAKE_LOG_STD), (REAL_MEAN, REAL_LOG_STD))
    )
    monkeypatch.setattr(
        type(algorithm.noise_levels), "quantile", lambda _, u: torch.full_like(u, sigma, dtype=torch.float64)
    )
    parameters = [FAKE_MEAN.clone().requires_grad_(True), FAKE_LOG_STD.clone().requires_grad_(True)]
    z = torch.randn(100_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = torch.cat(
        torch.autograd.grad(
            algorithm.kl_loss(parameters[0] + parameters[1].exp() * z, torch.zeros(len(z), 3)), parameters
        )
    )
    true = torch.cat(torch.autograd.grad(diffused_kl(*parameters, sigma), parameters))
    # Not 1: the weight 1 / |a - D_real| varies with the sample. Measured 0.990 to 0.994; with 100,000 samples the
    # components are known to about 0.003 of the gradient's length.
    assert torch.cosine_similarity(ours, true, dim=0) > 0.98


def test_descending_it_makes_the_generator_the_behavior(monkeypatch: pytest.MonkeyPatch):
    algorithm = make(sigma_data=0.3)
    algorithm.behavior = Exact(gaussian(REAL_MEAN, REAL_LOG_STD))
    parameters = [FAKE_MEAN.clone().requires_grad_(True), FAKE_LOG_STD.clone().requires_grad_(True)]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        algorithm.fake = Exact(gaussian(*(parameter.detach() for parameter in parameters)))
        actions = parameters[0] + parameters[1].exp() * algorithm.noise.normal(256, 2)
        optimizer.zero_grad()
        algorithm.kl_loss(actions, torch.zeros(256, 3)).backward()
        optimizer.step()
        decay.step()
    # the gradient vanishes sample by sample at the goal, so that no noise is left but that of the way there
    torch.testing.assert_close(parameters[0].detach(), REAL_MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(parameters[1].detach(), REAL_LOG_STD, atol=0.05, rtol=0)


# ---------------------------------------------------------------- the networks


def test_policy_loss_adds_up(monkeypatch: pytest.MonkeyPatch):
    algorithm = make(alpha=3.0)
    actions = torch.tensor([[0.3, -0.4], [0.6, 1.2]])
    monkeypatch.setattr(algorithm, "kl_loss", lambda *_: torch.tensor(0.7))
    loss, info = algorithm.generator_loss(actions, BATCH.observations)
    q = algorithm.critic["q"](BATCH.observations, actions).min(0).values.mean()
    assert loss.item() == pytest.approx(3.0 * 0.7 - q.item(), rel=1e-5)
    assert info.keys() == {"kl_loss", "policy_q"}


@pytest.mark.parametrize(
    ("stage", "moved"),
    [("update", {"critic", "behavior", "policy", "fake"}), ("pretrain_update", {"critic", "behavior"})],
)
def test_each_phase_moves_its_networks_and_no_others(stage: str, moved: set[str]):
    algorithm = make()
    before = {name: value.clone() for name, value in algorithm.named_parameters()}
    getattr(algorithm, stage)(BATCH)
    for name, value in algorithm.named_parameters():
        assert torch.equal(value, before[name]) == (name.split(".")[0] not in moved), name


def test_minimize_gives_gradients_to_the_generator_only():
    algorithm = make()
    actions = algorithm.generate(BATCH.observations, torch.randn(2, 2))
    algorithm.minimize("policy", algorithm.generator_loss(actions, BATCH.observations)[0])
    assert all(p.grad is not None for p in algorithm.policy.parameters())
    for module in (algorithm.critic, algorithm.behavior, algorithm.fake, algorithm.target_q):
        assert all(p.grad is None for p in module.parameters())


def test_the_fake_score_learns_as_fast_as_the_diffusion_model():
    specs = make(learning_rate=1e-3, policy_learning_rate=1e-4, cosine_decay=True).optimizer_specs()
    rates = {name: (spec.learning_rate, spec.cosine) for name, spec in specs.items()}
    assert rates == {"critic": (3e-4, True), "behavior": (1e-3, True), "policy": (1e-4, True), "fake": (1e-3, True)}


def test_the_fake_score_learns_from_the_generated_actions(monkeypatch: pytest.MonkeyPatch):
    algorithm = make()
    seen = {}
    loss = algorithm.diffusion_loss

    def watched(model: nn.Module, actions: Tensor, observations: Tensor) -> Tensor:
        seen["fake" if model is algorithm.fake else "behavior"] = actions
        return loss(model, actions, observations)

    draws = []
    normal = algorithm.noise.normal
    monkeypatch.setattr(algorithm.noise, "normal", lambda *shape: draws.append(normal(*shape)) or draws[-1])
    monkeypatch.setattr(algorithm, "diffusion_loss", watched)
    policy = make().policy  # as it was before the update
    algorithm.update(BATCH)
    assert torch.equal(seen["behavior"], BATCH.actions)
    assert not seen["fake"].requires_grad
    sigma = torch.full((2,), 2.5)
    torch.testing.assert_close(seen["fake"], policy(2.5 * draws[1], sigma, BATCH.observations).detach())


@pytest.mark.parametrize("sigma_data", [0.5, 0.03125])
def test_the_preconditioned_generator_begins_as_the_one_step_denoiser_of_the_behavior(sigma_data: float):
    algorithm = make(sigma_data=sigma_data)
    for _ in range(3):
        algorithm.pretrain_update(BATCH)
    observations, z = torch.randn(50, 3), torch.randn(50, 2)
    sigma = torch.full((50,), 5 * sigma_data)  # the authors' 2.5 where sigma_data is theirs
    denoised = algorithm.behavior(5 * sigma_data * z, sigma, observations)
    assert not torch.allclose(algorithm.generate(observations, z).clamp(-1, 1), denoised, atol=0.01)
    algorithm.phases()[-1].begin()
    torch.testing.assert_close(algorithm.generate(observations, z).clamp(-1, 1), denoised)
    torch.testing.assert_close(algorithm.fake(5 * sigma_data * z, sigma, observations).clamp(-1, 1), denoised)
    algorithm.update(BATCH)  # copies: each goes its own way
    assert not torch.equal(algorithm.policy.network.mix.weight, algorithm.behavior.network.mix.weight)
    assert not torch.equal(algorithm.fake.network.mix.weight, algorithm.behavior.network.mix.weight)


def test_the_copy_can_be_left_out():
    algorithm = make(copy_behavior=False)
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    algorithm.begin_main()
    assert all(torch.equal(value, before[name]) for name, value in algorithm.state_dict().items())


@pytest.mark.parametrize(("sigma_data", "unit"), [(0.5, 1.0), (0.25, 0.5)])
def test_the_raw_generator_is_the_output_of_its_network(sigma_data: float, unit: float):
    algorithm = make(generator="raw", sigma_data=sigma_data)
    observations, z = torch.randn(50, 3), torch.randn(50, 2)
    expected = unit * algorithm.policy.network(2.5 * z, torch.full((50,), 2.5), observations)
    torch.testing.assert_close(algorithm.generate(observations, z), expected)


def test_candidates_are_those_of_the_generator_inside_the_box():
    algorithm = make(generator="raw")
    with torch.no_grad():
        algorithm.policy.network.layers[-1].weight.mul_(20)
    observations, noise = torch.randn(4, 3), torch.randn(4, 5, 2)
    candidates = algorithm.propose(observations, noise)
    for i in range(4):
        alone = algorithm.generate(observations[i].expand(5, 3), noise[i])
        torch.testing.assert_close(candidates[i], alone.clamp(-1, 1))
    assert candidates.abs().max() == 1


# ---------------------------------------------------------------- the options


def test_there_is_no_likelihood_to_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(TypeError, match="nll_weight"):
        DTQLKL(3, 2, nll_weight=0.1)
    words = [word for word in tiny_words(tmp_path) if "nll_weight" not in word]
    words += ["--model=DTQLKL", "--data.dataset=bandit/25gaussians-far", "--bandit.samples=50"]
    assert main([*words, "--model.init_args.nll_weight=0.1"]) == 2
    assert "no option 'model.init_args.nll_weight'" in capsys.readouterr().err
    assert main([*words, "--bandit.figures=false"]) == 0
    folder = tmp_path / "dtqlkl" / "bandit/25gaussians-far" / "seed_0"
    assert json.loads((folder / "results.json").read_text())["bandit"]["mean_label"] > 0
    loaded = DTQLKL.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert loaded.act(torch.zeros(3, 1)).shape == (3, 2)
