"""The adapter of original D4RL files, on files in their layout, against D4RL's rules written out as a loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lit_offrl.data import sources
from lit_offrl.data.info import EnvironmentInfo
from lit_offrl.data.sources.d4rl import D4RL_FILES, d4rl_environment_names, d4rl_time_limit, environment_name
from lit_offrl.data.transitions import Transitions
from lit_offrl.envs.d4rl.antmaze import MAPS
from lit_offrl.envs.make import build_env
from lit_offrl.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setenv("LIT_OFFRL_D4RL_URL", "http://127.0.0.1:9/nothing/")  # the port of `discard`: nobody listens
    return tmp_path


def write(folder: Path, dataset: str, **arrays: np.ndarray) -> Path:
    """Write a file as D4RL's are: compressed flat arrays, besides them metadata and further figures."""
    path = folder / Path(D4RL_FILES[dataset]).name
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")
        file["metadata/algorithm"] = "SAC"
        file["infos/qpos"] = np.zeros((3, 5))
    return path


def random_arrays(seed: int, n: int = 400, **others: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(n, 3)),
        "actions": rng.normal(size=(n, 2)).astype(np.float32),
        "rewards": rng.normal(size=(n, 1)).astype(np.float32),
        "terminals": rng.random(n) < 0.05,
        **others,
    }


def by_the_loop(arrays: dict[str, np.ndarray], time_limit: int) -> tuple[list[int], list[bool]]:
    """D4RL's `qlearning_dataset`, step by step: the rows it keeps, and after which of them something was dropped."""
    kept, cut = [], []
    step = 0
    for row in range(len(arrays["rewards"]) - 1):
        last = arrays["timeouts"][row] if "timeouts" in arrays else step == time_limit - 1
        if last:
            step = 0
            if kept and kept[-1] == row - 1:
                cut[-1] = not arrays["terminals"][row - 1]
            continue
        if arrays["terminals"][row]:
            step = 0
        kept.append(row)
        cut.append(False)
        step += 1
    if kept[-1] == len(arrays["rewards"]) - 2:
        cut[-1] = not arrays["terminals"][kept[-1]]
    return kept, cut


def assert_rows(transitions: Transitions, arrays: dict[str, np.ndarray], rows: list[int]) -> None:
    for name in ("observations", "actions", "terminals"):
        np.testing.assert_array_equal(getattr(transitions, name), np.asarray(arrays[name], np.float32)[rows])
    np.testing.assert_array_equal(transitions.rewards, arrays["rewards"][rows].reshape(-1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("marked", ["timeouts", "by the limit", "timeouts on terminals"])
def test_compat_is_qlearning_dataset(folder: Path, seed: int, marked: str):
    arrays = random_arrays(seed, 3000)
    if marked != "by the limit":
        arrays["timeouts"] = np.random.default_rng(seed + 10).random(3000) < 0.05
    else:
        arrays["terminals"] = np.random.default_rng(seed).random(3000) < 0.005
    if marked == "timeouts on terminals":
        arrays["timeouts"] |= arrays["terminals"] & (np.arange(3000) % 2 == 0)
    write(folder, "pen-human-v0", **arrays)
    transitions, info = sources.load("pen-human-v0")
    rows, cut = by_the_loop(arrays, time_limit=100)
    assert len(rows) < 2999
    assert_rows(transitions, arrays, rows)
    successors = arrays["observations"].astype(np.float32)[[row + 1 for row in rows]]
    np.testing.assert_array_equal(transitions.next_observations, successors)
    np.testing.assert_array_equal(transitions.timeouts, cut)
    assert transitions.observations.dtype == np.float32
    assert (info.source, info.observation_keys) == ("d4rl", None)


def test_the_limit_counts_as_d4rl_counts():
    """After a terminal state D4RL's counter stands at 1: the episode after it is one step shorter."""
    arrays = random_arrays(0, 300, terminals=np.arange(300) == 9)
    rows, _ = by_the_loop(arrays, time_limit=100)
    assert sorted({*range(300)} - {*rows}) == [108, 208, 299]


def test_true_ends_by_shift(folder: Path):
    """Rows 0-4 end in a terminal state, 5-9 at a timeout, 10-14 at a timeout that is terminal too, 15-19 unmarked."""
    arrays = random_arrays(1, 20, terminals=np.isin(np.arange(20), [4, 14]), timeouts=np.isin(np.arange(20), [9, 14]))
    write(folder, "hopper-medium-v2", **arrays)
    transitions, _ = sources.load("hopper-medium-v2", d4rl_compat=False)
    rows = [*range(9), *range(10, 19)]
    assert_rows(transitions, arrays, rows)
    assert np.flatnonzero(transitions.timeouts).tolist() == [rows.index(8), rows.index(18)]
    assert np.flatnonzero(transitions.terminals).tolist() == [rows.index(4), rows.index(14)]
    observations = arrays["observations"].astype(np.float32)
    successors = [row if row in (4, 14) else row + 1 for row in rows]
    np.testing.assert_array_equal(transitions.next_observations, observations[successors])
    compat, _ = sources.load("hopper-medium-v2")
    assert len(compat) == 17, "compat drops rows 9, 14 and 19"
    again, _ = sources.load("hopper-medium-v2", d4rl_compat=False)
    assert len(again) == len(rows), "the cache knows the options it was made with"


def test_true_ends_with_successors_in_the_file(folder: Path):
    arrays = random_arrays(2, 20, terminals=np.arange(20) == 4, timeouts=np.arange(20) == 9)
    successors = np.roll(arrays["observations"], -1, axis=0)
    successors[[4, 9, 13, 19]] += 7  # row 13 does not lead to row 14 either, although nothing is marked
    write(folder, "hopper-medium-v2", **arrays, next_observations=successors)
    transitions, _ = sources.load("hopper-medium-v2", d4rl_compat=False)
    assert_rows(transitions, arrays, [*range(20)])
    np.testing.assert_array_equal(transitions.next_observations, successors.astype(np.float32))
    assert np.flatnonzero(transitions.timeouts).tolist() == [9, 13, 19]


def test_true_ends_at_jumps_of_a_maze(folder: Path):
    """The ant is somewhere else after row 11, although nothing is marked there."""
    arrays = random_arrays(3, 30, terminals=np.zeros(30), timeouts=np.arange(30) == 20)
    arrays["observations"] = np.linspace([0, 0, 5], [3, 6, -9], 30)
    arrays["observations"][12:, :2] += 4
    write(folder, "antmaze-umaze-v0", **arrays)
    transitions, info = sources.load("antmaze-umaze-v0", d4rl_compat=False)
    rows = [row for row in range(30) if row not in (11, 20, 29)]
    assert_rows(transitions, arrays, rows)
    assert [rows[i] for i in np.flatnonzero(transitions.timeouts)] == [10, 19, 28]
    assert info.observation_keys is None
    assert info.environment is not None


def test_true_ends_at_the_limit(folder: Path):
    arrays = random_arrays(4, 450, terminals=np.arange(450) == 129)
    write(folder, "pen-human-v0", **arrays)
    transitions, _ = sources.load("pen-human-v0", d4rl_compat=False)
    assert_rows(transitions, arrays, [row for row in range(450) if row not in (99, 229, 329, 429, 449)])


# ----------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        ("walker2d-medium-replay-v0", "gym_mujoco/walker_mixed.hdf5"),
        ("hopper-medium-replay-v0", "gym_mujoco/hopper_mixed.hdf5"),
        ("ant-random-expert-v0", "gym_mujoco/ant_random_expert.hdf5"),
        ("halfcheetah-medium-expert-v1", "gym_mujoco_v1/halfcheetah_medium_expert-v1.hdf5"),
        ("hopper-full-replay-v2", "gym_mujoco_v2/hopper_full_replay-v2.hdf5"),
        ("pen-cloned-v0", "hand_dapg/pen-demos-v0-bc-combined.hdf5"),
        ("door-expert-v1", "hand_dapg_v1/door-expert-v1.hdf5"),
        (
            "antmaze-umaze-v2",
            "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5",
        ),
        (
            "antmaze-large-diverse-v0",
            "ant_maze_new/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse.hdf5",
        ),
        ("antmaze-medium-play-v1", "ant_maze_v1/Ant_maze_medium_noisy_multistart_True_multigoal_False_sparse.hdf5"),
        (
            "antmaze-eval-large-diverse-v0",
            "ant_maze_new/Ant_maze_large_eval_noisy_multistart_True_multigoal_False_sparse.hdf5",
        ),
        ("maze2d-open-v0", "maze2d/maze2d-open-sparse.hdf5"),
        ("maze2d-eval-umaze-dense-v1", "maze2d/maze2d-eval-umaze-dense-v1.hdf5"),
        ("kitchen-complete-v0", "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5"),
    ],
)
def test_names_of_files(dataset: str, file: str):
    assert D4RL_FILES[dataset] == file


def test_every_dataset_has_a_file_of_its_own_name():
    # locomotion 4 (5 + 6 + 6) + 1, hands 4 * 3 * 2, ant mazes 6 * 4, point mazes 2 (1 + 3 * 3), kitchens 3
    assert len(D4RL_FILES) == 69 + 24 + 24 + 20 + 3
    assert len({Path(file).name for file in D4RL_FILES.values()}) == len(D4RL_FILES)


@pytest.mark.parametrize(
    ("dataset", "limit"),
    [
        ("hopper-medium-v2", 1000),
        ("pen-human-v1", 100),
        ("door-human-v1", 200),
        ("kitchen-mixed-v0", 280),
        ("antmaze-umaze-diverse-v2", 700),
        ("antmaze-eval-umaze-v0", 700),
        ("antmaze-large-play-v2", 1000),
        ("maze2d-umaze-v0", 150),
        ("maze2d-umaze-v1", 300),
        ("maze2d-open-dense-v0", 150),
        ("maze2d-large-dense-v0", 600),
        ("maze2d-eval-large-v1", 800),
        ("maze2d-medium-v1", 600),
    ],
)
def test_time_limits(dataset: str, limit: int):
    assert d4rl_time_limit(dataset) == limit


def test_a_missing_file_that_cannot_be_had(folder: Path):
    with pytest.raises(UserError, match="cannot be reached: put the file into") as error:
        sources.load("hopper-medium-v2")
    assert "http://127.0.0.1:9/nothing/gym_mujoco_v2/hopper_medium-v2.hdf5" in str(error.value)
    assert str(folder) in str(error.value)
    assert list(folder.iterdir()) == []


def test_a_broken_file(folder: Path):
    path = write(folder, "hopper-medium-v2", **random_arrays(0))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"hopper_medium-v2\.hdf5 is broken") as error:
        sources.load("hopper-medium-v2")
    assert "\n" not in str(error.value)
    write(folder, "hopper-medium-v2", **{k: v for k, v in random_arrays(0).items() if k != "actions"})
    with pytest.raises(UserError, match=r"hopper_medium-v2\.hdf5: the key 'actions' is missing"):
        sources.load("hopper-medium-v2")


# ---------------------------------------------------------------------------------------------------- environments

GOALS = {  # row and column of start and goal in D4RL's maps
    "umaze": ((1, 1), (3, 1)),
    "medium": ((1, 1), (6, 6)),
    "large": ((1, 1), (7, 9)),
    "eval-umaze": ((1, 3), (3, 3)),
    "eval-medium": ((1, 1), (1, 6)),
    "eval-large": ((1, 1), (1, 9)),
}


@pytest.mark.parametrize("maze", GOALS)
def test_ant_mazes_in_the_frame_of_d4rl(maze: str):
    """In D4RL x = 4 (column - start's column) and y = 4 (row - start's row), for the ant, the goal and the walls."""
    env = build_env(EnvironmentInfo(f"D4RL/antmaze-{maze}-v{0 if 'eval' in maze else 2}", {}, None))
    ours: Any = env.env.env  # below the time limit and the order of calls
    (start_row, start_column), (goal_row, goal_column) = GOALS[maze]
    goal = np.array([goal_column - start_column, goal_row - start_row]) * 4
    for seed in range(5):
        observation, _ = env.reset(seed=seed)
        assert np.abs(observation[:2]).max() <= 0.1, "starts vary by 0.1 m around the origin"
        beyond = env.unwrapped.goal + ours.offset - goal
        assert (beyond >= -1e-9).all()
        assert (beyond <= 1.5).all()
    model = env.unwrapped.model
    blocks = [i for i in range(model.ngeom) if model.geom(i).name.startswith("block")]
    walls = {tuple(np.round(model.geom(i).pos[:2] + ours.offset).astype(int)) for i in blocks}
    rows = MAPS[maze]
    assert rows[start_row][start_column] == "r"
    assert rows[goal_row][goal_column] == "g"
    cells = [(row, column) for row in range(len(rows)) for column in range(len(rows[0]))]
    assert walls == {(4 * (c - start_column), 4 * (r - start_row)) for r, c in cells if rows[r][c] == "1"}
    env.close()


@pytest.mark.parametrize("dataset", D4RL_FILES)
def test_every_dataset_has_an_environment(dataset: str):
    assert environment_name(dataset) in d4rl_environment_names()
    assert d4rl_time_limit(environment_name(dataset)) == d4rl_time_limit(dataset)


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("hopper-medium-replay-v2", "hopper-v2"),
        ("pen-human-v1", "pen-v1"),
        ("antmaze-umaze-v0", "antmaze-umaze-v0"),
        ("antmaze-umaze-diverse-v2", "antmaze-umaze-v2"),
        ("antmaze-eval-large-play-v0", "antmaze-eval-large-v0"),
        ("maze2d-eval-umaze-dense-v1", "maze2d-eval-umaze-dense-v1"),
        ("kitchen-mixed-v0", "kitchen-mixed-v0"),
    ],
)
def test_datasets_that_differ_in_their_data_share_an_environment(dataset: str, name: str):
    assert environment_name(dataset) == name
