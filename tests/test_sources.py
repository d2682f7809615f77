"""The entrance to all sources, and what the data module makes of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATASET

from lit_offrl.algorithms import DTQL
from lit_offrl.data import sources
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.info import EnvironmentInfo
from lit_offrl.data.inspection import clipped_actions
from lit_offrl.errors import UserError


def walk(steps: int = 12) -> dict[str, np.ndarray]:
    """Flat arrays of two episodes: a terminal step in the middle, a timeout at the end."""
    rng = np.random.default_rng(0)
    terminals, timeouts = np.zeros((2, steps), bool)
    terminals[steps // 2 - 1] = timeouts[-1] = True
    return {
        "observations": rng.normal(size=(steps, 3)).astype(np.float32),
        "actions": rng.uniform(-1.5, 1.5, size=(steps, 2)).astype(np.float32),
        "rewards": np.arange(steps, dtype=np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
    }


@pytest.mark.parametrize(
    ("dataset", "complaint"),
    [
        ("hopper-medum-v2", r"'hopper-medum-v2' is no dataset id \(did you mean 'hopper-medium-v2'\?\)"),
        ("antmaze-umaze-v9", "did you mean 'antmaze-umaze-v2'"),
        ("nothing", "is no dataset id; ids look like"),
        ("missing.npz", r"no file missing\.npz"),
        ("missing.h5", r"no file missing\.h5"),
        ("offrl/pointmaze/never-v0", "has not been collected: run `data collect offrl/pointmaze/never-v0`"),
    ],
)
def test_what_is_not_there(dataset: str, complaint: str, minari_root: Path):
    with pytest.raises(UserError, match=complaint) as error:
        sources.load(dataset)
    assert "\n" not in str(error.value)


def test_a_suggestion_may_be_a_local_dataset(minari_root: Path):
    with pytest.raises(UserError, match="did you mean 'offrl/pointmaze/umaze-v0'"):
        sources.load("offrl/pointmaze/umaze")


def test_every_id_belongs_to_one_source(minari_root: Path):
    names = [name for source in sources.SOURCES for name in source.names]
    assert len(set(names)) == len(names)
    for source in sources.SOURCES:
        assert "\n" not in source.help()
        for dataset in {*source.ids(), *(row.dataset for row in source.listing())} - {DATASET}:
            assert isinstance(sources.find_source(dataset), type(source))
    _, info = sources.load(DATASET)
    assert sources.source_of(info) is sources.find_source(DATASET)
    (size,) = [row.size_mb for row in sources.find_source(DATASET).listing() if row.dataset == DATASET]
    assert size is not None
    assert size > 0


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, lit_offrl.data.sources; print({'torch', 'numpy', 'h5py', 'minari', 'pyarrow'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_arrays_in_memory_follow_the_rules_of_files(tmp_path: Path):
    np.savez(tmp_path / "walk.npz", **walk())
    from_file, _ = sources.load(str(tmp_path / "walk.npz"))
    for arrays in (walk(), {name: array.tolist() for name, array in walk().items()}):
        transitions = sources.from_arrays(arrays)
        np.testing.assert_array_equal(transitions.observations, from_file.observations)
        np.testing.assert_array_equal(transitions.rewards, from_file.rewards)
    with pytest.raises(UserError, match=r"^arrays: the key 'actions' is missing"):
        sources.from_arrays({name: array for name, array in walk().items() if name != "actions"})
    with pytest.raises(UserError, match=r"^arrays"):
        sources.from_arrays({**walk(), "observations": [[1.0], [1.0, 2.0]]})


def test_table_normalization_and_rewards(tmp_path: Path):
    np.savez(tmp_path / "walk.npz", **walk(40))
    module = D4RLDataModule(str(tmp_path / "walk.npz"), reward="minus_one", normalize_observations=True)
    table, widths = module.table()
    observations, actions, rewards, next_observations, terminals = torch.split(table, list(widths), dim=1)
    transitions = module.transitions
    torch.testing.assert_close(observations.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(observations.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    mean, std = module.observation_statistics
    torch.testing.assert_close(next_observations * std + mean, torch.from_numpy(transitions.next_observations))
    torch.testing.assert_close(rewards[:, 0], torch.from_numpy(transitions.rewards) - 1)
    assert actions.abs().max() == 1
    assert terminals.sum() == 1


def test_lightnings_hook_collects_a_dataset_of_this_package_and_reading_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from lit_offrl.collect import recorder

    asked: list[str] = []
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collect = recorder.collect_dataset
    monkeypatch.setattr(
        recorder, "collect_dataset", lambda name: (asked.append(name), collect(name, steps=50, progress=False))[1]
    )
    with pytest.raises(UserError, match="has not been collected: run `data collect offrl/pointmaze/umaze-v0`"):
        D4RLDataModule("offrl/pointmaze/umaze-v0").load()
    for _ in range(2):
        module = D4RLDataModule("offrl/pointmaze/umaze-v0")
        module.prepare_data()
        assert len(module.transitions) == 50
    assert asked == ["offrl/pointmaze/umaze-v0"]


def log(actions: np.ndarray) -> dict[str, np.ndarray]:
    n = len(actions)
    return {
        "observations": np.arange(2.0 * n).reshape(n, 2),
        "actions": actions,
        "rewards": np.ones(n),
        "terminals": np.arange(n) == n - 1,
        "timeouts": np.zeros(n, bool),
    }


def test_networks_see_actions_scaled_to_one_and_policies_answer_in_the_datas_units():
    actions = np.array([[-3.0, 0.0], [3.0, 10.0], [1.5, 2.5]])
    module = D4RLDataModule.from_arrays(log(actions), action_bounds=(-3.0, 3.0))
    table, widths = module.table()
    expected = [[-1, 0], [1, 1], [0.5, 2.5 / 3]]  # 10 is outside the bounds, and clipped
    torch.testing.assert_close(torch.split(table, list(widths), dim=1)[1], torch.tensor(expected))

    algorithm = DTQL(2, 2, hidden_dim=8, acting={"candidates": 2})
    unscaled = algorithm.act(torch.ones(5, 2), torch.Generator().manual_seed(0))
    algorithm.units.set_from(module)
    scaled = algorithm.act(torch.ones(5, 2), torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaled, 3 * unscaled)
    assert scaled.abs().max() > 0


def test_networks_may_see_actions_in_the_datas_own_units():
    actions = np.array([[-3.0, 0.0], [3.0, 10.0], [1.5, 2.5]])
    module = D4RLDataModule.from_arrays(log(actions), action_bounds=(-3.0, 3.0), action_limit=3.0)
    table, widths = module.table()
    torch.testing.assert_close(torch.split(table, list(widths), dim=1)[1], torch.tensor(actions).float().clamp(-3, 3))

    class Far(DTQL):
        def sample_actions(self, observations: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
            return torch.tensor([[2.0, 100.0]])

    algorithm = Far(2, 2, hidden_dim=8)
    algorithm.units.set_from(module)
    assert algorithm.act(torch.ones(1, 2)).tolist() == [[2.0, 3.0]]


def test_bounds_of_each_dimension_come_from_the_dataset():
    module = D4RLDataModule.from_arrays(log(np.zeros((3, 2))))
    assert [bound.tolist() for bound in module.action_units] == [[0, 0], [1, 1]]
    transitions, info = module.load()
    module._loaded = transitions, replace(info, action_bounds=((-1.0, 0.0), (1.0, 4.0)))
    assert [bound.tolist() for bound in module.action_units] == [[0, 2], [1, 2]]


def test_an_environment_may_be_named_where_the_dataset_names_none(minari_root: Path):
    module = D4RLDataModule.from_arrays(log(np.zeros((3, 1))), environment="Pendulum-v1")
    assert module.info.environment == EnvironmentInfo("Pendulum-v1", {}, None)
    assert (module.info.source, module.info.sha256) == ("arrays", None)
    with pytest.raises(UserError, match="PointMaze_UMaze-v3; the option is for datasets that name no environment"):
        D4RLDataModule(DATASET, environment="Pendulum-v1").load()


def test_bounds_the_wrong_way_round():
    with pytest.raises(UserError, match=r"data\.action_bounds: must be \[low, high\], numbers .*, not \[1, -1\]"):
        D4RLDataModule("x", action_bounds=(1, -1))


def test_bounds_of_each_dimension():
    """A process has actions in units of their own: a valve in percent beside a temperature."""
    actions = np.linspace([0, 20], [100, 90], 12)
    bounds = ([0.0, 20.0], [100.0, 90.0])
    module = D4RLDataModule.from_arrays(log(actions), action_bounds=bounds)
    scaled = torch.split(module.table()[0], list(module.widths), dim=1)[1]
    torch.testing.assert_close(scaled, torch.linspace(-1, 1, 12)[:, None].expand(12, 2), atol=1e-6, rtol=0)
    assert not list(clipped_actions(module.transitions, bounds))
    assert list(clipped_actions(module.transitions, ([0.0, 20.0], [100.0, 80.0])))
    with pytest.raises(UserError, match=r"data\.action_bounds: bounds of 3 dimensions do not fit actions of 2"):
        D4RLDataModule.from_arrays(log(actions), action_bounds=([0, 0, 0], [1, 1, 1]))
    with pytest.raises(UserError, match=r"data\.action_bounds: must be \[low, high\], numbers or a list of each"):
        D4RLDataModule.from_arrays(log(actions), action_bounds=([0, 3], [1, 2]))
