"""What sampling computes beforehand changes no result: networks along levels against networks at times."""

from __future__ import annotations

import pytest
import torch
from tiny import shake
from torch import Tensor, nn

from lit_offrl.diffusion.schedules import VPSDE, DiscreteVP, Levels
from lit_offrl.networks.at_observations import AtObservations
from lit_offrl.networks.bottleneck import BottleneckNetwork
from lit_offrl.networks.energy_guidance import EnergyNetwork, NoiseNetwork
from lit_offrl.networks.mlp import FEW_ROWS
from lit_offrl.networks.policies import StepDenoisingMLP

CONTINUOUS, DISCRETE = VPSDE().levels(5), DiscreteVP(5).levels()[:-1]


def network(name: str, observation_dim: int) -> tuple[nn.Module, Levels]:
    torch.manual_seed(1)
    sizes = 3, observation_dim
    made: dict[str, tuple[nn.Module, Levels]] = {
        "bottleneck": (BottleneckNetwork(*sizes, hidden_dim=32), CONTINUOUS),
        "energy": (EnergyNetwork(*sizes, hidden_dim=16), CONTINUOUS),
        "noise": (NoiseNetwork(*sizes, hidden_dim=16), CONTINUOUS),
        "step": (StepDenoisingMLP(observation_dim, 3, 5, (16, 16)), DISCRETE),
    }
    shake(made[name][0])
    return made[name]


def at(module: nn.Module, observations: Tensor) -> AtObservations:
    bound: AtObservations = (getattr(module, "at", None) or module.gradient)(observations)
    return bound


@pytest.mark.parametrize("rows", [1, 6, FEW_ROWS + 1])
@pytest.mark.parametrize("actions_each", [0, 4])
@pytest.mark.parametrize(
    ("name", "observation_dim"),
    [("bottleneck", 4), ("bottleneck", 0), ("energy", 4), ("energy", 0), ("noise", 4), ("noise", 0), ("step", 4)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_a_network_along_levels_is_the_network_at_their_times(
    name: str, observation_dim: int, rows: int, actions_each: int, dtype: torch.dtype, tolerance: float
):
    module, levels = network(name, observation_dim)
    module.to(dtype)
    observations, actions = torch.randn(rows, 4, dtype=dtype), torch.randn(rows, max(actions_each, 1), 3, dtype=dtype)
    flat = observations.repeat_interleave(actions.shape[1], 0), actions.flatten(0, 1)
    if actions_each:
        bound = at(module, observations[:, None])
    else:
        bound, actions = at(module, observations), actions[:, 0]
    along = bound.along(levels)
    for level in levels:
        expected = at(module, flat[0])(flat[1], level.times(actions, len(flat[1])))
        # sums in another order
        torch.testing.assert_close(along(actions, level), expected.view_as(actions), rtol=tolerance, atol=tolerance)


def test_times_of_a_discrete_schedule_index_its_tables():
    observations = torch.zeros(1, 4)
    seen: list[Tensor] = []

    def prepare(time: Tensor) -> tuple[Tensor]:
        seen.append(time)
        return (time,)

    along = AtObservations(observations, prepare, lambda actions, time: actions * time).along(DISCRETE)
    assert [along(torch.ones(1), level).item() for level in DISCRETE] == [5, 4, 3, 2, 1]
    (times,) = seen  # all at once
    assert times.dtype == torch.long
    assert times.shape == (5, 1)
