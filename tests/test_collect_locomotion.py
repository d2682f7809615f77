"""Locomotion: the policies, who plays when, and what is stored."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch

from lit_offrl.collect.behaviors import ARTIFACTS, SACActor, UniformActor, load_actor
from lit_offrl.collect.catalog import CATALOG, LocomotionDataset
from lit_offrl.collect.episodes import make_environment
from lit_offrl.collect.locomotion_episodes import LocomotionRecorder
from lit_offrl.collect.recorder import collect_dataset

LOCOMOTION = {dataset.id: dataset for dataset in CATALOG.values() if isinstance(dataset, LocomotionDataset)}
BODIES = sorted({dataset.split("/")[1] for dataset in LOCOMOTION})
WALKER = "offrl/walker2d/medium-replay-v0"


def test_every_body_has_the_five_kinds():
    kinds = ("random", "medium", "medium-replay", "medium-expert", "expert")
    assert set(LOCOMOTION) == {f"offrl/{body}/{kind}-v0" for body in BODIES for kind in kinds}
    for body in BODIES:
        rows = [LOCOMOTION[f"offrl/{body}/{kind}-v0"] for kind in kinds]
        random, medium, replay, medium_expert, expert = (row.levels for row in rows)
        assert (random[0].name, len(random), len(medium), len(expert)) == ("random", 1, 1, 1)
        assert replay[0] == random[0]
        assert replay[-1] == medium[0]
        assert medium_expert == medium + expert
        assert {row.reference for row in rows} == {(random[0].mean_return, expert[0].mean_return)}


@pytest.mark.parametrize("body", BODIES)
def test_medium_is_about_a_third_of_expert(body):
    row = LOCOMOTION[f"offrl/{body}/medium-v0"]
    low, high = row.reference
    assert 0.25 < (row.levels[0].mean_return - low) / (high - low) < 0.4


def test_artifacts_are_small_and_exactly_those_of_the_catalog():
    used = {
        f"{row.env_id}_{level.name}.npz"
        for row in LOCOMOTION.values()
        for level in row.levels
        if level.name != "random"
    }
    assert used == {path.name for path in ARTIFACTS.glob("*.npz")} - {"ant_student.npz"}
    for name in used:
        assert (ARTIFACTS / name).stat().st_size <= 50 * 1024
        with np.load(ARTIFACTS / name, allow_pickle=False) as arrays:
            assert {arrays[key].dtype for key in arrays.files if key != "ret"} == {np.dtype(np.float16)}


# -------------------------------------------------------------------------------------------------------- policies


def test_the_actor_is_the_network_it_was_trained_as():
    path = ARTIFACTS / "Walker2d-v5_25k.npz"
    with np.load(path, allow_pickle=False) as arrays:
        weights = {name: torch.tensor(arrays[name].astype(np.float64)) for name in arrays.files}
    actor = SACActor(path)
    rng = np.random.default_rng(0)
    for observation in rng.standard_normal((5, 17)) * 10:
        hidden = torch.tensor(observation)
        for layer in ("latent_pi.0", "latent_pi.2"):
            hidden = torch.nn.functional.linear(hidden, weights[f"{layer}.weight"], weights[f"{layer}.bias"]).relu()
        mean = torch.nn.functional.linear(hidden, weights["mu.weight"], weights["mu.bias"])
        log_std = torch.nn.functional.linear(hidden, weights["log_std.weight"], weights["log_std.bias"]).clamp(-20, 2)
        noise = torch.tensor(np.random.default_rng(7).standard_normal(6))
        np.testing.assert_allclose(actor.act(observation, None), mean.tanh(), rtol=1e-9)
        expected = (mean + log_std.exp() * noise).tanh()
        np.testing.assert_allclose(actor.act(observation, np.random.default_rng(7)), expected, rtol=1e-9)


def test_the_linear_actor_is_the_policy_that_was_searched_for():
    path = ARTIFACTS / "Hopper-v5_50k.npz"
    with np.load(path, allow_pickle=False) as arrays:
        weight, mean, scale, noise = (arrays[name].astype(np.float64) for name in ("weight", "mean", "scale", "noise"))
    actor = load_actor(path)
    for observation in np.random.default_rng(0).standard_normal((5, 11)):
        mode = weight @ ((observation - mean) / scale)
        np.testing.assert_allclose(actor.act(observation, None), mode.clip(-1, 1), rtol=1e-9, atol=1e-12)
        noisy = mode + noise * np.random.default_rng(7).standard_normal(3)
        action = actor.act(observation, np.random.default_rng(7))
        np.testing.assert_allclose(action, noisy.clip(-1, 1), rtol=1e-9, atol=1e-12)


def test_random_actions_fill_the_box():
    actions = np.stack([UniformActor(3).act(np.zeros(2), np.random.default_rng(seed)) for seed in range(2000)])
    # Of a uniform distribution on [-1, 1]: mean 0, variance 1/3; 0.05 is four standard errors of the mean.
    np.testing.assert_allclose(actions.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(actions.var(0), 1 / 3, atol=0.05)
    assert np.abs(actions).max() <= 1


# -------------------------------------------------------------------------------------------------------- episodes


@pytest.mark.parametrize("dataset", [d for d in LOCOMOTION if d.endswith(("medium-replay-v0", "medium-expert-v0"))])
def test_levels_share_the_transitions_equally(dataset):
    row = LOCOMOTION[dataset]
    recorder = LocomotionRecorder(row, 0)
    recorder._play = lambda level, *_: row.levels[level]
    played = [recorder.record(index) for index in range(2000)]
    recorder.close()
    transitions = Counter()
    for level in played:
        transitions[level.name] += level.mean_length
    for level in row.levels:
        # The number of a level's episodes is a share of 2000 to within one or two.
        tolerance = 3 * level.mean_length / transitions.total()
        assert transitions[level.name] / transitions.total() == pytest.approx(1 / len(row.levels), abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
def test_half_of_medium_expert_is_the_experts(body):
    row = LOCOMOTION[f"offrl/{body}/medium-expert-v0"]
    recorder = LocomotionRecorder(row, 0)
    transitions = Counter()
    index = 0
    while transitions.total() < 60_000:
        episode = recorder.record(index)
        transitions[episode.kind] += len(episode)
        index += 1
    recorder.close()
    assert transitions[row.levels[1].name] / transitions.total() == pytest.approx(0.5, abs=0.1)


def test_falls_are_terminal_and_limits_are_timeouts():
    falling = LocomotionRecorder(LOCOMOTION["offrl/walker2d/random-v0"], 0)
    episode = falling.record(0)
    falling.close()
    assert episode.fell
    assert not episode.success
    assert episode.terminations.tolist() == [False] * (len(episode) - 1) + [True]
    assert not episode.truncations.any()
    for dataset in ("offrl/walker2d/expert-v0", "offrl/halfcheetah/random-v0"):
        running = LocomotionRecorder(replace(LOCOMOTION[dataset], max_episode_steps=50), 0)
        episode = running.record(0)
        running.close()
        assert not episode.fell
        assert not episode.terminations.any()
        assert episode.truncations.tolist() == [False] * 49 + [True]


def test_episodes_are_what_the_environment_does_and_do_not_depend_on_those_before():
    row = replace(LOCOMOTION[WALKER], max_episode_steps=60)
    recorder = LocomotionRecorder(row, 5)
    alone = recorder.record(3)
    recorder.record(0)
    again = recorder.record(3)
    recorder.close()
    np.testing.assert_array_equal(alone.actions, again.actions)
    assert alone.kind == again.kind
    assert alone.actions.dtype == np.float32
    assert np.abs(alone.actions).max() <= 1

    env = make_environment(row)
    seed = int(np.random.default_rng([*recorder._entropy, 3]).integers(2**31))
    observations, rewards = [env.reset(seed=seed)[0]], []
    for action in alone.actions:
        observation, reward, terminated, _, _ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
    env.close()
    np.testing.assert_array_equal(alone.observations["observation"], np.stack(observations))
    np.testing.assert_array_equal(alone.rewards, rewards)
    assert alone.fell == terminated


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
def test_levels_return_what_the_catalog_says(body):
    row = LOCOMOTION[f"offrl/{body}/medium-expert-v0"]
    recorder = LocomotionRecorder(row, 0)
    low, high = row.reference
    for number, level in enumerate(row.levels):
        episodes = [recorder.attempt(seed, number) for seed in range(5000, 5020)]
        scores = [100 * (episode.rewards.sum() - low) / (high - low) for episode in episodes]
        catalog = 100 * (level.mean_return - low) / (high - low)
        # Medium policies fall sooner or later; single episodes scatter by up to 25 points, the mean of 20 by 6.
        assert np.mean(scores) == pytest.approx(catalog, abs=15)
    recorder.close()


# --------------------------------------------------------------------------------------------------------- storage


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    root = tmp_path_factory.mktemp("minari")
    return root, collect_dataset(WALKER, steps=2500, seed=1, root=root, processes=2, progress=False)


def test_minari_round_trip(collected, monkeypatch):
    import minari

    root, _ = collected
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    dataset = minari.load_dataset(WALKER)
    recorder = LocomotionRecorder(LOCOMOTION[WALKER], 1)
    kinds, returns = Counter(), Counter()
    for number, episode in enumerate(dataset.iterate_episodes()):
        played = recorder.record(number).cut(len(episode.rewards))
        np.testing.assert_array_equal(episode.observations, played.observations["observation"])
        np.testing.assert_array_equal(episode.actions, played.actions)
        np.testing.assert_array_equal(episode.rewards, played.rewards)
        np.testing.assert_array_equal(episode.terminations, played.terminations)
        np.testing.assert_array_equal(episode.truncations, played.truncations)
        kinds[played.kind] += 1
        returns[played.kind] += played.rewards.sum()
    recorder.close()
    assert dataset.total_steps == 2500
    assert dataset.recover_environment(eval_env=True).spec.id == "Walker2d-v5"

    metadata = dataset.storage.metadata
    facts = metadata["collection"]
    assert "observation_keys" not in metadata
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == LOCOMOTION[WALKER].reference
    assert facts["license"] == "MIT, trained by tools/train_locomotion.py"
    assert [level["name"] for level in facts["levels"]] == [level.name for level in LOCOMOTION[WALKER].levels]
    assert facts["episodes"] == kinds
    assert sum(facts["transitions"].values()) == 2500
    assert facts["mean_returns"] == {kind: pytest.approx(returns[kind] / kinds[kind]) for kind in kinds}
    assert "success_fraction" not in facts


def test_the_package_reads_what_it_collects(collected, monkeypatch):
    from lit_offrl.data.sources import load

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(collected[0]))
    transitions, info = load(WALKER)
    assert transitions.observations.shape == (2500, 17)
    assert (info.environment.env_id, info.environment.max_episode_steps) == ("Walker2d-v5", 1000)
    assert info.observation_keys is None
    assert info.reference == LOCOMOTION[WALKER].reference
    falls = json.loads((collected[1] / "data" / "metadata.json").read_text())["collection"]["falls"]
    assert transitions.terminals.sum() == falls


def test_the_result_does_not_depend_on_processes(collected, tmp_path):
    alone = collect_dataset(WALKER, steps=2500, seed=1, root=tmp_path, processes=1, progress=False)
    digests = [sha256((path / "data" / "main_data.hdf5").read_bytes()).hexdigest() for path in (alone, collected[1])]
    assert digests[0] == digests[1]
