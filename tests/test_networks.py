import math

import pytest
import torch
from torch import nn

from lit_offrl.networks.critics import EnsembleQ, ValueNetwork
from lit_offrl.networks.embeddings import SinusoidalEmbedding
from lit_offrl.networks.mlp import Mish
from lit_offrl.networks.policies import DiffusionMLP, TanhGaussian, TanhGaussianPolicy


def test_mish_equals_torch_forward_and_backward():
    x = torch.linspace(-60, 60, 4001).requires_grad_()
    reference_x = x.detach().clone().requires_grad_()
    ours, reference = Mish()(x), nn.functional.mish(reference_x)
    weight = torch.linspace(-1, 1, 4001)
    (ours * weight).sum().backward()
    (reference * weight).sum().backward()
    # float32 rounding at |x| = 60 is 4e-6
    torch.testing.assert_close(ours, reference, atol=4e-6, rtol=1e-6)
    torch.testing.assert_close(x.grad, reference_x.grad, atol=2e-6, rtol=1e-6)


def test_mish_without_gradients_equals_torch():
    x = torch.linspace(-120, 120, 10_001)
    with torch.no_grad():
        torch.testing.assert_close(Mish()(x), nn.functional.mish(x), rtol=0, atol=2e-6)


def test_mish_has_the_right_derivative_in_double_precision():
    x = torch.linspace(-8, 8, 17, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(Mish(), (x,))


def test_sinusoidal_embedding_by_hand():
    embedded = SinusoidalEmbedding(16)(torch.tensor([0.7]))[0]
    angles = [0.7 * 10000 ** (-k / 7) for k in range(8)]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(embedded, torch.tensor(expected))


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (EnsembleQ(29, 8), None),
        (DiffusionMLP(29, 8), 214_328),
        (DiffusionMLP(11, 3), 207_155),
        (TanhGaussianPolicy(29, 8), 143_376),
        (TanhGaussianPolicy(11, 3), 136_198),
    ],
)
def test_parameter_counts_equal_the_authors(network: nn.Module, count: int | None):
    parameters = sum(p.numel() for p in network.parameters())
    if count is None:  # the authors' critic module holds both Q and V
        parameters += sum(p.numel() for p in ValueNetwork(29).parameters())
        count = 425_731
    assert parameters == count


def test_q_networks_are_normalised_and_the_value_network_is_not():
    assert sum(isinstance(m, nn.LayerNorm) for m in EnsembleQ(4, 2).modules()) == 6
    assert not any(isinstance(m, nn.LayerNorm) for m in ValueNetwork(4).modules())


def test_diffusion_network_is_linear_before_its_second_layer():
    network = DiffusionMLP(4, 2, hidden_dim=8)
    assert [type(m) for m in network.layers] == [nn.Linear, Mish, nn.Linear, Mish, nn.Linear, Mish, nn.Linear]


def test_policy_initialisation_is_orthogonal_with_zero_bias():
    policy = TanhGaussianPolicy(5, 2, (16, 16, 16))
    for layer in policy.layers:
        if isinstance(layer, nn.Linear):
            gram = (
                layer.weight @ layer.weight.T
                if layer.out_features <= layer.in_features
                else layer.weight.T @ layer.weight
            )
            torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)
            assert not layer.bias.any()


def test_log_std_is_clamped():
    policy = TanhGaussianPolicy(1, 1, (4,))
    nn.init.zeros_(policy.layers[-1].weight)
    for raw, expected in ((-100.0, math.exp(-5)), (100.0, math.exp(2)), (0.5, math.exp(0.5))):
        nn.init.constant_(policy.layers[-1].bias, raw)
        assert policy(torch.zeros(1, 1)).std.item() == pytest.approx(expected, rel=1e-6)


def test_log_density_by_hand():
    mean, std, action = 0.3, 0.5, 0.8
    u = math.atanh(action / 1.001)
    one = -0.5 * ((u - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    density = TanhGaussian(torch.full((1, 2), mean), torch.full((1, 2), std)).log_density(torch.full((1, 2), action))
    assert density.item() == pytest.approx(2 * one, rel=1e-5)  # summed over dimensions, no Jacobian
    border = TanhGaussian(torch.zeros(1, 1), torch.ones(1, 1)).log_density(torch.ones(1, 1))
    assert border.item() == pytest.approx(-0.5 * 3.8**2 - 0.5 * math.log(2 * math.pi), rel=1e-3)


def test_q_networks_broadcast_states_over_actions():
    torch.manual_seed(0)
    network, observations, actions = EnsembleQ(3, 2, (8, 8)).double(), torch.randn(4, 3), torch.randn(4, 5, 2)
    observations, actions = observations.double(), actions.double()
    values = network(observations[:, None], actions)
    assert values.shape == (2, 4, 5)
    for k in range(5):
        torch.testing.assert_close(values[..., k], network(observations, actions[:, k]))
