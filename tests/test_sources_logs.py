"""Logs in CSV, Parquet, robomimic's HDF5 and LeRobot's folders: the same as flat arrays, and what users get wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pyarrow
import pytest
from conftest import tiny_words
from pyarrow import parquet

from lit_offrl.cli import main
from lit_offrl.data import sources
from lit_offrl.data.columns import LogColumns
from lit_offrl.data.info import DatasetInfo
from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import UserError

Arrays = dict[str, np.ndarray]
LENGTHS = (5, 4, 6)  # of the episodes; the second ends in a terminal state


def flat() -> Arrays:
    """Rows of three episodes; observation i is (i, -i, 10 i)."""
    rows = np.arange(sum(LENGTHS), dtype=np.float32)
    return {
        "observations": np.outer(rows, np.array([1, -1, 10], np.float32)),
        "actions": np.stack([rows / 20, -rows / 20], axis=1),
        "rewards": rows / 4,
        "terminals": rows == 8,
        "timeouts": np.isin(rows, (4, 14)),
    }


def rows() -> list[dict[str, Any]]:
    """The same as rows of a table, with the number of the episode and the step in place of timeouts."""
    arrays, table = flat(), []
    episodes = [(f"run {number}", step) for number, length in enumerate(LENGTHS) for step in range(length)]
    for row, (episode, step) in enumerate(episodes):
        observation, action = arrays["observations"][row].tolist(), arrays["actions"][row].tolist()
        table.append(
            {
                "episode": episode,
                "step": step,
                "obs_x": observation[0],
                "obs_y": observation[1],
                "obs_z": observation[2],
                "action_0": action[0],
                "action_1": action[1],
                "reward": float(arrays["rewards"][row]),
                "terminal": int(arrays["terminals"][row]),
            }
        )
    return table


def write_csv(path: Path, table: list[dict[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return str(path)


def write_parquet(path: Path, table: list[dict[str, Any]]) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return str(path)


WRITERS = {".csv": write_csv, ".parquet": write_parquet}


def write(path: Path, table: list[dict[str, Any]]) -> str:
    return WRITERS[path.suffix](path, table)


def expected(folder: Path, **changes: np.ndarray) -> Transitions:
    np.savez(folder / "expected.npz", **{**flat(), **changes})
    return sources.load(str(folder / "expected.npz"))[0]


def assert_same(table: Transitions, other: Transitions) -> None:
    for field in fields(Transitions):
        np.testing.assert_array_equal(getattr(table, field.name), getattr(other, field.name), err_msg=field.name)


def load(dataset: str, **columns: Any) -> tuple[Transitions, DatasetInfo]:
    return sources.load(dataset, columns=LogColumns(**columns))


# --------------------------------------------------------------------------------------------------- CSV and Parquet


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_table_is_the_same_as_flat_arrays(tmp_path: Path, suffix: str):
    transitions, info = load(write(tmp_path / f"log{suffix}", rows()))
    assert_same(transitions, expected(tmp_path))
    assert info.notes == (
        "observations are obs_x, obs_y, obs_z",
        "actions are action_0, action_1",
        "2 rows are left out: the last row of an episode that was cut has no successor",
    )
    again = load(info.id)
    assert_same(again[0], transitions)
    assert again[1] == info, "the notes are in the cache, too"


@pytest.mark.parametrize("suffix", WRITERS)
def test_columns_by_their_names(tmp_path: Path, suffix: str):
    """Any names, in the order of the option and not of the file."""
    names = {
        **{"episode": "batch", "step": "second", "obs_x": "level", "obs_y": "t1", "obs_z": "t2"},
        **{"action_0": "valve", "action_1": "pump", "reward": "yield", "terminal": "broken"},
    }
    renamed = [{**{names[key]: value for key, value in row.items()}, "note": "fine"} for row in rows()]
    transitions, info = load(
        write(tmp_path / f"log{suffix}", renamed),
        **{"observations": ["t*", "level"], "actions": ["pump", "valve"], "rewards": "yield"},
        **{"terminals": "broken", "episode": "batch", "step": "second"},
    )
    arrays = flat()
    other = {"observations": arrays["observations"][:, [1, 2, 0]], "actions": arrays["actions"][:, ::-1]}
    assert_same(transitions, expected(tmp_path, **other))
    assert "columns not used: note" in info.notes


def test_flags_alone_say_where_episodes_end(tmp_path: Path):
    table = [{**row, "truncated": int(end)} for row, end in zip(rows(), flat()["timeouts"], strict=True)]
    for row in table:
        del row["episode"]
    assert_same(load(write_csv(tmp_path / "log.csv", table))[0], expected(tmp_path))


def test_successors_in_the_table_lose_nothing(tmp_path: Path):
    successors = flat()["observations"] + 100
    table = [
        {**row, **{f"next_obs_{name}": float(value) for name, value in zip("xyz", successor, strict=True)}}
        for row, successor in zip(rows(), successors, strict=True)
    ]
    path = write_csv(tmp_path / "log.csv", table)
    np.testing.assert_array_equal(load(path)[0].next_observations, successors)
    assert len(load(path, observations=["obs_x"])[0]) == sum(LENGTHS) - 2, "successors of other observations"


def test_vectors_in_columns_of_parquet(tmp_path: Path):
    arrays = flat()
    numbers = {"rewards": arrays["rewards"], "terminals": arrays["terminals"], "timeouts": arrays["timeouts"]}
    for vector in (pyarrow.list_(pyarrow.float64()), pyarrow.list_(pyarrow.float32(), 3)):
        columns = {
            "observations": pyarrow.array(arrays["observations"].tolist(), vector),
            "actions": pyarrow.array(arrays["actions"].tolist()),
        }
        parquet.write_table(pyarrow.table({**columns, **numbers}), tmp_path / "log.parquet", row_group_size=4)
        assert_same(load(str(tmp_path / "log.parquet"))[0], expected(tmp_path))


def test_times_of_steps(tmp_path: Path):
    """Missing steps are said, whether steps are numbers or times; steps that go back are refused."""
    table = [{**row, "step": f"2026-03-01 10:{row['step']:02}:00"} for row in rows()]
    assert len(load(write_csv(tmp_path / "log.csv", table))[1].notes) == 3
    del table[7]
    (note,) = load(write_csv(tmp_path / "log.csv", table))[1].notes[3:]
    assert (
        note == "'step' grows by more than its usual 60 before 1 rows (first: line 9): steps seem to be missing there"
    )
    table[2], table[3] = table[3], table[2]
    with pytest.raises(UserError, match=r"'step' goes from \d+ to \d+ in line 5, within an episode: sort the rows"):
        load(write_csv(tmp_path / "log.csv", table))


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_folder_of_tables(tmp_path: Path, suffix: str):
    """A file per episode; whole numbers in one file may be fractions in the next."""
    folder, table = tmp_path / "log", rows()
    folder.mkdir()
    bounds = np.cumsum((0, *LENGTHS))
    for number in range(len(LENGTHS)):
        part = [dict(row) for row in table[bounds[number] : bounds[number + 1]]]
        for row in part:
            del row["episode"]
        write(folder / f"{number + 9}{suffix}", part)  # 9, 10, 11: not in alphabetical order
    assert_same(load(str(folder))[0], expected(tmp_path))
    write(folder / f"12{suffix}", [{"obs_x": 1.0, "action_0": 0.0}])
    with pytest.raises(UserError, match=r"12\.\w+: has other columns than 9\."):
        load(str(folder))


def test_a_folder_of_tables_of_several_episodes(tmp_path: Path):
    """Each file may count its episodes from 0; an error names the file and its line."""
    folder, table = tmp_path / "log", rows()
    folder.mkdir()
    for number, part in enumerate((table[:9], table[9:])):
        numbers = {name: index for index, name in enumerate(dict.fromkeys(row["episode"] for row in part))}
        write_csv(folder / f"{number}.csv", [{**row, "episode": numbers[row["episode"]]} for row in part])
    assert_same(load(str(folder))[0], expected(tmp_path))
    damaged = [{**row, "episode": 0, "obs_y": None if row["step"] == 2 else row["obs_y"]} for row in table[9:]]
    write_csv(folder / "1.csv", damaged)
    with pytest.raises(UserError, match=r"log: 'obs_y' is empty or NaN, first in line 4 of 1\.csv: repair"):
        load(str(folder))


def test_tables_beside_episodes_are_no_episodes(tmp_path: Path):
    folder = tmp_path / "log"
    folder.mkdir()
    np.savez(folder / "0.npz", **flat())
    write_csv(folder / "labels.csv", [{"file": "0.npz", "by": "anna"}])
    assert_same(load(str(folder))[0], expected(tmp_path))


def test_demonstrations_without_rewards(tmp_path: Path):
    table = rows()
    for row in table:
        del row["reward"], row["terminal"]
    path = write_csv(tmp_path / "log.csv", table)
    with pytest.raises(UserError, match=r"no column is named 'reward'.*--data\.columns\.rewards success_at_end"):
        load(path)
    transitions, _ = load(path, rewards="success_at_end")
    ends = np.isin(np.arange(sum(LENGTHS)), np.cumsum(LENGTHS) - 1)
    np.testing.assert_array_equal(transitions.rewards, ends)
    np.testing.assert_array_equal(transitions.terminals, ends)
    assert not transitions.timeouts.any()


def change(row: int, **values: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda table: table[row].update(values)


def rename(**names: str) -> Callable[[list[dict[str, Any]]], None]:
    def damage(table: list[dict[str, Any]]) -> None:
        table[:] = [{names.get(key, key): value for key, value in row.items()} for row in table]

    return damage


def swap(first: int, second: int) -> Callable[[list[dict[str, Any]]], None]:
    def damage(table: list[dict[str, Any]]) -> None:
        table[first], table[second] = table[second], table[first]

    return damage


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (rename(obs_x="x", obs_y="obstacle", obs_z="z"), r"no column begins with 'obs': name some, .*x, obstacle, z"),
        (rename(action_0="a", action_1="b"), "no column begins with 'act': name some, --data.columns.actions"),
        (rename(reward="payment"), "no column is named 'reward': name one with --data.columns.rewards"),
        (rename(episode="run", terminal="fell"), "no column says where episodes end: name one with --data.columns.epi"),
        (change(6, obs_y=None), "'obs_y' is empty or NaN, first in (line 8|row 6): repair or drop that episode"),
        (change(6, obs_y=float("nan")), "'obs_y' (is empty or NaN|holds NaN or infinity), first in (line 8|row 6)"),
        (change(6, reward=1e300), "'reward' holds NaN or infinity, first in (line 8|row 6)"),
        (change(6, episode=None), "'episode' is empty or NaN, first in|is split|stands in two places"),
        (change(2, terminal=2), "'terminal' holds values other than 0 and 1"),
        (change(6, episode="run 0"), "episode run [01] stands in two places, again from (line [89]|row [67]) on: sort"),
        (swap(10, 11), "'step' goes from 2 to 1 in (line 13|row 11), within an episode: sort the rows"),
        (change(3, step=2), "'step' goes from 2 to 2 in (line 5|row 3), within an episode"),
    ],
)
def test_what_is_wrong_with_a_table(
    tmp_path: Path, suffix: str, damage: Callable[[list[dict[str, Any]]], None], complaint: str
):
    table = rows()
    damage(table)
    path = write(tmp_path / f"log{suffix}", table)
    with pytest.raises(UserError, match=complaint) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [f"log{suffix}"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "broken or not of its format .*[Ee]mpty"),
        ("obs_x,action,reward,episode\n", "the dataset has no transitions"),
        ("obs_x;action;reward;episode\n1;2;3;4\n", "has a single column: separate columns by commas"),
        ("obs_x,action,reward,episode\n1,2,3,4\n1,2,3\n", "Row #3: Expected 4 columns, got 3"),
        ("obs_x,obs_x,action,reward,episode\n1,2,3,4,5\n", "two columns are named 'obs_x'"),
        ("obs_x,action,reward,episode\n1,2,3,0\nhigh,2,3,0\n", "'obs_x' holds 'high' as text in line 3: numbers are"),
        ("obs_x,action,reward,episode\n1,2,3,0\n1,,3,0\n", "'action' is empty or NaN, first in line 3"),
        ("obs_x,action,reward,episode\n1,,3,0\n1,,3,0\n", "'action' has no values"),
        ("\ufeffobs_x,action,reward,episode\n" + 3 * "1,2,3,0\n", ""),  # the mark that spreadsheets begin a file with
    ],
)
def test_texts_that_are_no_log(tmp_path: Path, text: str, complaint: str):
    (tmp_path / "log.csv").write_text(text)
    if not complaint:
        assert len(load(str(tmp_path / "log.csv"))[0]) == 2
        return
    with pytest.raises(UserError, match=complaint) as error:
        load(str(tmp_path / "log.csv"))
    assert "\n" not in str(error.value)


def test_columns_that_are_not_there(tmp_path: Path):
    path = write_csv(tmp_path / "log.csv", rows())
    with pytest.raises(UserError, match=r"data\.columns\.episode: no column 'epsode' \(did you mean 'episode'\?\)"):
        load(path, episode="epsode")
    with pytest.raises(UserError, match=r"data\.columns\.step: 'episode' has empty places, or its string values are"):
        load(path, step="episode")
    expected(tmp_path)
    with pytest.raises(UserError, match=r"data\.columns: .*expected\.npz has no columns"):
        load(str(tmp_path / "expected.npz"), episode="episode")
    with pytest.raises(UserError, match=r"data\.columns: bandit/moons is no log of your own"):
        load("bandit/moons", episode="episode")


def test_lists_of_different_lengths(tmp_path: Path):
    columns = {"observation": [[1.0, 2.0], [3.0]], "action": [0.0, 0.0], "reward": [0.0, 0.0], "episode": [0, 0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "log.parquet")
    with pytest.raises(UserError, match=r"'observation' holds lists of 2 numbers and, in row 1, of 1: vectors of one"):
        load(str(tmp_path / "log.parquet"))
    columns["observation"] = [[1.0, 2.0], [3.0, None]]
    parquet.write_table(pyarrow.table(columns), tmp_path / "log.parquet")
    with pytest.raises(UserError, match=r"'observation' has an empty place in row 1"):
        load(str(tmp_path / "log.parquet"))
    columns["observation"] = ["1.5", "2.5"]
    parquet.write_table(pyarrow.table(columns), tmp_path / "log.parquet")
    with pytest.raises(UserError, match=r"'observation' holds '1\.5' as text in row 0: numbers are needed"):
        load(str(tmp_path / "log.parquet"))


# --------------------------------------------------------------------------------------------------------- robomimic


def write_robomimic(path: Path, dones: np.ndarray | None = None, leave_out: tuple[str, ...] = ()) -> str:
    """Write the flat arrays as robomimic's scripts do; observation keys are `eef` (x, y) and `object` (z)."""
    arrays = flat()
    arrays["dones"] = arrays["terminals"] if dones is None else dones
    successors = np.roll(arrays["observations"], -1, axis=0)
    successors[14] = successors[8] = successors[4] = 77
    bounds = np.cumsum((0, *LENGTHS))
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(LENGTHS)
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_type": 1, "env_kwargs": {}})
        for number, length in enumerate(LENGTHS):
            demo = data.create_group(f"demo_{number + 9}")  # 9, 10, 11: HDF5 sorts demo_10 before demo_9
            demo.attrs["num_samples"] = length
            part = slice(bounds[number], bounds[number + 1])
            demo["states"] = np.zeros((length, 4))
            for key in ("actions", "rewards", "dones"):
                demo[key] = arrays[key][part].astype(np.float64 if key != "dones" else np.int64)
            for group, table in (("obs", arrays["observations"]), ("next_obs", successors)):
                demo[f"{group}/object"] = table[part, 2:].astype(np.float64)
                demo[f"{group}/eef"] = table[part, :2].astype(np.float64)
                demo[f"{group}/agentview_image"] = np.zeros((length, 2, 2, 3), np.uint8)
            for key in leave_out:
                del demo[key]
        file["mask/train"] = np.array([b"demo_9", b"demo_10"])
    return str(path)


def test_robomimic(tmp_path: Path):
    transitions, info = load(write_robomimic(tmp_path / "low_dim.hdf5"))
    arrays = flat()
    for name in ("observations", "actions", "rewards", "terminals", "timeouts"):
        np.testing.assert_array_equal(getattr(transitions, name), arrays[name], err_msg=name)
    following = np.roll(arrays["observations"], -1, axis=0)
    following[[4, 8, 14]] = 77
    np.testing.assert_array_equal(transitions.next_observations, following)
    assert info.notes == (
        "observations are eef, object",
        "keys not read: agentview_image",
        "all demonstrations are read, the choices of mask/ (train) are not used",
    )


def test_robomimic_without_successors_follows_the_rules_of_flat_files(tmp_path: Path):
    path = write_robomimic(tmp_path / "low_dim.hdf5", leave_out=("next_obs",))
    assert_same(load(path)[0], expected(tmp_path))


def test_observation_keys_of_robomimic(tmp_path: Path):
    path = write_robomimic(tmp_path / "low_dim.hdf5", leave_out=("next_obs",))
    chosen = {"observations": flat()["observations"][:, [2, 0, 1]]}
    assert_same(load(path, observations=["object", "eef"])[0], expected(tmp_path, **chosen))
    with pytest.raises(UserError, match=r"no vector 'objects' \(did you mean 'object'\?\); there are eef, object"):
        load(path, observations=["objects"])
    with pytest.raises(UserError, match=r"data\.columns\.actions: robomimic's files have one place for it"):
        load(path, actions=["actions"])


def test_a_robomimic_demonstration_ends_at_its_first_done(tmp_path: Path):
    """Published files mark all steps after a success and the last one (`--done_mode 2`)."""
    dones = np.isin(np.arange(sum(LENGTHS)), (3, 4, 8, 11, 12, 13, 14))
    transitions, info = load(write_robomimic(tmp_path / "low_dim.hdf5", dones))
    kept = [*range(4), *range(5, 9), *range(9, 12)]
    assert transitions.observations[:, 0].tolist() == kept
    assert np.flatnonzero(transitions.terminals).tolist() == [3, 7, 10]
    assert len(transitions.episode_starts) == 3
    assert "4 steps after the first 'done' of their demonstration are left out" in info.notes


def test_what_is_wrong_with_robomimic(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"demo_9: the key 'rewards' is missing: --data\.columns\.rewards success_at_end"
    ):
        load(write_robomimic(tmp_path / "raw.hdf5", leave_out=("rewards",)))
    transitions, _ = load(str(tmp_path / "raw.hdf5"), rewards="success_at_end")
    assert np.flatnonzero(transitions.rewards).tolist() == [4, 8, 14]
    with pytest.raises(UserError, match=r"holds no observations \(data/demo_<i>/obs\): .*dataset_states_to_obs"):
        load(write_robomimic(tmp_path / "raw.hdf5", leave_out=("obs", "next_obs")))
    with h5py.File(tmp_path / "raw.hdf5", "w") as file:
        file.create_group("data")
    with pytest.raises(UserError, match="holds no demonstrations"):
        load(str(tmp_path / "raw.hdf5"))


# ----------------------------------------------------------------------------------------------------------- LeRobot


def write_lerobot(
    folder: Path, names: tuple[str, ...] = ("file-000", "file-001"), with_rewards: bool = True
) -> tuple[str, Path]:
    """Write the flat arrays as LeRobot's writer does, in two files; return the folder and its info.json."""
    arrays, n = flat(), sum(LENGTHS)
    steps = np.concatenate([np.arange(length) for length in LENGTHS])
    columns: dict[str, Any] = {
        "observation.state": (arrays["observations"][:, :2], "float32", [2]),
        "observation.environment_state": (arrays["observations"][:, 2], "float32", [1]),
        "action": (arrays["actions"], "float32", [2]),
        "next.reward": (arrays["rewards"], "float32", [1]),
        "next.done": (arrays["terminals"], "bool", [1]),
        "timestamp": ((steps / 10).astype(np.float32), "float32", [1]),
        "frame_index": (steps, "int64", [1]),
        "episode_index": (np.repeat(np.arange(3), LENGTHS), "int64", [1]),
        "index": (np.arange(n), "int64", [1]),
        "task_index": (np.zeros(n, np.int64), "int64", [1]),
    }
    if not with_rewards:
        del columns["next.reward"], columns["next.done"]
    table = {}
    for name, (array, kind, shape) in columns.items():
        flat_array = pyarrow.array(np.ravel(array), getattr(pyarrow, kind.replace("bool", "bool_"))())
        is_vector = shape != [1]
        table[name] = pyarrow.FixedSizeListArray.from_arrays(flat_array, shape[0]) if is_vector else flat_array
    picture = pyarrow.array([{"bytes": b"png", "path": None}] * n)
    frames = pyarrow.table({**table, "observation.images.wrist": picture})
    features = {name: {"dtype": kind, "shape": shape, "names": None} for name, (_, kind, shape) in columns.items()}
    features["observation.images.top"] = {
        "dtype": "video",
        "shape": [8, 8, 3],
        "names": ["height", "width", "channels"],
    }
    features["observation.images.wrist"] = {"dtype": "image", "shape": [8, 8, 3], "names": None}
    info = {
        **{"codebase_version": "v3.0", "robot_type": "so100", "fps": 10, "total_episodes": 3, "total_frames": n},
        **{"total_tasks": 1, "chunks_size": 1000, "splits": {"train": "0:3"}, "features": features},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    for name, part in zip(names, (frames.slice(0, 9), frames.slice(9)), strict=True):
        (folder / "data" / "chunk-000").mkdir(parents=True, exist_ok=True)
        parquet.write_table(part, folder / "data" / "chunk-000" / f"{name}.parquet")
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    episodes = pyarrow.table({"episode_index": [0, 1, 2], "length": [*LENGTHS]})
    parquet.write_table(episodes, folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    (folder / "videos").mkdir()
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    return str(folder), folder / "meta" / "info.json"


@pytest.mark.parametrize("names", [("file-000", "file-001"), ("episode_000000", "episode_000001")])
def test_lerobot(tmp_path: Path, names: tuple[str, ...]):
    """Version 3, and the names of files of version 2."""
    folder, _ = write_lerobot(tmp_path / "so100", names)
    transitions, info = load(folder)
    assert_same(transitions, expected(tmp_path))
    assert info.notes == (
        "observations are observation.state, observation.environment_state",
        "actions are action",
        "2 rows are left out: the last row of an episode that was cut has no successor",
        "features that are no vectors are not read: observation.images.top, observation.images.wrist",
    )
    (tmp_path / "so100" / "videos" / "later.mp4").write_bytes(b"")
    assert load(folder)[1].sha256 == info.sha256, "videos are no part of the data"
    state, _ = load(folder, observations="observation.state")
    assert state.observation_dim == 2


def test_lerobot_demonstrations(tmp_path: Path):
    folder, _ = write_lerobot(tmp_path / "so100", with_rewards=False)
    with pytest.raises(UserError, match=r"no column is named 'reward'.*success_at_end"):
        load(folder)
    transitions, _ = load(folder, rewards="success_at_end")
    assert len(transitions) == sum(LENGTHS), "the last step of each is terminal, so nothing is left out"
    assert np.flatnonzero(transitions.rewards).tolist() == [4, 8, 14]


def test_what_is_wrong_with_lerobot(tmp_path: Path):
    folder, info = write_lerobot(tmp_path / "so100")
    (tmp_path / "so100" / "data" / "chunk-000" / "file-001.parquet").unlink()
    with pytest.raises(UserError, match=r"so100: data/ holds 9 frames, meta/info\.json says 15: are all files there\?"):
        load(folder)
    facts = json.loads(info.read_text())
    facts["features"]["observation.force"] = {"dtype": "float32", "shape": [3]}
    info.write_text(json.dumps(facts))
    with pytest.raises(
        UserError, match=r"file-000\.parquet: has no column 'observation\.force', which meta/info\.json"
    ):
        load(folder)
    info.write_text("{}")
    with pytest.raises(UserError, match=r"info\.json is broken or not of its format"):
        load(folder)


# --------------------------------------------------------------------------------------------------- the command line


def test_data_check_and_convert(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    renamed = [{("run" if key == "episode" else key): value for key, value in row.items()} for row in rows()]
    path, other = write_csv(tmp_path / "log.csv", renamed), str(tmp_path / "log.npz")
    named = ["--data.columns.episode", "run", "--data.columns.observations", "[obs_z, obs_x]"]
    assert main(["data", "check", path, *named]) == 0
    output = capfd.readouterr().out
    assert "note: observations are obs_z, obs_x\n" in output
    assert "note: columns not used: obs_y\n" in output
    assert "log.csv: 13 transitions, no findings" in output
    assert main(["data", "convert", path, other, *named]) == 0
    assert_same(load(path, episode="run", observations=["obs_z", "obs_x"])[0], load(other)[0])


def test_a_log_becomes_a_minari_dataset(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    path = write_csv(tmp_path / "log.csv", rows())
    assert main(["data", "convert", path, "mine/log-v0"]) == 0
    assert "train on it with --data.dataset mine/log-v0" in capfd.readouterr().out
    assert_same(load(path)[0], load("mine/log-v0")[0])
    loaded = minari.load_dataset("mine/log-v0")
    assert [len(episode) for episode in loaded.iterate_episodes()] == [4, 4, 5]
    assert loaded.spec.total_steps == 13
    assert [
        entry.name for entry in (tmp_path / "minari").iterdir() if entry.name.startswith(".") and any(entry.iterdir())
    ] == []
    assert main(["data", "convert", path, "mine/log-v0"]) == 2
    assert "mine/log-v0 exists" in capfd.readouterr().err


def test_training_on_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = write_csv(tmp_path / "log.csv", rows())
    words = tiny_words(tmp_path / "runs", "--evaluation.enabled=false", "--data.reward=raw", "--trainer.max_steps=10")
    assert main([*words, f"--data.dataset={path}", "--data.columns.observations=[obs_x, obs_z]"]) == 0
    assert "note: columns not used: obs_y" in capfd.readouterr().out
    (config,) = (tmp_path / "runs").rglob("config.yaml")
    assert config.parent == tmp_path / "runs" / "dtql" / "log" / "seed_0"
    assert "obs_z" in config.read_text()
    other = [*words, f"--data.dataset={path}", "--ckpt_path=auto", "--data.columns.observations=[obs_x]"]
    assert main(other) == 2
    assert "data.columns.observations: the run in" in capfd.readouterr().err
