"""BDPO's equations against closed forms and plain reimplementations, and its lean arithmetic against the plain form."""

from __future__ import annotations

import math

import pytest
import torch
from mixtures import eight_gaussians, intermediate_energy
from tiny import nested, rate, shake, weights
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from lit_offrl.algorithms import BDPO, BDPODeterministic, BDPOGaussian
from lit_offrl.algorithms.loop import phase_at
from lit_offrl.batch import Batch
from lit_offrl.callbacks.ema import EMATargets
from lit_offrl.errors import UserError
from lit_offrl.networks.policies import Dirac, Gaussian

SIZES = {"hidden_dim": 16, "critic__hidden_dim": 16, "critic__members": 3, "samples": 4}


def make(cls: type[BDPO] = BDPO, **options: object) -> BDPO:
    torch.manual_seed(5)
    algorithm = cls(3, 2, **nested({"pretrain_steps": 0, "warmup_steps": 0, "actor_every": 1, **SIZES, **options}))
    algorithm.configure_optimizers()
    algorithm.main_steps = 1000
    algorithm.begin_main()
    return algorithm


def batch(rows: int = 12, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(rows, 3, generator=generator),
        torch.rand(rows, 2, generator=generator) * 2 - 1,
        torch.randn(rows, generator=generator),
        torch.randn(rows, 3, generator=generator),
        (torch.rand(rows, generator=generator) < 0.4).float(),
    )


class Constant(nn.Module):
    """Members `[k]` of constant value, over inputs of any leading dimensions."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, observations: Tensor, actions: Tensor, *_: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(observations.shape[:-1], actions.shape[:-1])
        return self.values.view(-1, *[1] * len(shape)).expand(-1, *shape)


class FirstCoordinate(Constant):
    """Members that return a multiple of the first action coordinate."""

    def forward(self, observations: Tensor, actions: Tensor, *_: Tensor) -> Tensor:
        return super().forward(observations, actions) * actions[..., 0]


# ---------------------------------------------------------------- the penalty


def test_penalty_of_a_step_is_the_kl_divergence_of_its_two_gaussians():
    algorithm = make(clip=None)
    schedule = algorithm.schedule
    generator = torch.Generator().manual_seed(0)
    x, one, two = torch.randn(3, 5, 2, generator=generator)
    step = torch.arange(1, 6)  # all five steps; the first has sigma^2 = beta_1, not the posterior variance 0
    std = schedule.betas[step].sqrt()[:, None]
    means = [schedule.posterior_mean(algorithm.clean(x, epsilon, step), x, step) for epsilon in (one, two)]
    expected = kl_divergence(Normal(means[0], std), Normal(means[1], std)).sum(-1)
    # float32 means are differences of terms up to 10 times larger: 1e-4 is some ten times their rounding error
    torch.testing.assert_close(algorithm.step_kl(one, two, step), expected, rtol=1e-4, atol=1e-5)


def test_penalty_weights_are_the_table_of_the_authors():
    expected = [0.6218, 0.7505, 1.0372, 1.6020, 2.5472]  # beta_n / (2 alpha_n (1 - alpha_bar_n)) for N = 5
    assert make().kl_weights[1:].tolist() == pytest.approx(expected, abs=1e-4)
    weights = make(diffusion_steps=50).kl_weights
    assert [weights[n].item() for n in (1, 2, 25, 50)] == pytest.approx([0.502, 0.336, 0.072, 0.110], abs=1e-3)


def test_accumulated_penalty_is_the_log_ratio_of_paths():
    algorithm = make(clip=None, samples=4000)
    shake(algorithm.target_behavior, scale=0.02)
    schedule, actor, behavior = algorithm.schedule, algorithm.target_actor, algorithm.target_behavior
    observations = batch().observations[:2]
    with torch.no_grad():
        _, penalty = algorithm.rollout(observations, penalized=True)
        # by hand: paths with noise in every step, also the last, and the densities of both policies along them
        generator = torch.Generator().manual_seed(9)
        x = torch.randn(2, 20_000, 2, generator=generator)
        ratio = torch.zeros(2, 20_000)
        for n in range(5, 0, -1):
            step = torch.full((2, 1), n)
            mean, other = (
                schedule.posterior_mean(
                    algorithm.clean(x, policy(x, step, observations[:, None]), step).flatten(0, 1),
                    x.flatten(0, 1),
                    torch.full((x.shape[0] * x.shape[1],), n),
                ).view_as(x)
                for policy in (actor, behavior)
            )
            std = schedule.betas[n].sqrt()
            x = mean + std * torch.randn(x.shape, generator=generator)
            ratio += (Normal(mean, std).log_prob(x) - Normal(other, std).log_prob(x)).sum(-1)
    error = ratio.std(-1) / math.sqrt(ratio.shape[1])
    assert (penalty > 10 * error).all(), "the test would see nothing"
    # four standard errors of the estimate, twice: our own 4,000 paths have about as much error
    assert ((penalty - ratio.mean(-1)).abs() < 8 * error).all()


def test_penalties_vanish_while_the_actor_is_the_behavior_model():
    algorithm = make()
    rows = batch()
    with torch.no_grad():
        assert not algorithm.rollout(rows.observations, penalized=True)[1].any()
        step, noisy_actions, _ = algorithm.noised(rows)
        _, penalty = algorithm.continuation(algorithm.actor, rows.observations, noisy_actions, step, penalized=True)
    assert not penalty.any()


@pytest.mark.parametrize("cls", [BDPO, BDPOGaussian, BDPODeterministic])
def test_leaving_out_a_penalty_that_is_zero_changes_nothing(cls: type[BDPO]):
    losses = []
    for penalized in (False, True):
        algorithm = make(cls)
        losses.append([loss(batch(), penalized=penalized)[0] for loss in algorithm.critic_losses().values()])
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))


# ---------------------------------------------------------------- targets and losses


def test_lower_bound_uses_the_biased_deviation():
    values = torch.tensor([[1.0], [2.0], [6.0]])
    expected = 3.0 - 0.5 * math.sqrt((4 + 1 + 9) / 3)
    assert make(rho=0.5).lower_bound(values).item() == pytest.approx(expected)
    assert make(rho=0.0).lower_bound(values).item() == 3.0


@pytest.mark.parametrize("max_backup", [False, True])
def test_q_target_by_hand(max_backup: bool, monkeypatch: pytest.MonkeyPatch):
    algorithm = make(max_backup=max_backup, critic__discount=0.9, eta=0.3, rho=0.5)
    rows = batch(2)._replace(terminals=torch.tensor([0.0, 1.0]))
    actions = torch.tensor([[[0.1, 0.0], [0.4, 0.0]], [[0.2, 0.0], [0.3, 0.0]]])
    monkeypatch.setattr(algorithm, "rollout", lambda *_, penalized: (actions, torch.tensor([0.7, 0.8])))
    algorithm.target_critic["q"] = FirstCoordinate(1.0, 3.0)
    algorithm.critic["q"] = nn.Sequential(Constant(0.0, 0.0))  # so that the loss is the mean squared target
    monkeypatch.setattr(algorithm.critic["q"], "forward", lambda *_: torch.zeros(2, 2))
    loss, info = algorithm.q_loss(rows, penalized=True)
    best = [0.4, 0.3] if max_backup else [0.25, 0.25]  # over the samples of each member, then across members
    lower = 2 * best[0] - 0.5 * best[0]  # members at 1 and 3 times: mean 2, deviation 1
    targets = [rows.rewards[0].item() + 0.9 * (lower - 0.3 * 0.7), rows.rewards[1].item()]  # the second is terminal
    assert loss.item() == pytest.approx(sum(t**2 for t in targets) / 2, rel=1e-5)
    assert info["path_kl"].item() == pytest.approx(0.75)  # the mean over paths, whatever Q's backup takes


def test_value_at_the_first_step_bootstraps_from_q_and_others_from_v():
    algorithm = make(rho=0.0)
    algorithm.target_critic["q"], algorithm.target_critic["v"] = Constant(2.0), Constant(5.0)
    rows = batch(13)
    step, noisy_actions, _ = algorithm.noised(rows)
    value, _ = algorithm.continuation(algorithm.actor, rows.observations, noisy_actions, step, penalized=False)
    assert torch.equal(value, torch.where(step == 1, 2.0, 5.0))
    assert {2.0, 5.0} == set(value.tolist())


def test_bandits_without_a_future_sample_no_paths(monkeypatch: pytest.MonkeyPatch):
    algorithm = make(critic__discount=0.0)
    monkeypatch.setattr(algorithm, "rollout", lambda *_, **__: pytest.fail("a path was sampled"))
    rows = batch()
    loss, _ = algorithm.q_loss(rows, penalized=True)
    q = algorithm.critic["q"](rows.observations, rows.actions)
    torch.testing.assert_close(loss, (q - rows.rewards).square().mean())


def test_exact_values_of_the_eight_gaussians_satisfy_the_backup():
    """The optimal actor denoises exp(Q / eta) times the data, and V_n = eta log E[exp(Q / eta) | a^n]."""
    mixture, q = eight_gaussians()
    eta, steps = 0.2, 50
    target, _ = mixture.tilted(q, 1 / eta)
    algorithm = make(eta=eta, rho=0.0, diffusion_steps=steps, clip=None, critic__discount=0.0, samples=200).double()
    schedule = algorithm.schedule

    class Noise(nn.Module):
        def __init__(self, of: object) -> None:
            super().__init__()
            self.of = of

        def forward(self, x: Tensor, step: Tensor, observations: Tensor) -> Tensor:
            alpha, sigma = schedule.alpha(step), schedule.sigma(step)
            return -sigma[:, None] * self.of.diffused(alpha, sigma).score(x)

    class ExactQ(nn.Module):
        def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
            return (eta * intermediate_energy(mixture, q, 1 / eta, actions, 1.0, 0.0)[0])[None]

    class ExactV(nn.Module):
        def forward(self, observations: Tensor, x: Tensor, step: Tensor) -> Tensor:
            flat, step = x.flatten(0, 1), step.expand(x.shape[:-1]).flatten()
            alpha, sigma = schedule.alpha(step), schedule.sigma(step)
            return (eta * intermediate_energy(mixture, q, 1 / eta, flat, alpha, sigma)[0]).view(1, *x.shape[:-1])

    algorithm.target_behavior, actor = Noise(mixture), Noise(target)
    algorithm.target_critic["q"], algorithm.target_critic["v"] = ExactQ(), ExactV()
    generator = torch.Generator().manual_seed(0)
    actions, _ = target.sample(1000, generator)
    rows = Batch(torch.zeros(1000, 3).double(), actions, *[torch.zeros(1000)] * 3)
    step, noisy_actions, _ = algorithm.noised(rows)
    noisy_actions = noisy_actions.double()
    backed_up, penalty = algorithm.continuation(actor, rows.observations, noisy_actions, step, penalized=True)
    alpha, sigma = schedule.alpha(step), schedule.sigma(step)
    value = eta * intermediate_energy(mixture, q, 1 / eta, noisy_actions, alpha, sigma)[0]
    # Exact for infinitely many steps, where a step's Gaussian is the posterior; with 50 the mean error is 6% of the
    # penalty (1.4% at 400). Left out, or weighed twice, the penalty would make it 100%.
    assert (backed_up - value).mean().abs() < 0.15 * (eta * penalty).mean()
    assert (backed_up - value).abs().mean() < 0.003  # where values span 1: measured 0.0015, mostly of the 200 samples
    # V_N is the same everywhere: eta times the log of the mean of exp(Q / eta) over the data
    constant = eta * (torch.logsumexp(torch.arange(8).double() / 7 / eta, 0) - math.log(8))
    far = torch.randn(200, 2, generator=generator).double()
    last = intermediate_energy(mixture, q, 1 / eta, far, schedule.alphas[-1], schedule.sigmas[-1])[0]
    assert (eta * last - constant).abs().max() < 0.2  # x_N still knows 8% of x_0; measured 0.11


# ---------------------------------------------------------------- lean arithmetic against the plain form


def test_steps_are_uniform_and_those_that_need_q_come_first():
    algorithm = make()
    rows = batch(13)
    counts = torch.zeros(6)
    for _ in range(500):
        step, _, _ = algorithm.noised(rows)
        assert (step.diff() >= 0).all()
        assert 13 // 5 <= (step == 1).sum() <= -(-13 // 5)
        counts += torch.bincount(step, minlength=6)
    # each count of 1300 deviates by less than 500 roundings of one row, independent: sqrt(500) / 2 = 11
    assert counts[0] == 0
    assert (counts[1:] - 1300).abs().max() < 55


def test_routed_continuation_equals_the_plain_form():
    algorithm = make(rho=0.7, eta=0.4)
    for i, module in enumerate((algorithm.actor, algorithm.target_critic)):
        shake(module, i)
    rows = batch(13)
    step, noisy_actions, _ = algorithm.noised(rows)
    state = algorithm.noise.get_state()
    value, _ = algorithm.continuation(algorithm.actor, rows.observations, noisy_actions, step, penalized=True)

    # all rows by both ensembles, all samples drawn for both, observations repeated, steps embedded one by one
    schedule, members, samples, first = algorithm.schedule, 3, 4, 13 // 5
    policies = (algorithm.actor, algorithm.target_behavior)
    epsilon, behavior = (policy(noisy_actions, step, rows.observations) for policy in policies)
    x0 = ((noisy_actions - schedule.sigmas[step][:, None] * epsilon) / schedule.alphas[step][:, None]).clamp(-1, 1)
    mean = schedule.posterior_clean[step][:, None] * x0 + schedule.posterior_noisy[step][:, None] * noisy_actions
    algorithm.noise.set_state(state)
    noise = torch.zeros(13, samples, 2)
    noise[first:] = algorithm.noise.normal(13, samples, 2)[first:]
    spread = torch.where(step > 1, schedule.betas[step].sqrt(), 0.0)
    below = (mean[:, None] + spread[:, None, None] * noise).flatten(0, 1)
    observations, steps = rows.observations.repeat_interleave(samples, 0), step.repeat_interleave(samples, 0)
    q = algorithm.target_critic["q"](observations, below).view(members, 13, samples).mean(-1)
    v = algorithm.target_critic["v"](observations, below, steps - 1).view(members, 13, samples).mean(-1)
    values = torch.where(step == 1, q, v)
    plain = values.mean(0) - 0.7 * values.std(0, correction=0)
    plain = plain - 0.4 * algorithm.step_kl(epsilon, behavior, step)
    # float32 sums in another order
    torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(each.sum(), list(algorithm.actor.parameters())) for each in (value, plain)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_rollout_equals_the_plain_sampler():
    algorithm = make()
    shake(algorithm.target_actor)
    rows = batch(6)
    state = algorithm.noise.get_state()
    with torch.no_grad():
        actions, penalty = algorithm.rollout(rows.observations, penalized=True)
        algorithm.noise.set_state(state)
        noise = algorithm.noise.normal(6, 5, 4, 2).movedim(1, 0).flatten(1, 2)
        observations = rows.observations.repeat_interleave(4, 0)
        schedule, x, total = algorithm.schedule, noise[0], 0.0
        for n in range(5, 0, -1):
            step = torch.full((24,), n)
            epsilon, behavior = (p(x, step, observations) for p in (algorithm.target_actor, algorithm.target_behavior))
            total = total + schedule.betas[n] / (2 * (1 - schedule.betas[n]) * schedule.sigmas[n] ** 2) * (
                epsilon - behavior
            ).square().sum(-1)
            x0 = ((x - schedule.sigmas[n] * epsilon) / schedule.alphas[n]).clamp(-1, 1)
            x = schedule.posterior_mean(x0, x, step)
            if n > 1:
                x = x + schedule.betas[n].sqrt() * noise[6 - n]
    torch.testing.assert_close(actions.flatten(0, 1), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(penalty, total.view(6, 4).mean(1), rtol=1e-4, atol=1e-5)
    assert actions.abs().max() <= 1


# ---------------------------------------------------------------- phases, targets, learning rates


@pytest.mark.parametrize("cls", [BDPO, BDPOGaussian, BDPODeterministic])
def test_warm_up_leaves_the_actor_and_every_fifth_step_moves_it(cls: type[BDPO]):
    algorithm = make(cls, warmup_steps=3, actor_every=2, pretrain_steps=2)
    callback = EMATargets()
    callback.on_fit_start(None, algorithm)
    moved: dict[str, list[int]] = {}
    for step in range(1, 11):
        before = {name: value.clone() for name, value in algorithm.state_dict().items()}
        phase, begins = phase_at(algorithm.phases(), algorithm.gradient_step)
        if algorithm.gradient_step == begins:
            phase.begin()
            before = {name: value.clone() for name, value in algorithm.state_dict().items()}
        phase.update(batch(seed=step))
        algorithm.gradient_step += 1
        algorithm.target_updates.update(algorithm.gradient_step - algorithm.main_start)
        for name in ("behavior", "target_behavior", "actor", "target_actor", "critic", "target_critic"):
            now = {k: v for k, v in algorithm.state_dict().items() if k.startswith(f"{name}.")}
            if any(not torch.equal(v, before[k]) for k, v in now.items()):
                moved.setdefault(name, []).append(step)
    # two of pretraining, three of warm-up; then main steps 4, 6 and 8 are gradient steps 6, 8 and 10
    assert moved["critic"] == moved["target_critic"] == list(range(3, 11))
    assert moved["actor"] == moved["target_actor"] == [6, 8, 10]
    assert moved["behavior"] == moved["target_behavior"] == [1, 2, 6, 8, 10]


def test_a_frozen_behavior_model_stays(monkeypatch: pytest.MonkeyPatch):
    algorithm = make(frozen_behavior=True)
    before = [p.clone() for p in algorithm.behavior.parameters()]
    info = algorithm.update(batch())
    assert "policy_loss" in info
    assert all(torch.equal(a, b) for a, b in zip(before, algorithm.behavior.parameters(), strict=True))


def test_what_the_penalty_refers_to_is_frozen_with_the_behavior_model():
    """The exponential moving average lags behind its network, so that it would go on moving."""
    for frozen in (True, False):
        algorithm = make(frozen_behavior=frozen, warmup_steps=0, actor_every=1)
        EMATargets().on_fit_start(None, algorithm)  # type: ignore[arg-type]
        shake(algorithm.behavior)
        before = weights(algorithm.target_behavior)
        for _ in range(4):
            algorithm.gradient_step += 1
            algorithm.update_targets()
        stays = all(torch.equal(a, b) for a, b in zip(before, algorithm.target_behavior.parameters(), strict=True))
        assert stays == frozen


def test_a_frozen_behavior_models_learning_rate_decays_over_pretraining():
    algorithm = make(frozen_behavior=True, pretrain_steps=100)
    rates = []
    for algorithm.gradient_step in (0, 50, 100, 500):
        rates.append(rate(algorithm, algorithm.optimizer_specs()["behavior"]) / 3e-4)
    assert rates == pytest.approx([1, 0.5, 0, 0])


def test_actors_learning_rate_decays_in_its_own_steps():
    algorithm = make(actor_every=5, warmup_steps=100, actor_learning_rate=1.0, critic__learning_rate=1.0)
    specs = algorithm.optimizer_specs()
    algorithm.gradient_step = 600  # of 1000; the actor has made 100 steps
    assert rate(algorithm, specs["q"]) == pytest.approx(0.5 * (1 + math.cos(0.6 * math.pi)))
    assert rate(algorithm, specs["actor"]) == pytest.approx(0.5 * (1 + math.cos(0.1 * math.pi)))
    assert rate(algorithm, specs["behavior"]) == 3e-4


def test_the_highest_mean_q_is_selected():
    algorithm = make(acting__candidates=16)
    algorithm.gradient_step = 1
    algorithm.target_critic["q"] = FirstCoordinate(-1.0, 3.0)
    observations = batch().observations
    with torch.no_grad():
        actions = algorithm.sample_actions(observations, torch.Generator().manual_seed(0))
        candidates = algorithm.sample_policy(algorithm.target_actor, observations, 16, torch.Generator().manual_seed(0))
    assert torch.equal(actions[:, 0], candidates[..., 0].amax(1))


def test_a_single_member_cannot_have_a_lower_bound():
    with pytest.raises(UserError, match="members"):
        make(critic__members=1, rho=1.0)
    make(critic__members=1, rho=0.0).update(batch())


def test_figures_show_one_path_in_stretches():
    algorithm = make(diffusion_steps=50, clip=None)
    observations = torch.zeros(7, 3)
    with torch.no_grad():
        maps = algorithm.figure_maps(observations, torch.rand(7, 2))
        paths = algorithm.figure_paths(observations, torch.Generator().manual_seed(0))
    assert list(maps) == list(paths) == ["V, n = 50", "V, n = 30", "V, n = 15", "V, n = 5", "Q"]
    assert [len(stretch) - 1 for stretch in paths.values()] == [20, 15, 10, 5, 0]
    for stretch, following in zip(list(paths.values())[:-1], list(paths.values())[1:], strict=True):
        assert torch.equal(stretch[-1], following[0])


# ---------------------------------------------------------------- one-step policies


def test_divergence_of_gaussians_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    one, two = (
        Gaussian(torch.randn(6, 3, generator=generator), torch.rand(6, 3, generator=generator) + 0.1) for _ in range(2)
    )
    expected = kl_divergence(Normal(*one), Normal(*two)).sum(-1)
    torch.testing.assert_close(one.divergence(two), expected, rtol=1e-5, atol=1e-5)
    actions = torch.randn(6, 3, generator=generator)
    torch.testing.assert_close(one.cloning_loss(actions), -Normal(*one).log_prob(actions).sum(-1))
    noise = torch.randn(6, 5, 3, generator=generator)
    torch.testing.assert_close(one.sample(noise)[:, 2], one.mean + one.std * noise[:, 2])


def test_divergence_of_actions_is_half_their_squared_distance():
    one, two = Dirac(torch.tensor([[1.0, 2.0]])), Dirac(torch.tensor([[0.0, 4.0]]))
    assert one.divergence(two).item() == 2.5
    assert one.sample(torch.randn(1, 3, 2)).tolist() == [[[1.0, 2.0]] * 3]


def test_selection_and_targets_see_clamped_actions():
    algorithm = make(BDPOGaussian)
    observations = batch().observations
    for actions in (
        algorithm.rollout(observations, penalized=False)[0],
        algorithm.sample_policy(algorithm.actor, observations, 50, None),
    ):
        assert actions.abs().max() == 1


def test_one_step_policy_loss_adds_up():
    algorithm = make(BDPOGaussian, eta=0.5, rho=0.0)
    shake(algorithm.actor)
    algorithm.target_critic["q"] = FirstCoordinate(1.0, 2.0, 3.0)
    rows = batch()
    state = algorithm.noise.get_state()
    loss, _ = algorithm.policy_loss(rows)
    algorithm.noise.set_state(state)
    policy, behavior = algorithm.actor(rows.observations), algorithm.target_behavior(rows.observations)
    samples = policy.sample(algorithm.noise.normal(12, 4, 2))
    assert samples.abs().max() > 1, "some lie outside of the box, where Q has never seen an action"
    q = 2 * samples.clamp(-1, 1)[..., 0].mean(1)
    torch.testing.assert_close(loss, -(q - 0.5 * policy.divergence(behavior)).mean())
