"""Adam with gradients as arguments against torch's own."""

import copy

import torch
from torch import nn

from lit_offrl.algorithms.optimizers import Adam, OptimizerSpec, adam_kernel, clip_


def networks(count: int) -> list[nn.Module]:
    made = []
    for _ in range(count):
        torch.manual_seed(0)
        made.append(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    return made


def gradients(network: nn.Module, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in network.parameters()]


def test_it_is_torchs_fused_adam_bit_for_bit():
    ours, theirs = networks(2)
    optimizer = Adam(ours.parameters(), 1e-2)
    reference = torch.optim.Adam(theirs.parameters(), lr=1e-2, fused=True)
    for step in range(20):
        rate = 1e-2 / (step + 1)
        # A scalar tensor of the rate, as float32; the reference takes the same number.
        optimizer.apply(gradients(ours, step), torch.tensor(rate))
        reference.param_groups[0]["lr"] = torch.tensor(rate).item()
        for parameter, gradient in zip(theirs.parameters(), gradients(theirs, step), strict=True):
            parameter.grad = gradient
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_with_weight_decay_it_is_torchs_fused_adamw():
    ours, theirs = networks(2)
    optimizer = Adam(ours.parameters(), 1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=torch.tensor(1e-2).item(), weight_decay=0.1, fused=True)
    for step in range(20):
        optimizer.apply(gradients(ours, step), torch.tensor(1e-2))
        for parameter, gradient in zip(theirs.parameters(), gradients(theirs, step), strict=True):
            parameter.grad = gradient
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_learning_rate_warms_up_linearly():
    spec = OptimizerSpec((), 0.5, warmup=4)
    assert [spec.rate_at(step, 100) for step in range(-1, 6)] == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_its_state_is_torchs_and_comes_back():
    ours, theirs, again = networks(3)
    optimizer = Adam(ours.parameters(), 1e-2)
    for step in range(3):
        optimizer.apply(gradients(ours, step), torch.tensor(1e-2))
    saved = copy.deepcopy(optimizer.state_dict())  # else both would step the same tensors
    for network in (theirs, again):
        network.load_state_dict(ours.state_dict())
    reference = torch.optim.Adam(theirs.parameters(), lr=1e-2, fused=True)
    reference.load_state_dict(copy.deepcopy(saved))
    reference.param_groups[0]["lr"] = torch.tensor(1e-2).item()
    for parameter, gradient in zip(theirs.parameters(), gradients(theirs, 3), strict=True):
        parameter.grad = gradient
    reference.step()
    other = Adam(again.parameters(), 1e-2)
    other.apply(gradients(again, 99), torch.tensor(0.0))  # what it has cached must not survive
    other.load_state_dict(saved)
    for each in (optimizer, other):
        each.apply(gradients(ours, 3), torch.tensor(1e-2))
    for a, b, c in zip(ours.parameters(), again.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_the_traceable_operator_is_the_kernel():
    one, two = networks(2)
    states = []
    for network, step in ((one, adam_kernel), (two, torch.ops.lit_offrl.adam)):
        parameters = [p.detach() for p in network.parameters()]
        moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
        steps = torch.zeros(())
        for count in range(3):
            step(parameters, *moments, steps, gradients(network, count), torch.tensor(1e-2), 0.9, 0.999, 1e-8, 0.1)
        states.append([*parameters, *moments[0], *moments[1], steps])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    torch.library.opcheck(
        torch.ops.lit_offrl.adam.default,
        (parameters, *moments, steps, gradients(two, 0), torch.tensor(1e-2), 0.9, 0.999, 1e-8, 0.1),
    )


def test_clipping_is_torchs():
    for norm in (0.1, 100.0):
        (network,) = networks(1)
        ours = gradients(network, 0)
        for parameter, gradient in zip(network.parameters(), gradients(network, 0), strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(network.parameters(), norm)
        clip_(ours, norm)
        for parameter, gradient in zip(network.parameters(), ours, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=0)
