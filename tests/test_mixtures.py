"""The oracle itself, against numerical quadrature, autograd, Monte Carlo and torch.distributions."""

import math

import pytest
import torch
from mixtures import (
    ComponentQ,
    GaussianMixture,
    eight_gaussians,
    intermediate_energy,
    twenty_five_gaussians,
)
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.func import grad, hessian, vmap

from lit_offrl.diffusion.denoisers import x0_from_score
from lit_offrl.diffusion.schedules import VPSDE

BETA = 1.7
LEVELS = [(0.95, 0.312), (0.6, 0.8), (0.0066, 0.99998), (1.0, 2.5)]  # variance preserving, nearly pure noise, and EDM


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# three components in the plane with unequal weights and one variance per axis
MIXTURE = GaussianMixture(
    tensor([0.5, 0.3, 0.2]).log(),
    tensor([[1.0, 0.5], [-1.0, 0.3], [0.2, -1.0]]),
    tensor([[0.25, 0.16], [0.09, 0.25], [0.16, 0.16]]),
)
CONSTANT = ComponentQ(constant=tensor([0.0, 0.5, 1.0]))
LINEAR = ComponentQ(constant=tensor([0.1, 0.0, -0.2]), slope=tensor([[1.0, -0.5]]))
QUADRATIC = ComponentQ(
    constant=tensor([0.3, 0.0, -0.4]),
    slope=tensor([[0.5, -1.0], [0.2, 0.0], [-0.7, 0.4]]),
    curvature=tensor([[-1.0, 0.5], [-2.0, -0.3], [0.8, -4.0]]),
)
POINTS = tensor([[0.0, 0.0], [1.2, -0.4], [-2.0, 1.5], [0.3, 0.9]])


class Quadrature:
    """Expectations under q(x_0, k | x_t) by the trapezoid rule, which is spectrally accurate on Gaussians."""

    def __init__(self, alpha: float, sigma: float) -> None:
        line = torch.linspace(-6, 6, 241, dtype=torch.float64)
        self.x0 = torch.cartesian_prod(line, line)
        cell = (line[1] - line[0]) ** 2
        normal = Independent(Normal(MIXTURE.means, MIXTURE.variances.sqrt()), 1)
        prior = MIXTURE.log_weights.exp() * normal.log_prob(self.x0[:, None]).exp() * cell  # [grid, components]
        likelihood = Independent(Normal(alpha * self.x0, sigma), 1).log_prob(POINTS[:, None]).exp()  # [points, grid]
        self.joint = likelihood[..., None] * prior
        self.density = self.joint.sum((1, 2))

    def expectation(self, values: Tensor) -> Tensor:
        """Average `values`, `[grid, components]` or `[grid, 1]`, over the posterior of every point."""
        return (self.joint * values).sum((1, 2)) / self.density


@pytest.fixture(scope="module", params=LEVELS, ids=str)
def level(request: pytest.FixtureRequest) -> tuple[float, float, Quadrature]:
    alpha, sigma = request.param
    return alpha, sigma, Quadrature(alpha, sigma)


# ---------------------------------------------------------------- density and posterior


def test_log_density_is_that_of_torch_distributions():
    reference = MixtureSameFamily(
        Categorical(logits=MIXTURE.log_weights), Independent(Normal(MIXTURE.means, MIXTURE.variances.sqrt()), 1)
    )
    torch.testing.assert_close(MIXTURE.log_density(POINTS), reference.log_prob(POINTS), rtol=1e-12, atol=0)
    torch.testing.assert_close(MIXTURE.mean(), reference.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(MIXTURE.covariance().diag(), reference.variance, rtol=1e-12, atol=0)


def test_diffusion_and_posterior_agree_with_quadrature(level):
    # 1e-9: the grid ends 10 standard deviations out and resolves each by 6 nodes; what is left is rounding
    alpha, sigma, quadrature = level
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(MIXTURE.diffused(alpha, sigma).log_density(POINTS).exp(), quadrature.density, **close)
    posterior = MIXTURE.posterior(POINTS, alpha, sigma)
    weights = quadrature.joint.sum(1) / quadrature.density[:, None]
    torch.testing.assert_close(posterior.log_weights.exp(), weights, **close)
    x0 = quadrature.x0
    mean = torch.stack([quadrature.expectation(x0[:, [i]]) for i in range(2)], -1)
    torch.testing.assert_close(posterior.mean(), mean, **close)
    for i in range(2):
        for j in range(2):
            moment = quadrature.expectation((x0[:, i] * x0[:, j])[:, None])
            torch.testing.assert_close(posterior.covariance()[:, i, j], moment - mean[:, i] * mean[:, j], **close)


def test_score_is_the_gradient_of_the_log_density(level):
    alpha, sigma, _ = level
    diffused = MIXTURE.diffused(alpha, sigma)
    torch.testing.assert_close(diffused.score(POINTS), vmap(grad(diffused.log_density))(POINTS), rtol=1e-10, atol=1e-12)


def test_posterior_moments_obey_tweedie(level):
    # E[x_0 | x] = (x + sigma^2 score) / alpha, Cov[x_0 | x] = sigma^2 / alpha^2 (1 + sigma^2 Hessian of ln q)
    alpha, sigma, _ = level
    diffused, posterior = MIXTURE.diffused(alpha, sigma), MIXTURE.posterior(POINTS, alpha, sigma)
    blow_up = (sigma / alpha) ** 2 * 1e-13  # both right-hand sides cancel before they are divided by alpha^2
    tweedie = x0_from_score(POINTS, diffused.score(POINTS), alpha, sigma)
    torch.testing.assert_close(posterior.mean(), tweedie, rtol=1e-10, atol=blow_up)
    curvature = vmap(hessian(diffused.log_density))(POINTS)
    covariance = (sigma / alpha) ** 2 * (torch.eye(2) + sigma**2 * curvature)
    torch.testing.assert_close(posterior.covariance(), covariance, rtol=1e-10, atol=blow_up)


def test_levels_may_differ_between_rows():
    alpha, sigma = tensor([level[0] for level in LEVELS]), tensor([level[1] for level in LEVELS])
    together = MIXTURE.posterior(POINTS, alpha, sigma)
    energy = intermediate_energy(MIXTURE, QUADRATIC, BETA, POINTS, alpha, sigma)[0]
    for i, (a, s) in enumerate(LEVELS):
        row = POINTS[i : i + 1]
        torch.testing.assert_close(together.mean()[i : i + 1], MIXTURE.posterior(row, a, s).mean())
        torch.testing.assert_close(energy[i : i + 1], intermediate_energy(MIXTURE, QUADRATIC, BETA, row, a, s)[0])


# ---------------------------------------------------------------- intermediate energy


@pytest.mark.parametrize("q", [CONSTANT, LINEAR, QUADRATIC], ids=["constant", "linear", "quadratic"])
def test_intermediate_energy_agrees_with_quadrature(level, q: ComponentQ):
    alpha, sigma, quadrature = level
    value, _ = intermediate_energy(MIXTURE, q, BETA, POINTS, alpha, sigma)
    expected = quadrature.expectation((BETA * q(quadrature.x0)).exp()).log()
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8)  # as above; exp(beta Q) reaches further out


@pytest.mark.parametrize("q", [CONSTANT, LINEAR, QUADRATIC], ids=["constant", "linear", "quadratic"])
def test_gradient_of_the_intermediate_energy_is_that_of_autograd(level, q: ComponentQ):
    alpha, sigma, _ = level
    _, gradient = intermediate_energy(MIXTURE, q, BETA, POINTS, alpha, sigma)
    expected = vmap(grad(lambda x: intermediate_energy(MIXTURE, q, BETA, x, alpha, sigma)[0]))(POINTS)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_posterior_and_tilting_give_the_same_energy(level):
    # the other way round: tilt the posterior of every point, rather than diffuse the tilted mixture
    alpha, sigma, _ = level
    value, _ = intermediate_energy(MIXTURE, QUADRATIC, BETA, POINTS, alpha, sigma)
    _, log_expectation = MIXTURE.posterior(POINTS, alpha, sigma).tilted(QUADRATIC, BETA)
    torch.testing.assert_close(value, log_expectation, rtol=1e-9, atol=1e-11)


def test_constant_q_is_a_sum_over_responsibilities(level):
    alpha, sigma, _ = level
    value, _ = intermediate_energy(MIXTURE, CONSTANT, BETA, POINTS, alpha, sigma)
    log_r = MIXTURE.diffused(alpha, sigma).responsibilities(POINTS).log()
    torch.testing.assert_close(value, (log_r + BETA * CONSTANT.constant).logsumexp(-1), rtol=1e-10, atol=1e-12)


def test_linear_q_of_one_gaussian_is_known_exactly():
    # aepo.md, section 7: f = beta Q(E[x_0 | x]) + beta^2 v |g|^2 / 2 with a variance v that does not depend on x
    gaussian, g = GaussianMixture.isotropic(tensor([[0.4, -0.7]]), 0.3), tensor([0.8, -1.1])
    alpha, sigma = 0.6, 0.8
    value, gradient = intermediate_energy(gaussian, ComponentQ(slope=g), 3.0, POINTS, alpha, sigma)
    posterior = gaussian.posterior(POINTS, alpha, sigma)
    variance = posterior.covariance()[0, 0, 0]
    torch.testing.assert_close(value, 3 * posterior.mean() @ g + 4.5 * variance * g.square().sum(), rtol=1e-10, atol=0)
    rate = alpha * 0.09 / (alpha**2 * 0.09 + sigma**2)  # d E[x_0 | x] / dx
    torch.testing.assert_close(gradient, (3 * rate * g).expand_as(gradient), rtol=1e-10, atol=0)


def test_monte_carlo_agrees_on_the_energy():
    # x_0 drawn from the closed posterior would be circular: draw from q(x_0) and weight by q(x | x_0)
    alpha, sigma = 0.6, 0.8
    x0, component = MIXTURE.sample(200_000, torch.Generator().manual_seed(0))
    q = QUADRATIC(x0).gather(1, component[:, None])[:, 0]
    likelihood = Independent(Normal(alpha * x0, sigma), 1).log_prob(POINTS[:, None]).exp()
    weight = likelihood / likelihood.sum(1, keepdim=True)
    ratio = (weight * (BETA * q).exp()).sum(1)
    error = (weight**2 * ((BETA * q).exp() - ratio[:, None]) ** 2).sum(1).sqrt()
    value, _ = intermediate_energy(MIXTURE, QUADRATIC, BETA, POINTS, alpha, sigma)
    assert ((value.exp() - ratio).abs() < 5 * error).all()  # five standard errors of the ratio estimator
    assert (error / ratio < 0.05).all()  # so that the line above says something


def test_an_infinite_expectation_is_refused():
    with pytest.raises(ValueError, match="infinite"):
        MIXTURE.tilted(ComponentQ(curvature=tensor([[4.0]])), beta=1.0)  # 1 / variance is 4 on the widest axis


# ---------------------------------------------------------------- sampling and the papers' sets


def test_samples_have_the_moments_of_the_mixture():
    count = 100_000
    x, component = MIXTURE.sample(count, torch.Generator().manual_seed(0))
    masses = component.bincount().double() / count
    assert (masses - MIXTURE.log_weights.exp()).abs().max() < 5 * math.sqrt(0.25 / count)  # five standard errors
    assert (x.mean(0) - MIXTURE.mean()).abs().max() < 5 * math.sqrt(1 / count)
    assert (x.T.cov() - MIXTURE.covariance()).abs().max() < 5 * math.sqrt(2 / count)  # every variance is below 1


def test_samples_repeat_with_their_generator():
    first, second = (MIXTURE.sample(5, torch.Generator().manual_seed(3))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_eight_gaussians_have_the_constants_of_the_papers():
    mixture, q = eight_gaussians()
    torch.testing.assert_close(mixture.means[0], tensor([0, 4 / 1.414]), rtol=0, atol=1e-15)  # up
    torch.testing.assert_close(mixture.means[2], tensor([-4 / 1.414, 0]), rtol=0, atol=1e-15)  # left
    torch.testing.assert_close(mixture.means[7], tensor([2, 2]) * math.sqrt(2) / 1.414, rtol=1e-15, atol=0)
    assert mixture.means.norm(dim=1).tolist() == pytest.approx([2.829] * 8, abs=1e-3)
    assert mixture.variances.sqrt().flatten().tolist() == pytest.approx([0.3536] * 8, abs=1e-4)
    assert q.constant.tolist() == pytest.approx([k / 7 for k in range(8)])


@pytest.mark.parametrize(("beta", "mass", "mean"), [(3, 0.3602, 0.7713), (10, 0.7604, 0.9550), (16.67, 0.9076, 0.9855)])
def test_tilted_eight_gaussians_have_the_masses_of_the_fact_sheet(beta: float, mass: float, mean: float):
    mixture, q = eight_gaussians()
    target, log_normalizer = mixture.tilted(q, beta)
    weights = target.log_weights.exp()
    assert weights[7].item() == pytest.approx(mass, abs=5e-5)
    assert (weights * q.constant).sum().item() == pytest.approx(mean, abs=5e-5)
    assert log_normalizer.item() == pytest.approx((beta * q.constant).exp().mean().log().item(), rel=1e-12)
    torch.testing.assert_close(target.means, mixture.means)


def test_twenty_five_gaussians():
    mixture = twenty_five_gaussians()
    assert mixture.means.unique(dim=0).shape == (25, 2)
    assert mixture.means.abs().unique().tolist() == [0, 5, 10]
    assert mixture.covariance()[0, 0].item() == pytest.approx(50 + 0.09, rel=1e-12)


# ---------------------------------------------------------------- transforms


def test_oracle_compiles_in_one_graph_and_vectorizes():
    sde = VPSDE()

    def energy(x: Tensor, time: Tensor) -> Tensor:
        posterior = MIXTURE.posterior(x, sde.alpha(time), sde.sigma(time))
        return posterior.mean() + posterior.covariance().diagonal(dim1=-2, dim2=-1)

    times = tensor([0.1, 0.4, 0.7, 1.0])
    compiled = torch.compile(energy, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(POINTS, times), energy(POINTS, times))
    torch.testing.assert_close(vmap(energy)(POINTS, times), energy(POINTS, times))
