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
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from torch import Tensor, nn
from torch.func import grad, vmap

from lit_offrl.diffusion.denoisers import (
    Denoise,
    EDMDenoiser,
    as_denoiser,
    diffuse,
    epsilon_from_score,
    epsilon_from_x0,
    score_from_epsilon,
    score_from_x0,
    x0_from_epsilon,
    x0_from_score,
)
from lit_offrl.diffusion.mixtures import GaussianMixture, eight_gaussians, intermediate_energy
from lit_offrl.diffusion.samplers import (
    sample_ddim,
    sample_ddpm,
    sample_dpm_multistep,
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
    singlestep_orders,
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
    "ddpm-beta": partial(sample_ddpm, noise=CHAIN_NOISE),
    "ddpm-posterior": partial(sample_ddpm, noise=CHAIN_NOISE, variance="posterior"),
    "ddim": sample_ddim,
    "ddim-eta": partial(sample_ddim, noise=CHAIN_NOISE, eta=0.6),
    "heun": sample_heun,
    "singlestep-2": sample_dpm_singlestep,
    "singlestep-3": partial(sample_dpm_singlestep, order=3),
    "multistep-2": sample_dpm_multistep,
    "multistep-3": partial(sample_dpm_multistep, order=3),
}
every_sampler = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)


# ---------------------------------------------------------------- parametrizations


def test_parametrizations_convert_into_each_other():
    # rounding of x0 is divided by alpha down to 6.6e-3, of the score by sigma^2 down to 1e-4: up to 4 digits are lost
    x0, epsilon = normal(9, 3), normal(9, 3, seed=1)
    time = torch.logspace(-3, 0, 9, dtype=torch.float64)
    alpha, sigma = SDE.alpha(time)[:, None], SDE.sigma(time)[:, None]
    x = diffuse(x0, epsilon, alpha, sigma)
    score = score_from_epsilon(epsilon, sigma)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(score, -(x - alpha * x0) / (1 - alpha**2), **close)  # grad ln N(x; alpha x0, sigma^2)
    torch.testing.assert_close(x0_from_epsilon(x, epsilon, alpha, sigma), x0, **close)
    torch.testing.assert_close(epsilon_from_x0(x, x0, alpha, sigma), epsilon, **close)
    torch.testing.assert_close(epsilon_from_score(score, sigma), epsilon, **close)
    torch.testing.assert_close(x0_from_score(x, score, alpha, sigma), x0, **close)
    torch.testing.assert_close(score_from_x0(x, x0, alpha, sigma), score, **close)


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
    "ddim": (1, lambda d, x, n: sample_ddim(d, x, SDE.levels(n, "log_snr"))),
    "ddim in time": (1, lambda d, x, n: sample_ddim(d, x, SDE.levels(n))),
    "heun": (2, lambda d, x, n: sample_heun(d, x, SDE.levels(n, "log_snr"))),
    "heun in time": (2, lambda d, x, n: sample_heun(d, x, SDE.levels(n))),
    "singlestep 2": (2, lambda d, x, n: sample_dpm_singlestep(d, x, SDE.levels(n, "log_snr", singlestep_order=2))),
    "singlestep 3": (
        3,
        lambda d, x, n: sample_dpm_singlestep(d, x, SDE.levels(n, "log_snr", singlestep_order=3), order=3),
    ),
    "multistep 2": (2, lambda d, x, n: sample_dpm_multistep(d, x, SDE.levels(n, "log_snr"))),
    "multistep 3": (3, lambda d, x, n: sample_dpm_multistep(d, x, SDE.levels(n, "log_snr"), order=3)),
}


@pytest.fixture(scope="module")
def flow() -> tuple[Denoise, Tensor, Tensor]:
    """The exact denoiser, noise, and where the flow takes it: 1500 evaluations of order 3, exact to about 1e-8."""
    denoise, x = exact(TRIO), normal(32, 2)
    return denoise, x, sample_dpm_singlestep(denoise, x, SDE.levels(1500, "log_snr", singlestep_order=3), order=3)


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
    errors = {
        order: (sample_dpm_singlestep(denoise, x, SDE.levels(15), order=order) - end).square().mean().sqrt().item()
        for order in (1, 2)
    }
    print("15 evaluations uniform in time: errors", errors)
    assert errors[2] < errors[1] * 2 / 3  # EDA's sampler and DDIM at EDA's number of steps


def test_one_gaussian_is_transported_exactly():
    # the flow of N(m, s^2) is linear: x - alpha m scales with the marginal std (alpha^2 s^2 + sigma^2)^(1/2)
    gaussian = GaussianMixture.isotropic(torch.tensor([[0.3, -0.6]], dtype=torch.float64), 0.4)
    levels, x = SDE.levels(300, "log_snr", singlestep_order=3), normal(8, 2)
    (first, last) = levels[0], levels[-1]
    std = [math.sqrt(level.alpha**2 * 0.16 + level.sigma**2) for level in (first, last)]
    end = last.alpha * gaussian.means + (x - first.alpha * gaussian.means) * std[1] / std[0]
    solved = sample_dpm_singlestep(exact(gaussian), x, levels, order=3)
    torch.testing.assert_close(solved, end, rtol=0, atol=1e-5)  # (15 / 300)^3 times a constant below 0.1


# ---------------------------------------------------------------- numbers of evaluations


def test_singlestep_evaluates_where_the_authors_do():
    record = Recorder(exact(TRIO))
    sample_dpm_singlestep(record, normal(2, 2), SDE.levels(15))
    assert record.times == pytest.approx([1 - 0.0666 * i for i in range(15)], rel=1e-12)  # eda.md, section 5


@pytest.mark.parametrize(("order", "count"), [(2, 15), (2, 14), (3, 15), (3, 16), (3, 17)])
def test_evaluations_are_one_per_level_but_the_last(order: int, count: int):
    for sample in (sample_dpm_singlestep, sample_dpm_multistep):
        record = Recorder(exact(TRIO))
        sample(record, normal(2, 2), SDE.levels(count), order=order)
        assert record.times == [level.time for level in SDE.levels(count)[:-1]]


def test_heun_evaluates_twice_a_step_but_once_to_a_clean_level():
    for levels, count in ((SDE.levels(5), 10), (DiscreteVP(5).levels(), 9)):
        record = Recorder(lambda x, level: x)
        sample_heun(record, normal(2, 2), levels)
        assert len(record.times) == count


# ---------------------------------------------------------------- stochastic samplers, without chance


def chain_variance(denoise: Denoise, variance: str, levels: Levels, start: float) -> float:
    """Variance of the sample of a linear chain from N(0, start): one row per source of noise, squared and summed."""
    sources = torch.eye(len(levels), dtype=torch.float64)[..., None]
    x, noise = math.sqrt(start) * sources[0], sources[1:]
    return sample_ddpm(denoise, x, levels, noise, variance=variance).square().sum().item()


def test_each_variance_is_exact_where_ho_et_al_say():
    # Section 3.2: beta for x_0 ~ N(0, 1), which stays N(0, 1), and the posterior's for a single point, here 0
    chain = DiscreteVP(12).double()
    levels = chain.levels()[:-1]  # down to n = 1: the last step to n = 0 adds no noise
    unit = exact(GaussianMixture.isotropic(torch.zeros(1, 1, dtype=torch.float64), 1.0))
    assert chain_variance(unit, "beta", levels, 1.0) == pytest.approx(1, rel=1e-12)
    point = chain_variance(lambda x, level: 0 * x, "posterior", levels, levels[0].sigma ** 2)
    assert point == pytest.approx(levels[-1].sigma ** 2, rel=1e-12)


def test_full_ddim_noise_is_ddpm_and_none_is_the_first_order_solver():
    denoise, x, noise = exact(TRIO), normal(6, 2), normal(12, 6, 2, seed=1)
    levels = SDE.levels(12)
    ddpm = sample_ddpm(denoise, x, levels, noise, variance="posterior")
    torch.testing.assert_close(sample_ddim(denoise, x, levels, noise, eta=1.0), ddpm, rtol=1e-12, atol=1e-12)
    first_order = sample_dpm_multistep(denoise, x, levels, order=1)
    torch.testing.assert_close(sample_ddim(denoise, x, levels), first_order, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sample_dpm_singlestep(denoise, x, levels, order=1), first_order, rtol=0, atol=0)


def test_noise_comes_from_the_generator_alone():
    denoise, x, levels = exact(TRIO), normal(6, 2), SDE.levels(12)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample_ddpm(denoise, x, levels, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, sample_ddpm(denoise, x, levels, torch.Generator().manual_seed(5)))
    assert torch.equal(first, sample_ddpm(denoise, x, levels, normal(12, 6, 2, seed=5)))  # draws are one block
    with pytest.raises(ValueError, match="needs noise"):
        sample_ddim(denoise, x, levels, eta=0.5)


# ---------------------------------------------------------------- distribution of samples

COUNT = 4000


def modes(samples: Tensor, mixture: GaussianMixture) -> Tensor:
    return mixture.responsibilities(samples).argmax(-1)


CHAIN = SDE.levels(150, "log_snr")


@pytest.mark.parametrize(
    ("sample", "spread"),
    [
        # 15 evaluations, as EDA's, make the modes 10% too narrow (measured: 0.90); the others converge
        pytest.param(lambda d, x: sample_dpm_singlestep(d, x, SDE.levels(15)), 0.12, id="eda"),
        pytest.param(lambda d, x: sample_dpm_singlestep(d, x, CHAIN[::3]), 0.04, id="singlestep"),
        pytest.param(lambda d, x: sample_dpm_multistep(d, x, CHAIN[::3]), 0.04, id="multistep"),
        pytest.param(lambda d, x: sample_ddim(d, x, CHAIN), 0.04, id="ddim"),
        pytest.param(lambda d, x: sample_heun(d, x, CHAIN[::5]), 0.04, id="heun"),
        pytest.param(lambda d, x: sample_ddpm(d, x, CHAIN, torch.Generator().manual_seed(1)), 0.04, id="ddpm-beta"),
        pytest.param(
            lambda d, x: sample_ddpm(d, x, CHAIN, torch.Generator().manual_seed(1), variance="posterior"),
            0.04,
            id="ddpm-posterior",
        ),
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
    samples = sample_dpm_multistep(as_denoiser(score, "score"), normal(COUNT, 2), SDE.levels(60))
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


@pytest.mark.parametrize(("variance", "name"), [("beta", "fixed_large"), ("posterior", "fixed_small")])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_ddpm_is_that_of_diffusers(variance: str, name: str, clip: float | None):
    chain = DiscreteVP(12).double()
    denoise, x = exact(TRIO), normal(16, 2)
    scheduler = chain_scheduler(
        DDPMScheduler, chain, variance_type=name, clip_sample=clip is not None, clip_sample_range=clip
    )
    noise = torch.stack([normal(16, 2, seed=k) for k in range(12)])
    other = x
    for i, (level, k) in enumerate(zip(chain.levels(), scheduler.timesteps.tolist(), strict=False)):
        generator = torch.Generator().manual_seed(i)
        clean = denoise(other, level)
        other = scheduler.step(clean, k, other, generator=generator).prev_sample
    ours = sample_ddpm(denoise, x, chain.levels(), noise, variance=variance, clip=clip)
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)  # float64 on both sides


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_ddim_is_that_of_diffusers(eta: float, clip: float | None):
    chain = DiscreteVP(12).double()
    denoise, x, noise = exact(TRIO), normal(16, 2), normal(12, 16, 2, seed=1)
    scheduler = chain_scheduler(DDIMScheduler, chain, clip_sample=clip is not None, clip_sample_range=clip)
    other = x
    for i, (level, k) in enumerate(zip(chain.levels(), scheduler.timesteps.tolist(), strict=False)):
        clean = denoise(other, level)
        step = scheduler.step(clean, k, other, eta, use_clipped_model_output=True, variance_noise=noise[i])
        other = step.prev_sample
    ours = sample_ddim(denoise, x, chain.levels(), noise, eta=eta, clip=clip)
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)


def solver_scheduler(kind: type, levels: Levels, order: int, lower_order_final: bool) -> object:
    """A DPM-Solver++ scheduler of `diffusers` that visits our levels, in float64."""
    settings = {"solver_order": order, "lower_order_final": lower_order_final, "prediction_type": "sample"}
    scheduler = kind(**settings, final_sigmas_type="zero" if levels[-1].sigma == 0 else "sigma_min")
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = torch.tensor([level.sigma / level.alpha for level in levels], dtype=torch.float64)
    scheduler.set_begin_index(0)
    return scheduler


def run_multistep(denoise: Denoise, x: Tensor, levels: Levels, order: int, lower_order_final: bool) -> Tensor:
    """The multistep solver of `diffusers`."""
    scheduler = solver_scheduler(DPMSolverMultistepScheduler, levels, order, lower_order_final)
    for level, k in zip(levels, scheduler.timesteps, strict=False):
        clean = denoise(x, level)
        x = scheduler.step(clean, k, x).prev_sample
    return x


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("steps", "lower"), [(12, True), (12, False), (20, False)])
@pytest.mark.parametrize("spacing", ["time", "log_snr"])
def test_multistep_is_that_of_diffusers(order: int, steps: int, lower: bool, spacing: str):
    denoise, x, levels = exact(TRIO), normal(16, 2), SDE.levels(steps, spacing)
    other = run_multistep(denoise, x, levels, order, lower)
    ours = sample_dpm_multistep(denoise, x, levels, order=order, lower_order_final=lower)
    torch.testing.assert_close(ours, other, rtol=0, atol=2e-5, check_dtype=False)  # `diffusers` steps in float32


def test_third_order_multistep_keeps_the_whole_second_derivative(flow: tuple[Denoise, Tensor, Tensor]):
    # the published update, which `diffusers` copies, takes half of it and is of order 2: why ours is another
    denoise, x, end = flow
    errors = [
        (run_multistep(denoise, x, SDE.levels(n, "log_snr"), 3, False) - end).square().mean().sqrt().item()
        for n in (48, 96)
    ]
    slope = math.log2(errors[0] / errors[1])
    print("multistep 3 of diffusers errors", *(f"{e:.1e}" for e in errors), f"slope {slope:.2f}")
    assert slope == pytest.approx(2, abs=0.2)
    ours = sample_dpm_multistep(denoise, x, SDE.levels(96, "log_snr"), order=3, lower_order_final=False)
    assert (ours - end).square().mean().sqrt().item() < errors[1] / 3


@pytest.mark.parametrize(("order", "steps"), [(1, 7), (2, 14), (2, 15), (3, 15), (3, 16), (3, 17)])
@pytest.mark.parametrize("spacing", ["time", "log_snr"])
def test_singlestep_is_that_of_diffusers(order: int, steps: int, spacing: str):
    denoise, x = exact(TRIO), normal(16, 2)
    levels = SDE.levels(steps, spacing, singlestep_order=order)
    # at an even number of order 2 `lower_order_final` would split the last step in two, which the authors do not
    scheduler = solver_scheduler(DPMSolverSinglestepScheduler, levels, order, steps % order != 0 or order == 3)
    assert [k for k in scheduler.order_list if k == 1][1:] == [1] * (len(singlestep_orders(steps, order)) - 1)
    other = x
    for i, (level, k) in enumerate(zip(levels, scheduler.timesteps, strict=False)):
        # inside a third-order step the paper's intermediate point takes the "heun" form, elsewhere there is "midpoint"
        inside = scheduler.order_list[i] == 2 and [*scheduler.order_list, 1][i + 1] == 3
        scheduler.register_to_config(solver_type="heun" if inside else "midpoint")
        clean = denoise(other, level)
        other = scheduler.step(clean, k, other).prev_sample
    ours = sample_dpm_singlestep(denoise, x, levels, order=order)
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
    torch.testing.assert_close(sample_heun(denoise, x, sigmas), other, rtol=0, atol=1e-11)


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


@every_sampler
def test_paths_begin_with_the_noise_and_end_with_the_sample(sample: Callable[..., Tensor]):
    denoise, x, levels = exact(TRIO), normal(6, 2), SDE.levels(12)
    path = sample(denoise, x, levels, path=True)
    assert torch.equal(path[0], x)
    assert torch.equal(path[-1], sample(denoise, x, levels))
    order = getattr(sample, "keywords", {}).get("order", 2)
    single = getattr(sample, "func", sample) is sample_dpm_singlestep
    assert len(path) == 1 + (len(singlestep_orders(12, order)) if single else 12)


@every_sampler
def test_a_clean_last_level_returns_a_clamped_estimate(sample: Callable[..., Tensor]):
    # order 3 leaves 12 evaluations a last step of order 1; order 2 needs an odd number of them
    chain = DiscreteVP(12).double()
    levels = chain.levels()
    if getattr(sample, "func", sample) is sample_dpm_singlestep and "order" not in getattr(sample, "keywords", {}):
        levels = levels[1:]
    calls = Recorder(exact(TRIO))
    sample_ = sample(calls, normal(6, 2), levels, clip=0.5)
    assert sample_.abs().max() <= 0.5 + 1e-12
    assert (sample_.abs() > 0.4).any()
    assert calls.times[-1] == 1


def test_high_orders_to_a_clean_level_are_refused():
    levels = edm_levels(karras_sigmas(4))
    for sample in (sample_dpm_singlestep, partial(sample_dpm_multistep, lower_order_final=False)):
        with pytest.raises(ValueError, match="clean level"):
            sample(exact(TRIO), normal(2, 2), levels)
    with pytest.raises(ValueError, match="got 4"):
        sample_dpm_multistep(exact(TRIO), normal(2, 2), levels, order=4)


@pytest.mark.usefixtures("fresh_compiler")
@every_sampler
def test_samplers_compile_in_one_graph(sample: Callable[..., Tensor]):
    network = nn.Linear(2, 2, dtype=torch.float64)
    levels, x = SDE.levels(5), normal(6, 2)  # enough for a full step of order 3

    def act(x: Tensor) -> Tensor:
        return sample(as_denoiser(lambda x, time: network(x) * time[:, None]), x, levels, clip=1.0)

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
