"""Noise schedules against their differential equations, Bayes' rule and the numbers of the papers' codes."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from lit_offrl.diffusion.schedules import (
    VPSDE,
    DiscreteVP,
    edm_levels,
    karras_sigmas,
    posterior_coefficients,
)

TIMES = torch.logspace(-5, 0, 101, dtype=torch.float64)
# bdpo.md, section 2, N = 5: beta, alpha_bar, posterior variance, c_x0, c_xn, weight of the KL; printed to 4-6 digits
BDPO = {
    1: (0.195875, 0.804125, 0, 1, 0, 0.6218),
    2: (0.458818, 0.435178, 0.159114, 0.72844, 0.25512, 0.7505),
    3: (0.635781, 0.158500, 0.426742, 0.49841, 0.40508, 1.0372),
    4: (0.754878, 0.038852, 0.660907, 0.31268, 0.43347, 1.6020),
    5: (0.835031, 0.006409, 0.807766, 0.16565, 0.39290, 2.5472),
}


# ---------------------------------------------------------------- VP-SDE


def test_variance_is_preserved():
    sde = VPSDE()
    one = sde.alpha(TIMES) ** 2 + sde.sigma(TIMES) ** 2
    torch.testing.assert_close(one, torch.ones_like(one), rtol=0, atol=1e-15)  # float64 rounding


def test_values_of_the_authors_schedule():
    sde = VPSDE()
    start, end = torch.tensor([1e-3, 1.0], dtype=torch.float64)
    assert sde.alpha(start).item() == pytest.approx(0.99995, abs=1e-5)  # eda.md, section 2, to its digits
    assert sde.sigma(start).item() == pytest.approx(1.05e-2, abs=5e-5)
    assert sde.alpha(end).item() == pytest.approx(6.6e-3, abs=5e-5)
    assert sde.alpha(end).item() == pytest.approx(math.exp(-19.9 / 4 - 0.05), rel=1e-15)


def test_single_precision_is_enough_near_zero():
    sde, times = VPSDE(), TIMES.float()
    exact = VPSDE().sigma(times.double())
    error = (sde.sigma(times) / exact - 1).abs().max().item()
    assert error < 1e-6  # a few roundings of 6e-8, amplified by at most 2 |ln alpha| = 10 at t = 1
    cancelled = (1 - sde.alpha(times) ** 2).double() / exact.square()
    assert (cancelled[0] - 1).abs().item() > 0.02  # what expm1 avoids


# ---------------------------------------------------------------- nodes of samplers


def test_nodes_uniform_in_time_are_those_of_eda():
    levels = VPSDE().levels(15)
    times = [level.time for level in levels]
    assert times[0] == 1
    assert times[-1] == pytest.approx(1e-3, rel=1e-14)
    assert times[1] == pytest.approx(0.9334, abs=1e-10)  # 1 - 0.999 / 15
    assert times[14] == pytest.approx(0.0676, abs=1e-10)
    assert all(a - b == pytest.approx(0.0666, rel=1e-12) for a, b in pairwise(times))


def test_edm_levels_end_clean():
    levels = edm_levels(karras_sigmas(4))
    assert levels[0].half_log_snr == pytest.approx(-math.log(80), rel=1e-6)
    assert levels[-1] == (0, 1, 0, math.inf)


# ---------------------------------------------------------------- discrete chain


def test_discrete_chain_is_the_table_of_bdpo():
    chain = DiscreteVP()
    bar = chain.alphas**2
    weight = chain.betas / (2 * (1 - chain.betas) * (1 - bar))
    above, below = (chain.alphas[1:], chain.sigmas[1:]), (chain.alphas[:-1], chain.sigmas[:-1])
    variances = torch.cat([torch.zeros(1), posterior_coefficients(*above, *below)[2]])
    columns = (chain.betas, bar, variances, chain.posterior_clean, chain.posterior_noisy, weight)
    for n, row in BDPO.items():
        for column, printed in zip(columns, row, strict=True):
            assert column[n].item() == pytest.approx(printed, abs=1e-4 if column is weight else 1e-5)
    long = DiscreteVP(50)
    assert [long.betas[n].item() for n in (1, 50)] == pytest.approx([0.00397, 0.1796], rel=2e-3)
    assert long.alphas[50].item() ** 2 == pytest.approx(0.0064, rel=2e-3)


@pytest.mark.parametrize("steps", [1, 5, 50, 1000])
def test_signal_is_the_product_of_the_steps(steps: int):
    chain = DiscreteVP(steps)
    bars = torch.cumprod(1 - chain.betas.double(), 0)
    torch.testing.assert_close(chain.alphas.double() ** 2, bars, rtol=1e-5, atol=0)  # float32 tables, 1000 factors
    assert chain.alphas[0] == 1
    assert chain.sigmas[0] == 0
    assert chain.betas[0] == 0


def test_discrete_chain_samples_the_continuous_schedule():
    chain, sde = DiscreteVP(20), VPSDE(beta_max=10.0)
    times = torch.arange(21, dtype=torch.float64) / 20
    torch.testing.assert_close(chain.alphas, sde.alpha(times).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(chain.sigmas, sde.sigma(times).float(), rtol=1e-6, atol=0)


def test_posterior_follows_from_bayes_rule():
    # prior x_{n-1} | x_0 = N(alpha_{n-1} x_0, sigma_{n-1}^2)
    # likelihood x_n | x_{n-1} = N(sqrt(1 - beta) x_{n-1}, beta)
    chain = DiscreteVP(7)
    n = torch.arange(2, 8)
    beta, prior = chain.betas[n].double(), chain.sigmas[n - 1].double() ** 2
    variance = 1 / (1 / prior + (1 - beta) / beta)
    clean = variance * chain.alphas[n - 1].double() / prior
    noisy = variance * (1 - beta).sqrt() / beta
    exact = {"rtol": 1e-5, "atol": 0.0, "check_dtype": False}  # float32 tables
    tables = chain.alphas[n], chain.sigmas[n], chain.alphas[n - 1], chain.sigmas[n - 1]
    torch.testing.assert_close(posterior_coefficients(*tables)[2], variance, **exact)
    torch.testing.assert_close(chain.posterior_clean[n], clean, **exact)
    torch.testing.assert_close(chain.posterior_noisy[n], noisy, **exact)
    x0, x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    mean = clean[:, None] * x0 + noisy[:, None] * x
    torch.testing.assert_close(chain.posterior_mean(x0, x, n), mean.float(), rtol=1e-5, atol=1e-6)


def test_the_last_step_returns_the_clean_value():
    assert posterior_coefficients(0.8, 0.6, 1.0, 0.0) == (pytest.approx(1, rel=1e-15), 0, 0)
    chain = DiscreteVP()
    x0, x = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(chain.posterior_mean(x0, x, torch.ones(4, dtype=torch.long)), x0)


def test_levels_of_the_chain_are_its_tables_backwards():
    chain = DiscreteVP(6)
    levels = chain.levels()
    assert [level.time for level in levels] == [6, 5, 4, 3, 2, 1, 0]
    assert all(isinstance(level.time, int) for level in levels)
    assert [level.alpha for level in levels] == pytest.approx(chain.alphas.flip(0).tolist(), rel=1e-7)
    assert [level.sigma for level in levels] == pytest.approx(chain.sigmas.flip(0).tolist(), rel=1e-7)


def test_the_chain_moves_with_its_module_and_is_not_in_checkpoints():
    chain = DiscreteVP().double()
    assert chain.alphas.dtype == chain.posterior_clean.dtype == torch.float64
    assert DiscreteVP().to("meta").betas.is_meta
    assert DiscreteVP().state_dict() == {}


# ---------------------------------------------------------------- transforms


def test_schedules_compile_in_one_graph_and_vectorize():
    sde, chain = VPSDE(), DiscreteVP()

    def everything(t: Tensor, n: Tensor, x: Tensor) -> Tensor:
        continuous = sde.alpha(t) + sde.sigma(t)
        discrete = chain.alpha(n) + chain.sigma(n) + chain.betas[n]
        return (continuous + discrete)[:, None] + chain.posterior_mean(x, 2 * x, n)

    t, n = torch.linspace(0.1, 1, 5), torch.arange(1, 6)
    x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    eager = everything(t, n, x[0])
    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(t, n, x[0]), eager)
    stacked = vmap(everything, in_dims=(None, None, 0))(t, n, x)
    torch.testing.assert_close(stacked, torch.stack([everything(t, n, row) for row in x]))
