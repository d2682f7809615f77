"""What energy-guided policies share: networks, guided sampling, support actions and critics."""

from __future__ import annotations

import pytest
import torch
from energy_oracles import ExactNoise, GivenGradient, scales, tensor
from mixtures import ComponentQ, GaussianMixture, intermediate_energy
from tiny import ACTION_DIM, OBSERVATION_DIM, STATES, batch, double, moved, nested, shake
from torch import Tensor
from torch.nn import functional as F

from lit_offrl.algorithms import AEPO, QGPO
from lit_offrl.algorithms.critic_losses import conservative_penalty, in_support_value
from lit_offrl.algorithms.energy_guided import rescaled
from lit_offrl.errors import UserError
from lit_offrl.networks.energy_guidance import EnergyNetwork, NoiseNetwork


def make(cls: type[AEPO] | type[QGPO] = QGPO, **options: object) -> AEPO | QGPO:
    """Return a small algorithm whose behavior model is final, on a dataset of 20 transitions."""
    torch.manual_seed(5)
    sizes = {
        "diffusion__hidden_dim": 16,
        "critic__hidden_dim": 16,
        "energy__hidden_dim": 16,
        "pretrain_steps": 0,
        "critic__steps": 0,
    }
    algorithm = cls(OBSERVATION_DIM, ACTION_DIM, **nested({**sizes, **options}))
    algorithm.configure_optimizers()
    generator = torch.Generator().manual_seed(6)
    algorithm.dataset_observations = torch.randn(STATES, OBSERVATION_DIM, generator=generator)
    algorithm.dataset_next_observations = torch.randn(STATES, OBSERVATION_DIM, generator=generator)
    shake(algorithm.target_q)
    return algorithm


# ---------------------------------------------------------------- networks


def inputs(observation_dim: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 3).double(), torch.rand(6).double(), torch.randn(6, observation_dim or 4).double()


@pytest.mark.parametrize("observation_dim", [4, 0])
@pytest.mark.parametrize("layers", [3, 4])
def test_gradient_of_the_energy_is_that_of_autograd(observation_dim: int, layers: int):
    actions, time, observations = inputs(observation_dim)
    network = EnergyNetwork(3, observation_dim, hidden_dim=16, layers=layers).double()
    shake(network)
    leaf = actions.clone().requires_grad_()
    expected = torch.autograd.grad(network(leaf, time, observations).sum(), leaf)[0]
    assert expected.abs().max() > 1e-3
    for grad_enabled in (True, False):
        with torch.set_grad_enabled(grad_enabled):
            ours = network.gradient(actions, time, observations)
        assert ours.requires_grad == grad_enabled
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)  # float64: sums in another order


def test_energy_is_the_network_of_action_time_features_and_observation():
    actions, time, observations = inputs()
    network = EnergyNetwork(3, 4, hidden_dim=16).double()
    hidden = torch.cat([actions, network.time(time), observations], dim=-1)
    linears = [layer for layer in network.layers if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in linears] == [16, 16, 16, 1]
    for layer in linears[:-1]:
        hidden = F.silu(layer(hidden))
    torch.testing.assert_close(network(actions, time, observations), linears[-1](hidden)[:, 0])


@pytest.mark.parametrize("observation_dim", [4, 0])
def test_networks_broadcast_states_over_actions(observation_dim: int):
    actions, time, observations = inputs(observation_dim)
    many = torch.stack([actions, 2 * actions, -actions], dim=1)
    energy = EnergyNetwork(3, observation_dim, hidden_dim=16).double()
    noise = NoiseNetwork(3, observation_dim, hidden_dim=16).double()
    shake(noise)
    shared = time[:, None], observations[:, None]
    for k in range(3):
        row = many[:, k], time, observations
        # float64: sums in another order
        torch.testing.assert_close(energy(many, *shared)[:, k], energy(*row))
        torch.testing.assert_close(noise(many, *shared)[:, k], noise(*row))
        gradient = energy.gradient(many, *shared)[:, k]
        torch.testing.assert_close(gradient, energy.gradient(*row))


def test_noise_network_is_qgpos_layer_by_layer():
    actions, time, observations = inputs()
    network = NoiseNetwork(3, 4, hidden_dim=16).double()
    shake(network)
    features = network.features(torch.cat([network.time(time), network.state(observations)], dim=-1))

    def block(module: torch.nn.Module, x: Tensor) -> Tensor:
        hidden = F.silu(module.first(x)) + module.features(F.silu(features))
        return F.silu(module.second(hidden)) + module.skip(x)

    one = block(network.down[0], actions)
    two = block(network.down[1], one)
    three = block(network.down[2], two)
    assert [each.shape[-1] for each in (one, two, three)] == [16, 8, 4]
    third = block(network.up[0], torch.cat([three, block(network.middle, three)], dim=-1))
    second = block(network.up[1], torch.cat([two, third], dim=-1))
    expected = network.head(torch.cat([one, second], dim=-1))
    torch.testing.assert_close(network(actions, time, observations), expected)


def test_noise_network_needs_widths_that_halve_twice():
    with pytest.raises(ValueError, match="multiple of 4"):
        NoiseNetwork(3, 4, hidden_dim=18)


def test_energy_keeps_full_precision_under_autocast():
    torch.manual_seed(1)
    network, actions, time, observations = EnergyNetwork(3, 4), torch.randn(6, 3), torch.rand(6), torch.randn(6, 4)
    expected = network(actions, time, observations), network.gradient(actions, time, observations)
    with torch.autocast("cpu", torch.bfloat16):
        ours = network(actions, time, observations), network.gradient(actions, time, observations)
    assert all(torch.equal(one, two) for one, two in zip(ours, expected, strict=True))


# ---------------------------------------------------------------- guidance


def scores() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    scale = tensor([0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 2.0, 0.0])
    return plain, plain + scale[:, None] * torch.randn(8, 3, generator=generator, dtype=torch.float64), scale


def test_rescaling_by_row_keeps_norms_and_directions_and_no_row_sees_another():
    plain, guided, scale = scores()
    result = rescaled(guided, plain, scale, "sample")
    torch.testing.assert_close(result.norm(dim=-1), plain.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(F.cosine_similarity(result, guided), torch.ones(8).double(), rtol=1e-12, atol=0)
    assert not torch.allclose(result[1], guided[1], rtol=0.01)
    for i in range(8):
        alone = rescaled(guided[i : i + 1], plain[i : i + 1], scale[i : i + 1], "sample")
        assert torch.equal(alone[0], result[i])


def test_rescaling_by_batch_keeps_the_norm_of_all_rows_of_a_scale():
    plain, guided, scale = scores()
    result = rescaled(guided, plain, scale, "batch")
    for value in (0.0, 1.0, 2.0):
        rows = scale == value
        torch.testing.assert_close(result[rows].norm(), plain[rows].norm(), rtol=1e-12, atol=0)
        ratio = result[rows] / guided[rows]
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-12, atol=0)
        alone = rescaled(guided[rows], plain[rows], scale[rows], "batch")
        torch.testing.assert_close(alone, result[rows], rtol=1e-12, atol=0)
    assert not torch.allclose(result[1].norm(), plain[1].norm(), rtol=0.01)


@pytest.mark.parametrize("rescale", ["none", "sample", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rescaling_leaves_what_is_not_guided_and_bears_zeros(rescale: str, dtype: torch.dtype):
    plain, guided, scale = (each.to(dtype) for each in scores())
    assert torch.equal(rescaled(guided, plain, scale, rescale)[scale == 0], plain[scale == 0])
    zero = torch.zeros(2, 3, dtype=dtype)
    assert torch.equal(rescaled(zero, zero, scale[1:3], rescale), zero)
    assert rescaled(zero, plain[:2], scale[1:3], rescale).isfinite().all()


def test_without_guidance_the_policy_is_the_behavior_model_and_f_is_not_evaluated():
    algorithm = make(AEPO)
    observations, noise = torch.randn(5, OBSERVATION_DIM), torch.randn(5, ACTION_DIM)
    algorithm.energy.gradient = lambda _: pytest.fail("f was evaluated")  # type: ignore[method-assign]
    alone = algorithm.guided_sample(observations, noise, [0.0])
    del algorithm.energy.gradient
    # the row of scale 0 beside guided ones is the same, in every way of rescaling
    scale = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0])
    for rescale in ("none", "sample", "batch"):
        algorithm.rescale = rescale
        result = algorithm.guided_sample(observations, noise, scale.tolist())
        assert torch.equal(result[scale == 0], alone[scale == 0])
        assert not result.requires_grad
        assert not torch.equal(result[scale > 0], alone[scale > 0])


@pytest.mark.parametrize("omega", [0.5, 1.0, 2.0])
def test_guided_sampling_shifts_a_gaussian_as_it_should(omega: float):
    """Of N(m, v) and Q = g a, the policy mu exp(omega beta Q) is N(m + omega beta v g, v), and f is linear in a_t."""
    mixture, g, beta = GaussianMixture.isotropic(tensor([[0.3, -0.2]]), 0.4), tensor([1.0, -0.5]), 2.0
    q = ComponentQ(slope=g)
    algorithm = make(diffusion__conditional=False).double()
    algorithm.behavior = ExactNoise(mixture)
    algorithm.energy = GivenGradient(lambda x, t: intermediate_energy(mixture, q, beta, x, *scales(t))[1])
    noise = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nothing = torch.zeros(50, OBSERVATION_DIM).double()
    plain, guided = (algorithm.guided_sample(nothing, noise, [each]) for each in (0.0, omega))
    shift = omega * beta * 0.16 * g
    # The flow is affine: the shift is the same for all noise. 15 evaluations solve it to 0.3%.
    torch.testing.assert_close(guided - plain, shift.expand(50, 2), rtol=0.005, atol=0)


def test_a_sweep_is_one_batch_and_each_actor_has_its_own_noise():
    algorithm = make(AEPO, sweep=[0.5, 2.0], pretrain_steps=1).double()
    algorithm.gradient_step = 2
    names = ["policy", "omega_2", "behavior", "policy", "omega_0.5", "omega_2", "policy"]
    observations = torch.randn(len(names), OBSERVATION_DIM).double()

    def streams() -> dict[str, torch.Generator]:
        return {name: torch.Generator().manual_seed(i) for i, name in enumerate(dict.fromkeys(names))}

    together, generators = algorithm.sample_each(observations, names, streams()), streams()
    for name in dict.fromkeys(names):
        rows = [i for i, each in enumerate(names) if each == name]
        alone = algorithm.actors()[name](observations[rows], generators[name])
        # float64: products of matrices of other sizes, enlarged by up to 1 / alpha = 150
        torch.testing.assert_close(together[rows], alone, rtol=0, atol=1e-9)


def test_actors_have_their_scales_once_there_is_guidance():
    algorithm = make(AEPO, omega=0.7, sweep=[0.1, 3.0], pretrain_steps=2, critic__steps=3)
    assert list(algorithm.actors()) == ["policy", "behavior", "omega_0.1", "omega_3"]
    algorithm.gradient_step = 5
    assert [algorithm.scale_of(name) for name in algorithm.actors()] == [0, 0, 0, 0]
    algorithm.gradient_step = 6
    assert [algorithm.scale_of(name) for name in algorithm.actors()] == [0.7, 0, 0.1, 3.0]


# ---------------------------------------------------------------- support actions


def test_support_is_a_function_of_the_seed_and_of_the_behavior_model():
    one, two, other = make(), make(), make(seed=1)
    two.noise.normal(7)  # the noise of training plays no part
    shake(two.energy)
    before = one.noise.get_state()
    first, second, third = (each.make_support() for each in (one, two, other))
    assert torch.equal(one.noise.get_state(), before)
    for a, b, c in zip(first, second, third, strict=True):
        assert a.shape == (STATES, 16, ACTION_DIM)
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert not torch.equal(*first)


def test_each_of_both_supports_is_the_same_with_and_without_the_other():
    both = make().make_support()
    next_ = make(AEPO, critic__kind="in_support").make_support()
    assert next_.actions is None
    assert torch.equal(next_.next_actions, both.next_actions)
    assert all(each is not None for each in make(AEPO, critic__kind="conservative").make_support())


def test_support_does_not_depend_on_the_size_of_pieces(monkeypatch: pytest.MonkeyPatch):
    algorithm = make().double()
    algorithm.dataset_observations = algorithm.dataset_observations.double()
    algorithm.dataset_next_observations = algorithm.dataset_next_observations.double()
    whole = algorithm.make_support()
    monkeypatch.setattr("lit_offrl.algorithms.support.SAMPLED_AT_ONCE", 3 * 16)
    for one, two in zip(whole, algorithm.make_support(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)  # float64: matrix products in pieces


def test_support_belongs_to_the_rows_of_the_dataset():
    algorithm, rows = make(), batch()
    algorithm.prepare_support(rows)
    support = algorithm.support_of(rows)
    assert torch.equal(support.actions, algorithm.support.actions[rows.rows])
    assert torch.equal(support.next_actions, algorithm.support.next_actions[rows.rows])
    made = algorithm.support
    algorithm.prepare_support(batch(seed=1))
    assert algorithm.support is made  # made once
    again = algorithm.support_of(batch(seed=1)).actions
    assert torch.equal(again, algorithm.support.actions[batch(seed=1).rows])


def test_support_is_at_the_observations():
    """Actions of a behavior model that has moved towards its observation differ from state to state."""
    algorithm = make(support_actions=2)
    algorithm.dataset_observations[7] = 50 * torch.ones(OBSERVATION_DIM)
    first = algorithm.make_support()
    algorithm.dataset_observations[7] = 0
    second = algorithm.make_support()
    changed = (first.actions != second.actions).any(-1).any(-1)
    assert changed.tolist() == [i == 7 for i in range(STATES)]
    assert torch.equal(first.next_actions, second.next_actions)


def test_without_observations_the_actions_of_a_batch_are_support():
    algorithm, rows = make(diffusion__conditional=False, support_actions=3), batch(5)
    actions = algorithm.support_of(rows).actions
    assert torch.equal(actions[3], rows.actions[[3, 4, 0]])
    assert algorithm.support is None


# ---------------------------------------------------------------- critics


def test_in_support_value_by_hand():
    q = tensor([[1.0, 2.0], [5.0, 5.0]])
    weight = 1 / (1 + torch.exp(tensor(-3.0)))  # softmax of 3 and 6
    torch.testing.assert_close(in_support_value(q, 3.0), torch.stack([2 * weight + 1 - weight, tensor(5.0)]))


def test_in_support_loss_by_hand():
    algorithm = make(critic__backup_beta=2.0, critic__discount=0.9)
    rows = batch()
    algorithm.prepare_support(rows)
    loss, _ = algorithm.critic_loss(rows)
    actions = algorithm.support.next_actions[rows.rows]
    goals = []
    for i in range(len(rows.rewards)):
        repeated = rows.next_observations[i].expand(16, -1)
        q = torch.minimum(*algorithm.target_q(repeated, actions[i]))
        value = (torch.softmax(2.0 * q, 0) * q).sum()
        goals.append(rows.rewards[i] if rows.terminals[i] else rows.rewards[i] + 0.9 * value)
    assert 0 < rows.terminals.sum() < len(rows.terminals)
    one, two = algorithm.critic["q"](rows.observations, rows.actions)
    goal = torch.stack(goals).detach()
    expected = ((one - goal).square().mean() + (two - goal).square().mean()) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)  # float32
    # the goal is a constant
    parameters = list(algorithm.critic.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_conservative_penalty_by_hand():
    q_data, q_others = tensor([[1.0, 0.0]]), tensor([[[1.0, 1.0], [0.0, 2.0]]])
    expected = tensor([[3.0, 2 + torch.e**2]]).log()  # log 3e - 1 and log(1 + 1 + e^2) - 0
    torch.testing.assert_close(conservative_penalty(q_data, q_others), expected)
    assert conservative_penalty(tensor([[9.0]]), tensor([[[-9.0]]])).item() > 0


def test_conservative_loss_is_the_in_support_loss_plus_the_penalty():
    plain, algorithm = (
        make(AEPO, critic__kind="in_support"),
        make(AEPO, critic__kind="conservative", critic__conservatism=0.7),
    )
    algorithm.units.limit.fill_(2.0)
    rows = batch()
    for each in (plain, algorithm):
        each.prepare_support(rows)
    asked: list[Tensor] = []
    algorithm.critic["q"].register_forward_pre_hook(lambda _, given: asked.append(given[1]))
    loss, info = algorithm.critic_loss(rows)
    torch.testing.assert_close(loss, plain.critic_loss(rows)[0] + 0.7 * info["penalty"])
    data, others = asked
    assert torch.equal(data, rows.actions)
    assert torch.equal(others[:, :16], algorithm.support.actions[rows.rows])
    uniform = others[:, 16:]
    assert uniform.shape == (12, 16, ACTION_DIM)
    # 384 numbers uniform in [-2, 2]: the mean is known to 0.06, the deviation is 2 / sqrt(3)
    assert uniform.abs().max() <= 2
    assert abs(uniform.mean()) < 5 * 0.06
    assert uniform.std().item() == pytest.approx(1.155, rel=0.1)
    q_data, q_others = (
        algorithm.critic["q"](o, a) for o, a in ((rows.observations, data), (rows.observations[:, None], others))
    )
    torch.testing.assert_close(info["penalty"], conservative_penalty(q_data, q_others).mean().detach())


@pytest.mark.parametrize(
    ("cls", "options"),
    [(QGPO, {}), *((AEPO, {"critic__kind": kind}) for kind in ("implicit", "in_support", "conservative"))],
)
def test_every_critic_learns_and_only_the_critic_does(cls: type[AEPO], options: dict[str, str]):
    algorithm = make(cls, **options)
    algorithm.prepare_support(batch())
    assert moved(algorithm, lambda: algorithm.critic_update(batch())) == {"critic"}
    assert ("v" in algorithm.critic) == (options.get("critic__kind") == "implicit")


def test_behavior_loss_is_a_sum_over_the_dimensions():
    algorithm = make().double()
    rows = double(batch())
    before = algorithm.noise.get_state()
    loss = algorithm.behavior_loss(rows)
    algorithm.noise.set_state(before)
    time, noisy, noise = algorithm.process.noised(rows.actions, algorithm.noise)
    error = algorithm.behavior(noisy, time, rows.observations) - noise
    torch.testing.assert_close(loss, error.square().mean() * ACTION_DIM)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"beta": 0.0}, "beta"),
        ({"omega": -1.0}, "omega"),
        ({"sweep": [1.0, -1.0]}, "sweep"),
        ({"support_actions": 1}, "support_actions"),
        ({"diffusion__hidden_dim": 18}, "multiple of 4"),
        ({"critic__expectile": 1.0}, "expectile"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], word: str):
    with pytest.raises(UserError, match=word):
        make(**options)
