"""Collected OGBench datasets: what the planners do, that episodes repeat, and that the package reads its own format."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import ogbench
import pytest

from lit_offrl.collect.catalog import CATALOG, ManipulationDataset
from lit_offrl.collect.episodes import Episode
from lit_offrl.collect.journal import Journal
from lit_offrl.collect.manipulation_episodes import ManipulationRecorder, cube_is_lost
from lit_offrl.collect.ogbench_files import write_ogbench
from lit_offrl.collect.recorder import collect_dataset
from lit_offrl.data.sources import find_source, load
from lit_offrl.errors import UserError

SETS = {dataset.name: dataset for dataset in CATALOG.values() if isinstance(dataset, ManipulationDataset)}
WIDTHS = {"cube-single": (28, 21, 20), "cube-double": (37, 28, 26), "scene": (40, 25, 24), "puzzle-3x3": (55, 23, 23)}
BUTTONS = {"scene": 2, "puzzle-3x3": 9}
CUBE = "offrl/ogbench/cube-single-play-v0"


def recorder_of(name: str, steps: int, seed: int = 0) -> ManipulationRecorder:
    return ManipulationRecorder(replace(SETS[name], episode_steps=steps), seed)


@pytest.mark.parametrize("name", SETS)
def test_an_episode_does_not_depend_on_those_before(name: str):
    recorder = recorder_of(name, 25)
    first, second = recorder.record(0), recorder.record(1)
    np.random.seed(5)  # noqa: NPY002 (the planners draw from this generator)
    assert recorder.record(0).to_bytes() == first.to_bytes()
    recorder.close()
    assert not np.array_equal(first.actions, second.actions)
    assert not np.array_equal(first.observations["observation"][0], second.observations["observation"][0])
    parts = {key: part.shape for key, part in first.observations.items()}
    widths = dict(zip(("observation", "qpos", "qvel"), WIDTHS[name], strict=True))
    widths |= {"button_states": BUTTONS[name]} if name in BUTTONS else {}
    assert parts == {key: (26, width) for key, width in widths.items()}
    assert np.abs(first.actions).max() <= 1
    assert first.truncations.tolist() == [False] * 24 + [True]
    assert not first.terminations.any()


def test_the_planner_lifts_the_cube_and_another_seed_gives_another_episode():
    recorder, other = recorder_of("cube-single", 80), recorder_of("cube-single", 5, seed=1)
    episode, different = recorder.record(0), other.record(0)
    recorder.close()
    other.close()
    heights = episode.observations["qpos"][:, 16]
    assert heights[0] == pytest.approx(0.02, abs=2e-3), "half of the cube's edge"
    assert heights.max() > 0.06
    assert not np.array_equal(episode.actions[:5], different.actions)


def test_an_episode_of_the_scene_is_discarded_if_the_cube_falls_behind():
    on_table, in_drawer = [0.4, 0.1, 0.02], [0.4, -0.31, 0.07]
    assert not cube_is_lost(np.array([on_table, in_drawer]))
    assert cube_is_lost(np.array([on_table, [0.4, 0.29, 0.02]]))
    assert cube_is_lost(np.array([on_table, [0.4, -0.3, 0.02]]))
    assert cube_is_lost(np.array([[0.4, -0.3, 0.09], on_table]))


@pytest.mark.parametrize("name", SETS)
def test_the_environment_of_evaluation_has_ogbenchs_limit(name: str):
    dataset = SETS[name]
    assert dataset.env_id == f"ogbench/{name}-singletask-v0"
    assert gymnasium.spec(f"{name}-v0").max_episode_steps == dataset.max_episode_steps


# ------------------------------------------------------------------------------------------------------- the files


def stored(folder: Path, steps: int, episodes: list[Episode]) -> ManipulationDataset:
    """Write the files of a dataset with episodes of 40 steps."""
    dataset = replace(SETS["puzzle-3x3"], episode_steps=40)
    with Journal(folder / "journal", b"title") as journal:
        for episode in episodes:
            journal.append(episode.to_bytes())
        write_ogbench(folder, dataset, journal, steps)
    return dataset


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Episode]]:
    """Two episodes for training, the second cut after 25 steps, and one for validation."""
    folder = tmp_path_factory.mktemp("files")
    recorder = recorder_of("puzzle-3x3", 40)
    episodes = [recorder.record(index) for index in range(3)]
    recorder.close()
    assert stored(folder, 65, episodes).recorded_steps(65) == 120
    return folder / "puzzle-3x3-play-v0.npz", episodes


def test_files_have_ogbenchs_fields(files: tuple[Path, list[Episode]]):
    path, (first, second, third) = files
    kinds = {"observations": np.float32, "actions": np.float32, "terminals": bool, "qpos": np.float32}
    kinds |= {"qvel": np.float32, "button_states": np.int64}
    with np.load(path) as train, np.load(path.with_name(f"{path.stem}-val.npz")) as validation:
        assert {name: train[name].dtype.type for name in train.files} == {
            name: np.dtype(kind).type for name, kind in kinds.items()
        }
        assert np.flatnonzero(train["terminals"]).tolist() == [40, 40 + 26]
        assert np.flatnonzero(validation["terminals"]).tolist() == [40]
        for name in ("qpos", "qvel", "button_states"):
            expected = np.concatenate([first.observations[name], second.observations[name][:26]])
            np.testing.assert_array_equal(train[name], expected.astype(train[name].dtype))
        np.testing.assert_array_equal(validation["actions"][:40], third.actions)


@pytest.mark.filterwarnings("ignore:.*precision lowered")  # Gymnasium's, of the package's action space
@pytest.mark.parametrize("compact", [False, True])
def test_the_packages_own_loader_reads_them(files: tuple[Path, list[Episode]], compact: bool):
    path, (first, second, _) = files
    env, train, validation = ogbench.make_env_and_datasets(
        "puzzle-3x3-play-singletask-v0", dataset_path=str(path), compact_dataset=compact
    )
    env.close()
    rows = train["valids"] == 1 if compact else slice(None)
    assert train["actions"][rows].shape == (65, 5)
    np.testing.assert_array_equal(train["actions"][rows], np.concatenate([first.actions, second.actions[:25]]))
    assert {array.dtype for array in train.values()} == {np.dtype(np.float32)}
    assert train["terminals"][rows].sum() == 2
    assert validation["observations"].shape == (40 + compact, 55)
    # The recorded rewards are those of the default task.
    np.testing.assert_array_equal(train["rewards"][rows], np.concatenate([first.rewards, second.rewards[:25]]))
    assert -9 <= train["rewards"].min() <= train["rewards"].max() <= 0
    # Those of the state before the action: the number of buttons that are not as the task wants them.
    goal = env.unwrapped._target_button_states
    wrong = (first.observations["button_states"][:40] != goal).sum(1)
    np.testing.assert_array_equal(first.rewards, -wrong)


# ---------------------------------------------------------------------------------------------- the whole collection


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root with a dataset of an episode for training, of which 300 steps remain, and one for validation."""
    root = tmp_path_factory.mktemp("minari")
    collect_dataset(CUBE, steps=300, root=root, processes=2, progress=False)
    return root


@pytest.mark.slow  # 2,000 steps of the simulator
def test_ids_name_tasks_of_one_file(collected: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(collected))
    default, info = load(CUBE)
    assert info.environment is not None
    assert (info.environment.env_id, info.environment.max_episode_steps) == ("ogbench/cube-single-singletask-v0", None)
    tasks = {}
    for task in range(1, 6):
        tasks[task], named = load(f"offrl/ogbench/cube-single-play-singletask-task{task}-v0")
        assert (named.path, named.sha256) == (info.path, info.sha256)
        assert named.environment is not None
        assert named.environment.env_id == f"ogbench/cube-single-singletask-task{task}-v0"
        np.testing.assert_array_equal(tasks[task].actions, default.actions)
    np.testing.assert_array_equal(tasks[2].terminals, default.terminals)
    assert "the task is solved in no state of" in capsys.readouterr().err


@pytest.mark.slow  # 2,000 steps of the simulator
def test_minaris_form_has_the_rewards_of_the_default_task(collected: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(collected))
    dataset = minari.load_dataset(CUBE)
    (episode,) = dataset.iterate_episodes()
    transitions, _ = load(CUBE)
    np.testing.assert_array_equal(episode.observations[1:].astype(np.float32), transitions.next_observations)
    np.testing.assert_array_equal(episode.actions, transitions.actions)
    np.testing.assert_array_equal(episode.rewards, transitions.rewards)
    metadata = json.loads((collected / CUBE / "data" / "metadata.json").read_text())
    assert metadata["collection"]["versions"]["ogbench"]
    assert "ref_min_score" not in metadata


@pytest.mark.slow  # 4,000 steps of the simulator
def test_a_killed_collection_goes_on_and_ends_in_the_same_bytes(collected: Path, tmp_path: Path):
    script = (
        "from pathlib import Path; from lit_offrl.collect.recorder import collect_dataset\n"
        f"collect_dataset({CUBE!r}, steps=300, root=Path({str(tmp_path)!r}), processes=1, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    journal = tmp_path / ".lit_offrl" / CUBE.replace("/", "-") / "journal"
    while process.poll() is None:
        if journal.exists() and journal.stat().st_size > 100_000:  # an episode of two
            process.kill()
        time.sleep(0.01)
    assert process.returncode == -9
    assert journal.stat().st_size > 100_000
    collect_dataset(CUBE, steps=300, root=tmp_path, processes=1, progress=False)
    files = sorted(path.name for path in (collected / CUBE / "data").iterdir() if "cache" not in path.name)
    assert files == ["cube-single-play-v0-val.npz", "cube-single-play-v0.npz", "main_data.hdf5", "metadata.json"]
    for name in files:
        assert (tmp_path / CUBE / "data" / name).read_bytes() == (collected / CUBE / "data" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (CUBE, "has not been collected: run `data collect offrl/ogbench/cube-single-play-v0`"),
        ("offrl/ogbench/scene-play-singletask-task5-v0", "run `data collect offrl/ogbench/scene-play-v0`"),
        ("offrl/ogbench/scene-play-singletask-task6-v0", "did you mean 'offrl/ogbench/scene-play-singletask-task5-v0'"),
        ("offrl/ogbench/antmaze-large-navigate-v0", "cannot be collected"),
    ],
)
def test_what_is_not_here_gets_one_line(dataset: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert find_source(dataset).names == ("offrl-ogbench",)
    with pytest.raises(UserError, match=words):
        load(dataset)
    assert not [*tmp_path.iterdir()]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ManipulationDataset, "packages", ("no-such-package",))
    with pytest.raises(UserError, match=r"needs the package no-such-package: pip install 'lit_offrl\[ogbench\]'"):
        collect_dataset(CUBE, root=tmp_path)
    assert not [*tmp_path.iterdir()]
