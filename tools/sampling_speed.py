"""What it costs EDA to act in one state: the written-out gradient against plain autograd.

    python tools/sampling_speed.py [--candidates 4] [--rounds 15]

"plain" is f as the paper has it, layer by layer, and autograd for its gradient, with the graph that a second derivative
would need, as the authors' code builds it also when it samples: for all candidates at once, or one after the other.
Times are CPU seconds of this process; the ways take turns, so that whatever else a machine does meets all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_offrl.algorithms import EDA
from lit_offrl.diffusion.denoisers import as_denoiser
from lit_offrl.diffusion.samplers import sample_dpm_singlestep
from lit_offrl.networks.bottleneck import BottleneckNetwork

SHAPE = (11, 3)  # hopper: widths of observations and actions


def plain_value(
    network: BottleneckNetwork, actions: Tensor, times: Tensor, observations: Tensor, masks: Tensor | None = None
) -> Tensor:
    """Return f of rows, `[batch]`, with nothing folded."""
    parts = [network.action(actions), network.time(times)]
    if network.state is not None:
        parts.append(network.state(observations))
    hidden = network.mix(torch.cat(parts, dim=-1))
    for i, block in enumerate(network.blocks):
        masked = hidden if masks is None else hidden * masks[i]
        hidden = hidden + block.contract(F.silu(block.expand(block.norm(masked))))
    return network.head(F.silu(hidden)).sum(-1)


def plain_gradient(
    network: BottleneckNetwork, actions: Tensor, times: Tensor, observations: Tensor, masks: Tensor | None = None
) -> Tensor:
    """Return df/da of rows, `[batch, action_dim]`, by autograd, differentiable."""
    with torch.enable_grad():
        actions = actions.detach().requires_grad_()
        value = plain_value(network, actions, times, observations, masks)
        return torch.autograd.grad(value.sum(), actions, create_graph=True)[0]


def sample_plainly(algorithm: EDA, observation: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` actions of the policy at one observation, `[count, action_dim]`."""
    observations = observation.expand(count, -1).contiguous()
    noise = torch.randn(count, algorithm.action_dim, generator=generator, dtype=observation.dtype)

    def score(actions: Tensor, times: Tensor) -> Tensor:
        return plain_gradient(algorithm.policy, actions, times, observations).detach()

    with torch.no_grad():
        return sample_dpm_singlestep(as_denoiser(score, algorithm.schedule, "score"), noise, algorithm.levels)


def measure(candidates: int = 4, rounds: int = 15, hidden_dim: int = 256) -> dict[str, float]:
    """Return the median CPU seconds of sampling `candidates` actions in one state, by way."""
    torch.manual_seed(0)
    algorithm = EDA(*SHAPE, hidden_dim=hidden_dim)
    observation = torch.randn(1, SHAPE[0])
    generator = torch.Generator()
    ways: dict[str, Callable[[], object]] = {
        "plain, one by one": lambda: [sample_plainly(algorithm, observation, 1, generator) for _ in range(candidates)],
        "plain": lambda: sample_plainly(algorithm, observation, candidates, generator),
        "written out": lambda: algorithm.sample(algorithm.policy, observation, candidates, generator),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            way()
            if turn:  # the first warms up
                taken[name].append(time.process_time() - started)
    return {name: statistics.median(each) for name, each in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for candidates in sorted({1, given.candidates}):
        results = measure(candidates, given.rounds)
        ours = results["written out"]
        words = ", ".join(f"{name} {1000 * each:.1f} ms ({each / ours:.2f})" for name, each in results.items())
        print(f"{candidates} candidates: {words}")


if __name__ == "__main__":
    main()
