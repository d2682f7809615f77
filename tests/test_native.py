"""The kernels compute what PyTorch's modules compute, no more than is asked for, and do without a compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_offrl import native
from lit_offrl.networks import bottleneck, energy_guidance
from lit_offrl.networks.mlp import MLP, Ensemble, Mish, mlp

needs_kernels = pytest.mark.skipif(not native.available(), reason="no kernels could be compiled here")
ACTIVATIONS = {"Mish": Mish, "SiLU": nn.SiLU, "ReLU": nn.ReLU}
# float32: sums of up to 256 terms in another order, and exponentials within 2 units in the last place
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def plain(network: MLP, *inputs: Tensor, activated: bool = False) -> Tensor:
    """Return what PyTorch's modules make of it."""
    fused, network.fused = network.fused, False
    try:
        return network.after_first(*inputs) if activated else network(*inputs)
    finally:
        network.fused = fused


@needs_kernels
@pytest.mark.parametrize("rows", [(256,), (1,), (0,), (3, 5), (2, 1, 4)])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_perceptrons(activation: str, layer_norm: bool, rows: tuple[int, ...]):
    network = mlp((14, 40, 24, 3), ACTIVATIONS[activation], layer_norm=layer_norm)
    assert network.fused
    for activated, width in ((False, 14), (True, 40)):
        x = (3 * torch.randn(*rows, width)).requires_grad_()
        forward = network.after_first if activated else network
        ours, theirs = forward(x), plain(network, x, activated=activated)
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
        with torch.no_grad():
            torch.testing.assert_close(forward(x), theirs, **TOLERANCE)
        weight, wanted = torch.randn(*rows, 3), [x, *network[2 if activated else 0 :].parameters()]
        if activated and layer_norm:
            wanted += network[1].parameters()
        for one, two in zip(
            torch.autograd.grad((ours * weight).sum(), wanted),
            torch.autograd.grad((theirs * weight).sum(), wanted),
            strict=True,
        ):
            assert one.is_contiguous()
            torch.testing.assert_close(one, two, **TOLERANCE)


@needs_kernels
def test_of_large_and_strange_numbers():
    """The kernels' exponential is cut off where nothing changes any more; what is not a number stays so."""
    network = mlp((1, 1, 1))
    with torch.no_grad():
        for layer in (network[0], network[2]):
            layer.weight.fill_(1.0), layer.bias.zero_()
    x = torch.tensor([[-1e4], [-90.0], [-20.0], [-1.0], [0.0], [1.0], [20.0], [90.0], [1e4]]).requires_grad_()
    y = network(x)
    torch.testing.assert_close(y, nn.functional.mish(x), rtol=1e-6, atol=2e-6)
    (slope,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(nn.functional.mish(x).sum(), x)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=2e-6)
    for activation in ACTIVATIONS.values():
        assert mlp((2, 3, 1), activation)(torch.tensor([[torch.nan, 1.0]])).isnan().all()


@needs_kernels
@pytest.mark.parametrize("members", [1, 2, 5])
def test_threads_change_nothing_but_the_order_of_sums(members: int):
    """One network is shared by the threads, several are given out to them."""
    networks = Ensemble(mlp((8, 256, 256, 1), layer_norm=True) for _ in range(members))
    x = torch.randn(700, 8, requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        loss = networks(*[(x,)] * members).square().mean()
        return torch.autograd.grad(loss, [x, *networks.parameters()])

    one = gradients()
    torch.set_num_threads(2)
    try:
        two, again = gradients(), gradients()
    finally:
        torch.set_num_threads(1)
    for a, b, c in zip(one, two, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
        assert torch.equal(b, c)


@needs_kernels
@pytest.mark.parametrize("rows", [(6, 1), (50, 1)])  # one product for all inputs, and products of each
def test_ensembles_are_their_members(rows: tuple[int, int]):
    networks = Ensemble(mlp((4 + 2, 16, 16, 1), layer_norm=True) for _ in range(3))
    inputs = [(torch.randn(*rows, 4), torch.randn(rows[0], 3, 2)) for _ in networks]
    weight = torch.randn(3, rows[0], 3, 1)
    together = networks(*inputs)
    singly = torch.stack([plain(network, *own) for network, own in zip(networks, inputs, strict=True)])
    torch.testing.assert_close(together, singly, **TOLERANCE)
    parameters = [p for network in (networks[0], networks[2]) for p in network.parameters()]  # one stays frozen
    for one, two in zip(
        torch.autograd.grad((together * weight).sum(), parameters),
        torch.autograd.grad((singly * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, two, **TOLERANCE)


@needs_kernels
def test_a_second_derivative_is_refused():
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="a first derivative only"):
        torch.autograd.grad(mlp((3, 8, 1))(x).sum(), x, create_graph=True)


@needs_kernels
def test_frozen_layers_cost_no_gradients_of_weights():
    network, x = mlp((6, 32, 32, 2)), torch.randn(10, 6, requires_grad=True) * 1  # the counter takes no leaf
    first, second, third = (2 * 10 * each.weight.numel() for each in network if isinstance(each, nn.Linear))
    onward = first + second + third

    def flops(*wanted: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(network(x).sum(), wanted)
        total: int = counter.get_total_flops()
        return total - onward  # on the way back alone

    assert flops(x) == onward
    assert flops(*network.parameters()) == onward + second + third
    assert flops(x, network[2].weight) == onward + second


@needs_kernels
def test_flops_are_those_of_the_modules():
    network, x = mlp((6, 32, 32, 2), layer_norm=True), torch.randn(10, 6)
    totals = []
    for run in (network, lambda x: plain(network, x)):
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(run(x).sum(), list(network.parameters()))
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@needs_kernels
def test_modules_before_and_after_are_run_too():
    network = MLP(nn.Tanh(), *mlp((4, 8, 3)), Mish())
    x = torch.randn(5, 4)
    torch.testing.assert_close(network(x), plain(network, x), **TOLERANCE)
    assert not MLP(nn.Linear(2, 2)).fused  # nothing to fuse
    assert not MLP(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).fused  # unknown
    assert not MLP(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.SiLU(), nn.Linear(2, 2)).fused  # not one activation


@needs_kernels
@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_schemas_and_traces(layer_norm: bool, activated: bool):
    """What tracing is told of the kernels holds, and their derivative can be traced."""
    parameters = list(mlp((6, 8, 2), layer_norm=layer_norm).parameters())[2 if activated else 0 :]
    x = torch.randn(5, 8 if activated else 6, requires_grad=True)
    torch.library.opcheck(torch.ops.lit_offrl_native.mlp, ([x], parameters, "Mish", layer_norm, activated, 1e-5))


@needs_kernels
def test_schemas_of_kernels_without_derivatives():
    block, network = energy_guidance.FeatureBlock(12, 16, features=4), bottleneck.BottleneckNetwork(3, 7, hidden_dim=40)
    ops = torch.ops.lit_offrl_native
    tests = ("test_schema", "test_faketensor")
    parameters = [p.detach() for each in (block.first, block.second, block.skip) for p in each.parameters()]
    torch.library.opcheck(
        ops.feature_block, (torch.randn(3, 5, 12), torch.randn(3, 1, 16), parameters), test_utils=tests
    )
    rest = (
        torch.randn(3, 1, 40),
        torch.randn(40, 3),
        torch.randn(40),
        [p.detach() for p in network.blocks.parameters()],
    )
    torch.library.opcheck(ops.bottleneck_gradient, (torch.randn(3, 5, 3), *rest, 1e-5), test_utils=tests)


@needs_kernels
@pytest.mark.parametrize("action_dim", [1, 3, 5, 8])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 2)])
def test_the_gradient_of_a_bottleneck_network(shape: tuple[int, int], action_dim: int, monkeypatch: pytest.MonkeyPatch):
    """Derivatives that go forward are those that go backward."""
    states = shape[0]
    network = bottleneck.BottleneckNetwork(action_dim, 7, hidden_dim=40)  # no multiple of the kernel's 16
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    actions, time, observations = torch.randn(*shape, action_dim), torch.rand(states, 1), torch.randn(states, 1, 7)
    with torch.no_grad():
        monkeypatch.setattr(bottleneck, "FORWARD_ROWS", 0)
        backward = network.gradient(observations)(actions, time)
        monkeypatch.setattr(bottleneck, "FORWARD_ROWS", 100)
        monkeypatch.setattr(bottleneck, "FORWARD_DIMENSIONS", 100)
        forward = network.gradient(observations)(actions, time)
    assert forward.shape == backward.shape == (*shape, action_dim)
    assert not torch.equal(forward, backward)
    torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-4 * backward.abs().max().item())
    inputs = actions.clone().requires_grad_()
    (expected,) = torch.autograd.grad(network(inputs, time, observations).sum(), inputs)
    torch.testing.assert_close(forward, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@needs_kernels
def test_blocks_of_a_noise_network():
    for width_in in (12, 16):  # with a linear skip and without
        block = energy_guidance.FeatureBlock(width_in, 16, features=4)
        x, shift = torch.randn(3, 5, width_in), torch.randn(3, 1, 16)
        forward = block.after_features()
        with torch.no_grad():
            torch.testing.assert_close(forward(x, shift), forward(x.requires_grad_(), shift), **TOLERANCE)
            kernel = forward(x, shift)
        torch.testing.assert_close(kernel, forward(x, shift), **TOLERANCE)


def test_everything_works_without_kernels(monkeypatch: pytest.MonkeyPatch):
    network, x = mlp((4, 8, 3), layer_norm=True), torch.randn(5, 4)
    with_kernels = network(x)
    monkeypatch.setattr(native, "_found", False)
    torch.testing.assert_close(network(x), with_kernels, **TOLERANCE)


PROGRAM = """
import torch
from lit_offrl import native
from lit_offrl.networks.mlp import mlp
print(native.available(), mlp((2, 4, 1))(torch.ones(1, 2)).shape)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels are for Linux")
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CXX": "no-such-compiler"}, ["no kernels", "there is no compiler no-such-compiler", "slower"]),
        ({"CXX": "false"}, ["no kernels", "exit status 1"]),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, ["no kernels", "/proc/nowhere", "XDG_CACHE_HOME"]),
        ({native.SWITCH: "0"}, []),
    ],
)
def test_without_a_compiler(
    environment: dict[str, str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"XDG_CACHE_HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    process = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["False", "torch.Size([1,", "1])"]
    assert all(word in process.stderr for word in words)
    assert bool(process.stderr) == bool(words)
    assert [each.name for each in tmp_path.rglob("kernels*")] == []
