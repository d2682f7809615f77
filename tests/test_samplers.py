"""Samplers driven by the exact denoiser of a mixture, and against a second implementation, `diffusers`.

`pytest tests/test_samplers.py -rP -k order` prints the measured orders of convergence.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from mixtures import GaussianMixture, eight_gaussians, intermediate_energy
from torch import Tensor, nn
from torch.func import grad, vmap

from lit_offrl.diffusion.denoisers import (
    Denoise,
    EDMDenoiser,
    as_denoiser,
    diffuse,
    epsilon_from_score,
    x0_from_epsilon,
    x0_from_score,
)
from lit_offrl.diffusion.samplers import (
    sample_ddim,
    sample_ddpm,
    sample_dpm_singlestep,
    sample_heun,
)
from lit_offrl.diffusion.schedules import (
    VPSDE,
    DiscreteVP,
    Level,
    Levels,
    edm_levels,
    karras_sigmas,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, numpy 2

SDE = VPSDE()
TRIO = GaussianMixture.isotropic(
    torch.tensor([[1.0, 0.5], [-1.0, 0.3], [0.2, -1.0]], dtype=torch.float64),
    0.5,
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
)


def exact(mixture: GaussianMixture) -> Denoise:
    """The ideal denoiser E[x_0 | x_t] of a mixture."""
    return lambda x, level: mixture.posterior(x, level.alpha, level.sigma).mean()


def log_snr_levels(steps: int) -> Levels:
    """Levels from t = 1 to 1e-3, uniform in lambda; the exact denoiser needs no time."""
    first, last = (level.half_log_snr for level in SDE.levels(1))
    nodes = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    scales = zip((2 * nodes).sigmoid().sqrt().tolist(), (-2 * nodes).sigmoid().sqrt().tolist(), strict=True)
    return tuple(Level(math.nan, *each, node) for each, node in zip(scales, nodes.tolist(), strict=True))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Recorder:
    """A denoiser that notes the times of its calls."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise
        self.times: list[float] = []

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        self.times.append(level.time)
        return self.denoise(x, level)


# every sampler as a function of (denoise, x, levels), on levels that suit it
CHAIN_NOISE = normal(12, 6, 2, seed=7)
SAMPLERS = {
    "ddpm": partial(sample_ddpm, noise=CHAIN_NOISE),
    "ddim": sample_ddim,
    "heun": sample_heun,
    "singlestep": sample_dpm_singlestep,
}
every_sampler = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)


# ---------------------------------------------------------------- parametrizations


def test_parametrizations_convert_into_each_other():
    # rounding of x0 is divided by alpha down to 6.6e-3, of the score by sigma^2 down to 1e-4: up to 4 digits are lost
    x0, epsilon = normal(9, 3), normal(9, 3, seed=1)
    time = torch.logspace(-3, 0, 9, dtype=torch.float64)
    alpha, sigma = SDE.alpha(time)[:, None], SDE.sigma(time)[:, None]
    x = diffuse(x0, epsilon, alpha, sigma)
    score = -(x - alpha * x0) / (1 - alpha**2)  # grad ln N(x; alpha x0, sigma^2)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(x0_from_epsilon(x, epsilon, alpha, sigma), x0, **close)
    torch.testing.assert_close(epsilon_from_score(score, sigma), epsilon, **close)
    torch.testing.assert_close(x0_from_score(x, score, alpha, sigma), x0, **close)


@pytest.mark.parametrize("schedule", [SDE, DiscreteVP(12).double()], ids=["continuous", "discrete"])
def test_a_model_of_any_prediction_becomes_the_same_denoiser(schedule: VPSDE | DiscreteVP):
    def clean(x: Tensor, time: Tensor) -> Tensor:
        return TRIO.posterior(x, schedule.alpha(time), schedule.sigma(time)).mean()

    def score(x: Tensor, time: Tensor) -> Tensor:
        return TRIO.diffused(schedule.alpha(time), schedule.sigma(time)).score(x)

    def epsilon(x: Tensor, time: Tensor) -> Tensor:
        return epsilon_from_score(score(x, time), schedule.sigma(time)[:, None])

    x = normal(3, 2)
    for level in (schedule.levels() if isinstance(schedule, DiscreteVP) else schedule.levels(12))[:-1]:
        mean = exact(TRIO)(x, level)
        for model, predicts in ((clean, "x0"), (score, "score"), (epsilon, "epsilon")):
            denoised = as_denoiser(model, predicts)(x, level)
            torch.testing.assert_close(denoised, mean, rtol=0, atol=2e-6)  # float32 tables over alpha down to 0.08


# ---------------------------------------------------------------- order of convergence


Solver = Callable[[Denoise, Tensor, int], Tensor]
SOLVERS: dict[str, tuple[float, Solver]] = {
    "ddim": (1, lambda d, x, n: sample_ddim(d, x, log_snr_levels(n))),
    "ddim in time": (1, lambda d, x, n: sample_ddim(d, x, SDE.levels(n))),
    "heun": (2, lambda d, x, n: sample_heun(d, x, log_snr_levels(n))),
    "heun in time": (2, lambda d, x, n: sample_heun(d, x, SDE.levels(n))),
    "singlestep": (2, lambda d, x, n: sample_dpm_singlestep(d, x, log_snr_levels(n))),
}


@pytest.fixture(scope="module")
def flow() -> tuple[Denoise, Tensor, Tensor]:
    """The exact denoiser, noise, and where the flow takes it, by many evaluations of order 2."""
    denoise, x = exact(TRIO), normal(32, 2)
    return denoise, x, sample_heun(denoise, x, log_snr_levels(3000))


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(flow: tuple[Denoise, Tensor, Tensor], name: str):
    # The slope of ln error against ln evaluations approaches the order from either side; the next term of the error
    # is a factor 1 + O(1/n), at these n within 0.2 of the slope for all solvers.
    denoise, x, end = flow
    order, solver = SOLVERS[name]
    counts = [48, 96, 192]
    errors = [(solver(denoise, x, n) - end).square().mean().sqrt().item() for n in counts]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    print(name, "errors", *(f"{e:.1e}" for e in errors), "slopes", *(f"{s:.2f}" for s in slopes))
    assert slopes[-1] == pytest.approx(order, abs=0.2)


def test_higher_orders_are_worth_their_name(flow: tuple[Denoise, Tensor, Tensor]):
    denoise, x, end = flow
    first, second = (
        (sample(denoise, x, SDE.levels(15)) - end).square().mean().sqrt().item()
        for sample in (sample_ddim, sample_dpm_singlestep)
    )
    print("15 evaluations uniform in time: errors", first, second)
    assert second < first * 2 / 3  # EDA's sampler and DDIM at EDA's number of steps


def test_one_gaussian_is_transported_exactly():
    # the flow of N(m, s^2) is linear: x - alpha m scales with the marginal std (alpha^2 s^2 + sigma^2)^(1/2)
    gaussian = GaussianMixture.isotropic(torch.tensor([[0.3, -0.6]], dtype=torch.float64), 0.4)
    levels, x = log_snr_levels(3000), normal(8, 2)
    (first, last) = levels[0], levels[-1]
    std = [math.sqrt(level.alpha**2 * 0.16 + level.sigma**2) for level in (first, last)]
    end = last.alpha * gaussian.means + (x - first.alpha * gaussian.means) * std[1] / std[0]
    solved = sample_dpm_singlestep(exact(gaussian), x, levels)
    torch.testing.assert_close(solved, end, rtol=0, atol=1e-5)  # (12 / 3000)^2 times a constant below 0.5


# ---------------------------------------------------------------- numbers of evaluations


def test_singlestep_evaluates_where_the_authors_do():
    record = Recorder(exact(TRIO))
    sample_dpm_singlestep(record, normal(2, 2), SDE.levels(15))
    assert record.times == pytest.approx([1 - 0.0666 * i for i in range(15)], rel=1e-12)  # eda.md, section 5


@pytest.mark.parametrize("count", [1, 2, 14, 15])
def test_evaluations_are_one_per_level_but_the_last(count: int):
    record = Recorder(exact(TRIO))
    sample_dpm_singlestep(record, normal(2, 2), SDE.levels(count))
    assert record.times == [level.time for level in SDE.levels(count)[:-1]]


def test_heun_evaluates_twice_a_step_but_once_to_a_clean_level():
    for levels, count in ((SDE.levels(5), 10), (DiscreteVP(5).levels(), 9)):
        record = Recorder(lambda x, level: x)
        sample_heun(record, normal(2, 2), levels)
        assert len(record.times) == count


# ---------------------------------------------------------------- stochastic samplers, without chance


def chain_variance(denoise: Denoise, levels: Levels, start: float) -> float:
    """Variance of the sample of a linear chain from N(0, start): one row per source of noise, squared and summed."""
    sources = torch.eye(len(levels), dtype=torch.float64)[..., None]
    x, noise = math.sqrt(start) * sources[0], sources[1:]
    return sample_ddpm(denoise, x, levels, noise).square().sum().item()


def test_the_variance_beta_is_exact_for_a_normal_distribution():
    # Ho et al., Section 3.2: x_0 ~ N(0, 1) stays N(0, 1)
    chain = DiscreteVP(12).double()
    levels = chain.levels()[:-1]  # down to n = 1: the last step to n = 0 adds no noise
    unit = exact(GaussianMixture.isotropic(torch.zeros(1, 1, dtype=torch.float64), 1.0))
    assert chain_variance(unit, levels, 1.0) == pytest.approx(1, rel=1e-12)


def test_ddim_is_the_first_order_solver():
    denoise, x, levels = exact(TRIO), normal(6, 2), SDE.levels(12)
    expected = x
    for pair in pairwise(levels):
        expected = sample_dpm_singlestep(denoise, expected, pair)
    torch.testing.assert_close(sample_ddim(denoise, x, levels), expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- distribution of samples

COUNT = 4000


def modes(samples: Tensor, mixture: GaussianMixture) -> Tensor:
    return mixture.responsibilities(samples).argmax(-1)


CHAIN = log_snr_levels(150)


@pytest.mark.parametrize(
    ("sample", "spread"),
    [
        # 15 evaluations, as EDA's, make the modes 10% too narrow (measured: 0.90); the others converge
        pytest.param(lambda d, x: sample_dpm_singlestep(d, x, SDE.levels(15)), 0.12, id="eda"),
        pytest.param(lambda d, x: sample_dpm_singlestep(d, x, CHAIN[::3]), 0.04, id="singlestep"),
        pytest.param(lambda d, x: sample_ddim(d, x, CHAIN), 0.04, id="ddim"),
        pytest.param(lambda d, x: sample_heun(d, x, CHAIN[::5]), 0.04, id="heun"),
        pytest.param(lambda d, x: sample_ddpm(d, x, CHAIN, normal(150, COUNT, 2, seed=1)), 0.04, id="ddpm"),
    ],
)
def test_samples_of_eight_gaussians(sample: Callable[[Denoise, Tensor], Tensor], spread: float):
    mixture, _ = eight_gaussians()
    samples = sample(exact(mixture), normal(COUNT, 2))
    mode = modes(samples, mixture)
    masses = mode.bincount(minlength=8) / COUNT
    assert (masses - 1 / 8).abs().max() < 5 * math.sqrt(0.125 * 0.875 / COUNT)  # five standard errors
    assert samples.mean(0).abs().max() < 5 * math.sqrt(4.125 / COUNT)
    covariance = samples.T.cov()
    # five standard errors of a variance (its kurtosis is below the Gaussian's), and 2% for the solvers' own error
    torch.testing.assert_close(covariance, mixture.covariance(), rtol=0, atol=4.125 * (5 * math.sqrt(2 / COUNT) + 0.02))
    within = (samples - mixture.means[mode]).square().mean().sqrt().item()
    print(f"mode std over its exact value: {within * 1.414 / 0.5:.3f}")
    assert within == pytest.approx(0.5 / 1.414, rel=spread)  # chance alone moves it by 0.8%, one standard error


def test_guidance_by_the_exact_energy_samples_the_target():
    # score + grad f is the score of the target: QGPO, AEPO and BDPO rest on it. Masses from toy-2d.md.
    mixture, q = eight_gaussians()

    def score(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = SDE.alpha(time), SDE.sigma(time)
        _, guidance = intermediate_energy(mixture, q, 3.0, x, alpha, sigma)
        return mixture.diffused(alpha, sigma).score(x) + guidance

    # many steps: what is tested is the score, not the solver
    samples = sample_heun(as_denoiser(score, "score"), normal(COUNT, 2), SDE.levels(60))
    mode = modes(samples, mixture)
    assert (mode == 7).double().mean().item() == pytest.approx(0.3602, abs=5 * math.sqrt(0.36 * 0.64 / COUNT))
    assert q.constant[mode].mean().item() == pytest.approx(0.7713, abs=5 * 0.25 / math.sqrt(COUNT))


# ---------------------------------------------------------------- a second implementation


def chain_scheduler(kind: type, chain: DiscreteVP, **settings: object) -> DDPMScheduler | DDIMScheduler:
    """A scheduler of `diffusers` on the betas of `chain`, in float64; its step k is our n = k + 1."""
    scheduler = kind(chain.steps, trained_betas=chain.betas[1:].tolist(), prediction_type="sample", **settings)
    scheduler.alphas_cumprod = torch.tensor([level.alpha**2 for level in chain.levels()[-2::-1]], dtype=torch.float64)
    scheduler.set_timesteps(chain.steps)
    return scheduler


@pytest.mark.parametrize("clip", [None, 0.8])
def test_ddpm_is_that_of_diffusers(clip: float | None):
    chain = DiscreteVP(12).double()
    denoise, x = exact(TRIO), normal(16, 2)
    scheduler = chain_scheduler(
        DDPMScheduler, chain, variance_type="fixed_large", clip_sample=clip is not None, clip_sample_range=clip
    )
    noise = torch.stack([normal(16, 2, seed=k) for k in range(12)])
    other = x
    for i, (level, k) in enumerate(zip(chain.levels(), scheduler.timesteps.tolist(), strict=False)):
        generator = torch.Generator().manual_seed(i)
        clean = denoise(other, level)
        other = scheduler.step(clean, k, other, generator=generator).prev_sample
    ours = sample_ddpm(denoise, x, chain.levels(), noise, clip=clip)
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)  # float64 on both sides


@pytest.mark.parametrize("clip", [None, 0.8])
def test_ddim_is_that_of_diffusers(clip: float | None):
    chain = DiscreteVP(12).double()
    denoise, x = exact(TRIO), normal(16, 2)
    scheduler = chain_scheduler(DDIMScheduler, chain, clip_sample=clip is not None, clip_sample_range=clip)
    other = x
    for level, k in zip(chain.levels(), scheduler.timesteps.tolist(), strict=False):
        clean = denoise(other, level)
        other = scheduler.step(clean, k, other, use_clipped_model_output=True).prev_sample
    ours = sample_ddim(denoise, x, chain.levels(), clip=clip)
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [14, 15])
def test_singlestep_is_that_of_diffusers(steps: int):
    denoise, x, levels = exact(TRIO), normal(16, 2), SDE.levels(steps)
    # at an even number `lower_order_final` would split the last step in two, which the authors do not
    settings = {"solver_order": 2, "lower_order_final": steps % 2 == 1, "prediction_type": "sample"}
    scheduler = DPMSolverSinglestepScheduler(**settings, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.tensor([level.sigma / level.alpha for level in levels], dtype=torch.float64)
    scheduler.set_begin_index(0)
    other = x
    for level, k in zip(levels, scheduler.timesteps, strict=False):
        clean = denoise(other, level)
        other = scheduler.step(clean, k, other).prev_sample
    ours = sample_dpm_singlestep(denoise, x, levels)
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-11)  # float64; lambda is computed in two ways


def test_edm_heun_is_that_of_diffusers():
    sigmas = karras_sigmas(8).double()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return TRIO.posterior(x, 1.0, sigma).mean()

    scheduler = HeunDiscreteScheduler(prediction_type="sample")
    scheduler.set_timesteps(8)
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.set_begin_index(0)
    x = normal(16, 2) * sigmas[0]
    other = x
    inputs = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2)])  # where the model is called
    for sigma, k in zip(inputs, scheduler.timesteps, strict=True):
        other = scheduler.step(denoise(other, sigma.expand(16)), k, other).prev_sample
    torch.testing.assert_close(
        sample_heun(as_denoiser(denoise, "x0"), x, edm_levels(sigmas)), other, rtol=0, atol=1e-11
    )


def test_edm_levels_and_preconditioning_are_those_of_diffusers():
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5)
    scheduler.set_timesteps(10)
    torch.testing.assert_close(karras_sigmas(10), scheduler.sigmas, rtol=1e-5, atol=0)  # float32 to the power of 7
    x, raw, sigma = normal(1, 3).float(), normal(1, 3, seed=1).float(), torch.tensor([1.3])
    coefficients = EDMDenoiser(nn.Identity(), clip=None).coefficients(sigma)
    torch.testing.assert_close(coefficients.scale_in * x, scheduler.precondition_inputs(x, sigma))
    torch.testing.assert_close(
        coefficients.skip * x + coefficients.out * raw, scheduler.precondition_outputs(x, raw, sigma)
    )
    torch.testing.assert_close(coefficients.noise, scheduler.precondition_noise(sigma))


# ---------------------------------------------------------------- what holds for every sampler


@pytest.fixture
def fresh_compiler() -> None:
    """Forget the graphs of other cases: eight of one function are the compiler's limit."""
    torch.compiler.reset()


@every_sampler
def test_rows_do_not_see_each_other(sample: Callable[..., Tensor]):
    denoise, x, levels = exact(TRIO), normal(6, 2), SDE.levels(12)
    together = sample(denoise, x, levels)
    for i in range(6):
        keywords = {"noise": CHAIN_NOISE[:, i : i + 1]} if "noise" in getattr(sample, "keywords", {}) else {}
        torch.testing.assert_close(sample(denoise, x[i : i + 1], levels, **keywords), together[i : i + 1])


def test_paths_begin_with_the_noise_and_end_with_the_sample():
    denoise, x, levels = exact(TRIO), normal(6, 2), SDE.levels(12)
    path = sample_ddim(denoise, x, levels, path=True)
    assert torch.equal(path[0], x)
    assert torch.equal(path[-1], sample_ddim(denoise, x, levels))
    assert len(path) == 13


@every_sampler
def test_a_clean_last_level_returns_the_last_estimate(sample: Callable[..., Tensor]):
    levels = DiscreteVP(12).levels()
    estimates: list[Tensor] = []

    def denoise(x: Tensor, level: Level) -> Tensor:
        estimates.append(exact(TRIO)(x, level))
        return estimates[-1]

    clipped = getattr(sample, "func", sample) in (sample_ddpm, sample_ddim)
    if sample is sample_dpm_singlestep:
        levels = levels[1:]  # an odd number of evaluations
    result = sample(denoise, normal(6, 2), levels, **({"clip": 0.5} if clipped else {}))
    expected = estimates[-1].clamp(-0.5, 0.5) if clipped else estimates[-1]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_a_second_order_step_to_a_clean_level_is_refused():
    with pytest.raises(ValueError, match="clean level"):
        sample_dpm_singlestep(exact(TRIO), normal(2, 2), edm_levels(karras_sigmas(4)))


@pytest.mark.usefixtures("fresh_compiler")
@every_sampler
def test_samplers_compile_in_one_graph(sample: Callable[..., Tensor]):
    network = nn.Linear(2, 2, dtype=torch.float64)
    levels, x = SDE.levels(5), normal(6, 2)

    def act(x: Tensor) -> Tensor:
        return sample(as_denoiser(lambda x, time: network(x) * time[:, None]), x, levels)

    compiled = torch.compile(act, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), act(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_levels_may_change():
    denoise, x = as_denoiser(lambda x, time: x * time[:, None]), normal(6, 2)
    compiled = torch.compile(sample_dpm_singlestep, fullgraph=True, backend="eager")
    for steps in (3, 4):
        levels = SDE.levels(steps)
        torch.testing.assert_close(compiled(denoise, x, levels), sample_dpm_singlestep(denoise, x, levels))


@every_sampler
def test_samplers_vectorize_and_differentiate(sample: Callable[..., Tensor]):
    denoise, levels = exact(TRIO), SDE.levels(12)
    x = normal(3, 6, 2)
    stacked = vmap(lambda batch: sample(denoise, batch, levels))(x)
    torch.testing.assert_close(stacked, torch.stack([sample(denoise, batch, levels) for batch in x]))

    def total(x: Tensor) -> Tensor:
        return sample(denoise, x, levels).sin().sum()

    direction, step = normal(6, 2, seed=2), 1e-6
    slope = (grad(total)(x[0]) * direction).sum()
    difference = (total(x[0] + step * direction) - total(x[0] - step * direction)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)  # rounding over the step: 1e-15 / 1e-6
