"""OGBench's files: their transitions are those of the package's own loader, and their rewards its environment's."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import ogbench
import pytest
import torch

from lit_offrl.algorithms.qc import as_long_transitions
from lit_offrl.data import sources
from lit_offrl.data.export import write_transitions
from lit_offrl.data.formats.ogbench import ogbench_transitions, read_ogbench
from lit_offrl.data.sources.ogbench import OGBENCH_FILES, TASKS, OGBench, environment_name, file_name
from lit_offrl.data.transitions import Episodes, Transitions, gather
from lit_offrl.errors import UserError
from lit_offrl.system.files import no_files_left

MAZE, MAZE_TASK = "pointmaze-medium-navigate", "pointmaze-medium-singletask-v0"
CUBE, CUBE_TASK = "cube-single-play", "cube-single-singletask-task2-v0"
GOAL = np.array([20.0, 20.0])  # of the maze's default task, cell (6, 6)
Arrays = dict[str, np.ndarray]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    monkeypatch.setenv("LIT_OFFRL_OGBENCH_URL", "http://127.0.0.1:9/nothing/")  # the port of `discard`: nobody listens
    return tmp_path


def write(folder: Path, name: str, arrays: Arrays) -> Path:
    """Write a file, and the file of validation that the package's loader asks for."""
    for suffix in ("", "-val"):
        np.savez_compressed(folder / f"{name}-v0{suffix}.npz", **arrays)
    return folder / f"{name}-v0.npz"


@functools.cache  # building one with a robot's arm takes a second
def task(dataset: str) -> gym.Env[Any, Any]:
    """Return the environment that the package's loader builds for a dataset."""
    with no_files_left():
        env: gym.Env[Any, Any] = ogbench.make_env_and_datasets(dataset, env_only=True, disable_env_checker=True)
    assert env.spec is not None
    assert env.spec.id == environment_name(dataset)
    return env


def recorded(env: gym.Env[Any, Any], starts: list[dict[str, Any]], steps: int, action: Any) -> Arrays:
    """Record episodes as OGBench's scripts do: each row holds a state, the action taken in it, and the simulator's."""
    rows: dict[str, list[Any]] = {key: [] for key in ("observations", "actions", "terminals", "qpos", "qvel")}
    np.random.seed(0)  # noqa: NPY002 (mazes draw their starts from there)
    for seed, start in enumerate(starts):
        observation, _ = env.reset(seed=seed, options=start)
        for step in range(steps):
            inner: Any = env.unwrapped
            data = inner.data if hasattr(inner, "data") else inner._data
            chosen = np.clip(action(seed, step), -1, 1).astype(np.float32)
            values = (observation, chosen, step == steps - 1, data.qpos.copy(), data.qvel.copy())
            for key, value in zip(rows, values, strict=True):
                rows[key].append(value)
            observation = env.step(chosen)[0]
    types = dict.fromkeys(rows, np.float32) | {"terminals": bool}
    return {key: np.array(values, types[key]) for key, values in rows.items()}


@pytest.fixture(scope="module")
def maze_file() -> Arrays:
    """Two episodes of the point: one passes the default task's goal and goes on, one never comes near it."""
    with no_files_left():
        env = gym.make("pointmaze-medium-v0", terminate_at_goal=False, disable_env_checker=True)
    starts = [{"task_info": {"init_ij": at, "goal_ij": (1, 1)}} for at in ((6, 5), (1, 1))]
    return recorded(env, starts, 31, lambda episode, step: (1.0 if step < 22 else -1.0, 0.0))


@pytest.fixture(scope="module")
def cube_file() -> Arrays:
    env = gym.make("cube-single-v0", terminate_at_goal=False, mode="data_collection", disable_env_checker=True)
    draws = np.random.default_rng(0)
    return recorded(env, [{}, {}], 6, lambda *_: draws.uniform(-1, 1, 5))


def test_every_row_but_an_episodes_last_begins_a_transition(tmp_path: Path):
    """Rows s0 .. s4 and t0 .. t2, with the point at the goal in s1, s2 and t2."""
    states = np.arange(16, dtype=np.float32).reshape(8, 2)
    positions = np.zeros((8, 2), np.float32)
    positions[[1, 2, 7]] = GOAL
    file: Arrays = {
        "observations": states,
        "actions": states / 20,
        "terminals": np.isin(np.arange(8), [4, 7]),
        "qpos": positions,
        "qvel": np.zeros((8, 2), np.float32),
    }
    transitions = read_ogbench(write(tmp_path, MAZE, file), MAZE_TASK)
    starts = [0, 1, 2, 3, 5, 6]
    assert np.array_equal(transitions.observations, states[starts])
    assert np.array_equal(transitions.next_observations, states[[1, 2, 3, 4, 6, 7]])
    assert np.array_equal(transitions.actions, file["actions"][starts])
    assert transitions.rewards.tolist() == [-1, 0, 0, -1, -1, -1]
    assert transitions.terminals.tolist() == [False, True, True, False, False, False]
    assert transitions.episode_ends.tolist() == [False, False, False, True, False, True]
    assert transitions.timeouts.tolist() == [False, False, False, True, False, True]
    # A return counts until the task is solved; s3 is after it and counts for itself.
    ends, terminals = torch.from_numpy(transitions.episode_ends), torch.from_numpy(transitions.terminals)
    episodes = Episodes.of(torch.from_numpy(transitions.rewards), ends, terminals)
    assert episodes.returns_to_go.tolist() == [-1, 0, 0, -1, -2, -1]
    assert episodes.last_rows.tolist() == [3, 3, 3, 3, 5, 5]
    # A window of QC goes over the solved states: rewards add up to its end, and nothing is bootstrapped.
    columns = (transitions.observations, transitions.actions, transitions.rewards, transitions.next_observations)
    table = torch.from_numpy(np.column_stack([*columns, transitions.terminals]).astype(np.float32))
    windows = gather(table, (2, 2, 1, 2, 1), torch.tensor([0, 2, 4]), episodes, segment_length=3)
    assert windows.mask is not None
    assert windows.mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    long = as_long_transitions(windows, discount=0.5)
    assert (long.terminals[0].item(), long.rewards[0].item()) == (1, -1)
    assert long.next_observations[0].tolist() == states[3].tolist()


def assert_same(transitions: Transitions, loaded: Arrays) -> None:
    assert np.array_equal(transitions.observations, loaded["observations"])
    assert np.array_equal(transitions.actions, loaded["actions"])
    assert np.array_equal(transitions.next_observations, loaded["next_observations"])
    assert np.array_equal(transitions.rewards, loaded["rewards"])
    assert np.array_equal(transitions.terminals, loaded["masks"] == 0)
    assert np.array_equal(transitions.episode_ends, loaded["terminals"] == 1)


@pytest.mark.parametrize("kind", ["maze", "cube"])
def test_both_layouts_of_the_packages_loader(kind: str, request: pytest.FixtureRequest, folder: Path):
    arrays: Arrays = request.getfixturevalue(f"{kind}_file")
    name, number = (MAZE, "") if kind == "maze" else (CUBE, "-task2")
    path = write(folder, name, arrays)
    dataset = f"{name}-singletask{number}-v0"
    ours, info = sources.load(f"ogbench/{dataset}")
    assert len(ours) == len(arrays["observations"]) - 2
    assert info.path == path
    regular, compact = (
        ogbench.make_env_and_datasets(
            dataset, dataset_path=str(path), compact_dataset=layout, dataset_only=True, cur_env=task(dataset)
        )[0]
        for layout in (False, True)
    )
    assert_same(ours, regular)
    assert_same(ogbench_transitions(regular), regular)
    assert_same(ogbench_transitions(compact), regular)
    assert np.array_equal(ours.terminals, ours.rewards == 0)
    assert ours.terminals.any() == (kind == "maze")


@pytest.mark.parametrize("kind", ["maze", "cube"])
def test_rewards_are_those_of_the_environment_in_the_same_state(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
):
    arrays: Arrays = request.getfixturevalue(f"{kind}_file")
    name, task_id = (MAZE, MAZE_TASK) if kind == "maze" else (CUBE, CUBE_TASK)
    transitions = read_ogbench(write(tmp_path, name, arrays), task_id)
    env = task(f"{name}-singletask-v0" if kind == "maze" else f"{name}-singletask-task2-v0")
    starts = np.flatnonzero(~arrays["terminals"])
    for row, reward, terminal in zip(starts, transitions.rewards, transitions.terminals, strict=True):
        env.reset(seed=0)
        inner: Any = env.unwrapped
        if kind == "maze":
            inner.set_state(arrays["qpos"][row], arrays["qvel"][row])
        else:
            inner._data.qpos[:], inner._data.qvel[:] = arrays["qpos"][row], arrays["qvel"][row]
            mujoco.mj_forward(inner._model, inner._data)
            inner.post_step()
        _, own_reward, terminated, _, _ = env.step(arrays["actions"][row])
        assert (own_reward, terminated) == (reward, terminal), row


def test_a_converted_file_keeps_episodes_that_go_on(maze_file: Arrays, tmp_path: Path):
    transitions = read_ogbench(write(tmp_path, MAZE, maze_file), MAZE_TASK)
    for name in ("copy.npz", "copy.hdf5"):
        write_transitions(transitions, tmp_path / name)
        copy, _ = sources.load(str(tmp_path / name))
        assert all(np.array_equal(array, copy.arrays()[field]) for field, array in transitions.arrays().items())
        assert copy.episode_lengths().tolist() == [30, 30]


def test_names_are_the_packages():
    dataset = "cube-single-play-singletask-task2-v0"
    assert (file_name(dataset), environment_name(dataset)) == ("cube-single-play-v0", CUBE_TASK)
    ids = [*OGBench().ids()]
    assert len(ids) == len(set(ids)) == len(OGBENCH_FILES) * (TASKS + 1)
    environments = {environment_name(each.removeprefix("ogbench/")) for each in ids}
    assert environments <= set(gym.registry)
    states = {name for name in gym.registry if "singletask" in name and not name.startswith("visual-")}
    assert {name.partition("-singletask")[0] for name in states - environments} == {
        "humanoidmaze-teleport",  # without a file, as OGBench's README has none
        "cube-octuple",
    }


def test_a_file_in_which_the_task_is_never_solved_is_noted(
    maze_file: Arrays, folder: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(folder, MAZE, {key: array[31:] for key, array in maze_file.items()})
    sources.load(f"ogbench/{MAZE}-singletask-v0")
    note = f"note: ogbench/{MAZE}-singletask-v0: the task is solved in no state of {path}\n"
    assert capsys.readouterr().err == note


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("cube-single-play-v0", "is goal-conditioned.* e.g. ogbench/cube-single-play-singletask-v0$"),
        ("cube-single-play-oraclerep-v0", "is goal-conditioned"),
        ("visual-cube-single-play-singletask-v0", "has images"),
        ("cube-singel-play-singletask-v0", r"did you mean 'ogbench/cube-single-play-singletask-v0'\?"),
        ("cube-single-play-singletask-task6-v0", r"did you mean 'ogbench/cube-single-play-singletask-task\d-v0'\?"),
        ("cube-single-play-singletask-v0", r"cube-single-play-v0.npz is missing and the host of http.* cannot be"),
    ],
)
def test_ids_that_cannot_be_loaded(dataset: str, words: str, folder: Path):
    with pytest.raises(UserError, match=words) as error:
        sources.load(f"ogbench/{dataset}")
    assert "\n" not in str(error.value)
    assert not [*folder.iterdir()]


def test_a_name_without_the_namespace_is_suggested_with_it():
    with pytest.raises(UserError, match=r"did you mean 'ogbench/scene-play-singletask-v0'\?"):
        sources.find_source("scene-play-singletask-v0")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"terminals": np.zeros(62, bool)}, "the last row is not marked in 'terminals'"),
        ({"terminals": np.ones(62, bool)}, "there are no transitions"),
        ({"terminals": None}, "the key 'terminals' is missing"),
        ({"qpos": None}, "the key 'qpos' is missing"),
        ({"qpos": np.zeros((3, 2))}, "arrays differ in length"),
        ({"qpos": np.zeros((62, 3))}, r"'qpos' has shape \(60, 3\); a width of 2 is needed for pointmaze-medium"),
        (
            {"observations": np.zeros((62, 29))},
            r"'observations' has shape \(60, 29\); a width of 2 is needed",
        ),
        ({"actions": np.full((62, 2), np.nan)}, "'actions' holds NaN"),
    ],
)
def test_broken_files(changes: dict[str, Any], words: str, maze_file: Arrays, tmp_path: Path):
    arrays = {key: array for key, array in {**maze_file, **changes}.items() if array is not None}
    with pytest.raises(UserError, match=words) as error:
        read_ogbench(write(tmp_path, MAZE, arrays), MAZE_TASK)
    assert str(error.value).startswith(f"{tmp_path}/pointmaze-medium-navigate-v0.npz: ")
    assert str(error.value).count(str(tmp_path)) == 1


def test_a_truncated_file(maze_file: Arrays, tmp_path: Path):
    path = write(tmp_path, MAZE, maze_file)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"navigate-v0\.npz: is no .npz file, or a truncated one"):
        read_ogbench(path, MAZE_TASK)


def test_reading_leaves_numpys_generator_alone(maze_file: Arrays, tmp_path: Path):
    path = write(tmp_path, MAZE, maze_file)
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    read_ogbench(path, MAZE_TASK)
    assert np.random.random() == expected  # noqa: NPY002


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, folder: Path, maze_file: Arrays):
    write(folder, MAZE, maze_file)
    monkeypatch.setitem(sys.modules, "ogbench", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"^OGBench's .* need its package: pip install 'lit_offrl\[ogbench\]'$"):
        sources.load(f"ogbench/{MAZE}-singletask-v0")
