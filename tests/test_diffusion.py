import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lit_offrl.diffusion.denoisers import EDMDenoiser, as_denoiser
from lit_offrl.diffusion.samplers import sample_heun
from lit_offrl.diffusion.schedules import LogLogisticNoise, edm_levels, karras_sigmas


class Constant(nn.Module):
    """A network F that returns a constant and records what it was given."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        self.seen = (x, noise, condition)
        return torch.full_like(x, self.value)


def test_preconditioning_by_hand():
    network = Constant(0.25)
    denoiser = EDMDenoiser(network, sigma_data=0.5, clip=None)
    sigma, x = torch.tensor([1.2]), torch.tensor([[0.7]])
    denoised = denoiser(x, sigma, torch.zeros(1, 3))
    variance = 1.2**2 + 0.5**2
    c_skip, c_out, c_in = 0.25 / variance, 1.2 * 0.5 / math.sqrt(variance), 1 / math.sqrt(variance)
    assert denoised.item() == pytest.approx(c_skip * 0.7 + c_out * 0.25, rel=1e-6)
    assert network.seen[0].item() == pytest.approx(c_in * 0.7, rel=1e-6)
    assert network.seen[1].item() == pytest.approx(math.log(1.2) / 4, rel=1e-6)


def test_loss_by_hand_is_a_mean_over_batch_and_dimensions_of_the_weighted_error():
    denoiser = EDMDenoiser(Constant(0.0), clip=None)
    x = torch.tensor([[0.4, -0.2], [0.1, 0.9]])
    noise = torch.tensor([[1.0, -0.5], [0.3, 0.2]])
    sigma = torch.tensor([0.3, 2.0])
    expected = 0.0
    for i in range(2):
        variance = sigma[i].item() ** 2 + 0.25
        c_skip, c_out = 0.25 / variance, sigma[i].item() * 0.5 / math.sqrt(variance)
        for j in range(2):
            denoised = c_skip * (x[i, j].item() + sigma[i].item() * noise[i, j].item())
            expected += ((denoised - x[i, j].item()) / c_out) ** 2 / 4
    assert denoiser.loss(x, sigma, noise, torch.zeros(2, 1)).item() == pytest.approx(expected, rel=1e-5)


def test_clamping_acts_in_the_loss_and_stops_the_gradient_of_the_network():
    network = nn.Linear(1, 1)
    nn.init.constant_(network.bias, 100.0)
    denoiser = EDMDenoiser(_Ignoring(network), clip=1.0)
    x = torch.zeros(4, 1, requires_grad=True)
    sigma = torch.ones(4)
    loss = denoiser.loss(x, sigma, torch.zeros(4, 1), torch.zeros(4, 1))
    c_out = 0.5 / math.sqrt(1.25)
    assert loss.item() == pytest.approx(1 / c_out**2, rel=1e-5)  # D clamped to 1, x = 0
    weight_gradient, x_gradient = torch.autograd.grad(loss, [network.bias, x], allow_unused=True)
    assert weight_gradient.item() == 0
    assert x_gradient.abs().min() > 0  # the path through the target stays open


class _Ignoring(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        return self.network(x)


def test_noise_levels_follow_the_truncated_log_logistic():
    levels = LogLogisticNoise()

    def cdf(sigma: float) -> float:
        return 1 / (1 + math.exp(-(math.log(sigma) - math.log(0.5)) / 0.5))

    low, high = cdf(0.002), cdf(80)
    u = torch.tensor([0.0, 0.05, 0.5, 0.95, 1 - 1e-9])
    sigma = levels.quantile(u)
    for quantile, value in zip(u.tolist(), sigma.tolist(), strict=True):
        assert cdf(value) == pytest.approx(low + (high - low) * quantile, abs=1e-6)
    assert sigma[1].item() == pytest.approx(0.115, abs=1e-3)  # the 5% and 95% quantiles of the fact sheet
    assert sigma[3].item() == pytest.approx(2.18, abs=1e-2)
    assert levels.quantile(torch.zeros(1)).item() == pytest.approx(0.002, rel=1e-5)
    assert sigma.dtype == torch.float32


def test_karras_levels():
    sigmas = karras_sigmas(5)
    assert sigmas[0].item() == pytest.approx(80, rel=1e-5)
    assert sigmas[-2].item() == pytest.approx(0.002, rel=1e-5)
    assert sigmas[-1].item() == 0
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert sigmas[2].item() == pytest.approx(middle, rel=1e-5)


def test_heun_is_of_second_order_on_a_gaussian():
    # For data N(m, s^2) the ideal denoiser is known and the probability flow maps x_T to
    # m + (x_T - m) sqrt(s^2 / (s^2 + sigma_T^2)).
    mean, std = 0.3, 0.5

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        variance = sigma[:, None] ** 2
        return (std**2 * x + variance * mean) / (std**2 + variance)

    x = torch.tensor([[2.0], [-1.5]], dtype=torch.float64)
    exact = mean + (x - mean) * math.sqrt(std**2 / (std**2 + 1.0))
    steps = [8, 16, 32, 64]
    errors = []
    for n in steps:
        # equal steps in log sigma; the last level is small but not 0, and its own contribution is solved exactly
        sigmas = torch.logspace(0, -2, n + 1, dtype=torch.float64)
        end = mean + (x - mean) * math.sqrt((std**2 + 1e-4) / (std**2 + 1.0))
        errors.append((sample_heun(as_denoiser(denoise, "x0"), x, edm_levels(sigmas)) - end).abs().max().item())
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(2, abs=0.15)
    sigmas = torch.cat([torch.logspace(0, -3, 65, dtype=torch.float64), torch.zeros(1)])
    final = sample_heun(as_denoiser(denoise, "x0"), x, edm_levels(sigmas))
    torch.testing.assert_close(final, exact, atol=1e-3, rtol=0)
