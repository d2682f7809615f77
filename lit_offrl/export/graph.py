"""The whole decision of a policy as one graph of ATen operations, from raw observations and noise to raw actions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from lit_offrl.errors import UserError, one_line
from lit_offrl.export.draws import GivenDraws, NoiseInput, noise_inputs
from lit_offrl.policy import Policy


@dataclass(frozen=True)
class PolicyGraph:
    """The decision of a policy.

    Attributes:
        module: Maps observations `[n, observation_dim]`, and noise for each of `noise`, to actions `[n, action_dim]`.
        noise: The inputs after the observations, in their order.
        example: Inputs of the number of rows that was traced.
    """

    module: fx.GraphModule
    noise: list[NoiseInput]
    example: tuple[Tensor, ...]


def trace_policy(policy: Policy) -> PolicyGraph:
    """Return the graph of a policy; solvers are unrolled, gradients of energies are spelled out.

    `torch.export` by itself traces no `torch.autograd.grad`; `make_fx` does.

    Args:
        policy: On a CPU.

    Raises:
        UserError: The policy keeps a memory from step to step, draws noise in ways unknown here, or depends on its
            batch in ways that a graph cannot.
    """
    algorithm, spec = policy.algorithm, policy.spec
    if algorithm.has_memory:
        raise UserError(
            f"export: {spec.algorithm} keeps a memory of the episode from action to action, which a graph has not: use "
            "lit_offrl.load_policy"
        )
    algorithm.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def observe(rows: int) -> Tensor:
        return torch.randn(rows, spec.observation_dim, generator=generator)

    noise = noise_inputs(lambda observations: algorithm.act(observations, generator, spec.actor), observe(3))
    # Dimensions of the same size would be taken for the same: the number of rows must be another.
    sizes = {spec.observation_dim, spec.action_dim, *(size for each in noise for size in each.shape)}
    rows = next(n for n in itertools.count(2) if n not in sizes)
    example = (observe(rows), *(each.draw(rows, generator) for each in noise))

    def decide(observations: Tensor, *draws: Tensor) -> Tensor:
        with torch.no_grad(), GivenDraws(draws):
            actions = algorithm.actors()[spec.actor](algorithm.units.normalize(observations), None)
            return algorithm.units.restore_actions(algorithm.units.clamp(actions))

    decompositions = dict(torch.export.default_decompositions())
    trace = make_fx(decide, decompositions, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    try:
        module = trace(*example)
    except Exception as error:  # whatever the code of an algorithm meets while its shapes are symbols
        raise UserError(f"export: {spec.algorithm} cannot be traced ({one_line(error)[:300]})") from error
    for node in module.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names files of this machine
    for target in {node.target for node in module.graph.nodes}:
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            raise UserError(f"export: {spec.algorithm} draws by {target}; known are torch.randn and torch.multinomial")
    module.graph.eliminate_dead_code()
    module.recompile()
    return PolicyGraph(module, noise, example)
