"""The Minari adapter on files that Minari itself wrote."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

from lit_offrl.data import sources
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.errors import UserError


@pytest.fixture(scope="module")
def pendulum(minari_root: Path) -> str:
    """13 episodes of Pendulum in Minari's own writer: flat observations, ends by time limit only."""
    env = gymnasium.make("Pendulum-v1", max_episode_steps=7)
    env.action_space.seed(0)
    buffers = []
    for episode in range(13):
        observations, rewards = [env.reset(seed=episode)[0]], []
        actions = [env.action_space.sample() for _ in range(7)]
        for action in actions:
            observation, reward, *_ = env.step(action)
            observations.append(observation)
            rewards.append(reward)
        ends = [False] * 6 + [True]
        buffers.append(
            EpisodeBuffer(
                id=episode,
                observations=np.stack(observations),
                actions=np.stack(actions),
                rewards=rewards,
                terminations=[False] * 7,
                truncations=ends,
            )
        )
    minari.create_dataset_from_buffers(
        "tests/pendulum-v0", buffers, env=env, ref_min_score=-100.0, ref_max_score=-1.0, data_format="hdf5"
    )
    return "tests/pendulum-v0"


def test_flat_observations(pendulum: str):
    transitions, info = sources.load(pendulum)
    reference = minari.load_dataset(pendulum)
    episodes = list(reference.iterate_episodes())
    assert len(transitions) == reference.total_steps == 13 * 7
    # more than ten episodes: `episode_10` must not come before `episode_2`
    np.testing.assert_allclose(transitions.rewards, np.concatenate([e.rewards for e in episodes]), rtol=1e-6)
    np.testing.assert_allclose(
        transitions.next_observations, np.concatenate([e.observations[1:] for e in episodes]), rtol=1e-6
    )
    assert not transitions.terminals.any()
    assert np.flatnonzero(transitions.timeouts).tolist() == [7 * i + 6 for i in range(13)]
    assert info.source == "minari"
    assert info.observation_keys is None
    assert info.reference == (-100.0, -1.0)
    assert info.environment is not None
    assert (info.environment.env_id, info.environment.max_episode_steps) == ("Pendulum-v1", 7)
    assert len(info.sha256) == 64


def test_a_file_outside_the_root(pendulum: str, minari_root: Path, tmp_path: Path):
    file = tmp_path / "own.hdf5"
    file.write_bytes((minari_root / pendulum / "data" / "main_data.hdf5").read_bytes())
    transitions, info = sources.load(str(file))
    assert len(transitions) == 91
    assert (info.source, info.environment, info.reference) == ("file", None, None)


def goal_file(path: Path, *, goals: list[list[float]], begins_with_position: bool) -> Path:
    """Write episodes of a goal environment in Minari's layout."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for i, goal in enumerate(goals):
            observation = rng.normal(size=(4, 3))
            achieved = observation[:, :2] if begins_with_position else rng.normal(size=(4, 2))
            group = file.create_group(f"episode_{i}")
            group["observations/observation"] = observation
            group["observations/achieved_goal"] = achieved
            group["observations/desired_goal"] = np.tile(goal, (4, 1))
            group["actions"] = np.zeros((3, 2), np.float32)
            group["rewards"] = np.zeros(3)
            group["terminations"] = np.array([False, False, i == 0])
            group["truncations"] = np.zeros(3, bool)
    return path


@pytest.mark.parametrize(
    ("goals", "begins", "keys"),
    [
        ([[1, 2], [1, 2]], True, ("observation",)),
        ([[1, 2], [1, 2]], False, ("achieved_goal", "observation")),
        ([[1, 2], [3, 2]], True, ("observation", "desired_goal")),
        ([[1, 2], [3, 2]], False, ("achieved_goal", "observation", "desired_goal")),
    ],
)
def test_goal_observations_become_vectors(tmp_path: Path, goals: list, begins: bool, keys: tuple[str, ...]):
    path = goal_file(tmp_path / "goals.hdf5", goals=goals, begins_with_position=begins)
    transitions, info = sources.load(str(path))
    assert info.observation_keys == keys
    with h5py.File(path) as file:
        expected = np.concatenate([file["episode_1/observations"][key][:-1] for key in keys], axis=1)
    np.testing.assert_allclose(transitions.observations[3:], expected, rtol=1e-6)
    assert transitions.terminals.tolist() == [False, False, True, False, False, False]
    assert transitions.timeouts.tolist() == [False] * 5 + [True], "an episode that just stops was cut"


def test_broken_metadata(pendulum: str, minari_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    folder = tmp_path / "tests" / "broken-v0" / "data"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"metadata\.json is not readable"):
        sources.load("tests/broken-v0")
    (folder / "metadata.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"main_data\.hdf5 is missing"):
        sources.load("tests/broken-v0")


def test_table_normalisation_and_rewards(pendulum: str):
    module = D4RLDataModule(pendulum, reward="minus_one", normalize_observations=True)
    table, widths = module.table()
    observations, actions, rewards, next_observations, terminals = torch.split(table, list(widths), dim=1)
    transitions = module.transitions
    torch.testing.assert_close(observations.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(observations.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    mean, std = module.observation_statistics
    torch.testing.assert_close(next_observations * std + mean, torch.from_numpy(transitions.next_observations))
    torch.testing.assert_close(rewards[:, 0], torch.from_numpy(transitions.rewards) - 1)
    assert actions.abs().max() == 1
    assert not terminals.any()


def test_a_dataset_of_this_package_is_collected_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lit_offrl.collect import recorder

    asked: list[str] = []
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collect = recorder.collect_dataset
    monkeypatch.setattr(
        recorder, "collect_dataset", lambda name: (asked.append(name), collect(name, steps=50, progress=False))[1]
    )
    for _ in range(2):
        assert len(D4RLDataModule("offrl/pointmaze/umaze-v0").transitions) == 50
    assert asked == ["offrl/pointmaze/umaze-v0"]
