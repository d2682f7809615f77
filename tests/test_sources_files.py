"""Files of one's own, good and bad."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import tiny_words

from lit_offrl.cli import main
from lit_offrl.data import sources
from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import UserError

Arrays = dict[str, np.ndarray]


def flat(n: int = 12) -> Arrays:
    """Rows 0-4 end in a terminal state, rows 5-8 at a timeout, rows 9-11 just stop; observation i is (i, -i, 10 i)."""
    rows = np.arange(n)
    return {
        "observations": np.outer(rows, [1.0, -1.0, 10.0]),
        "actions": np.stack([rows / n, -rows / n], axis=1),
        "rewards": rows * 2.0,
        "terminals": rows == 4,
        "timeouts": rows == 8,
    }


def save(path: Path, arrays: Arrays) -> str:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    return str(path)


def load(path: Path, arrays: Arrays) -> Transitions:
    return sources.load(save(path, arrays))[0]


def rows_of(transitions: Transitions) -> list[int]:
    return transitions.observations[:, 0].astype(int).tolist()


def successors_of(transitions: Transitions) -> list[int]:
    return transitions.next_observations[:, 0].astype(int).tolist()


@pytest.mark.parametrize("name", ["own.npz", "own.hdf5", "own.h5"])
def test_flat_arrays_are_shifted(tmp_path: Path, name: str):
    transitions, info = sources.load(save(tmp_path / name, flat()))
    assert rows_of(transitions) == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10], "the last ones of cut episodes have no successor"
    assert successors_of(transitions) == [1, 2, 3, 4, 4, 6, 7, 8, 10, 11]
    assert transitions.rewards.tolist() == [2.0 * row for row in rows_of(transitions)]
    assert np.flatnonzero(transitions.terminals).tolist() == [4]
    assert np.flatnonzero(transitions.timeouts).tolist() == [7, 9]
    for array in (transitions.observations, transitions.actions, transitions.rewards, transitions.next_observations):
        assert array.dtype == np.float32
    assert (info.source, info.environment, len(info.sha256)) == ("file", None, 64)
    assert info.environment_note


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_successors_in_the_file_lose_nothing(tmp_path: Path, suffix: str):
    arrays = flat()
    successors = arrays["observations"] + [1, -1, 10]
    successors[2] += 100  # row 2 does not lead to row 3
    transitions = load(tmp_path / f"own{suffix}", {**arrays, "next_observations": successors})
    assert rows_of(transitions) == [*range(12)]
    np.testing.assert_array_equal(transitions.next_observations, successors.astype(np.float32))
    assert np.flatnonzero(transitions.terminals).tolist() == [4]
    assert np.flatnonzero(transitions.timeouts).tolist() == [2, 8, 11]


@pytest.mark.parametrize("kept", ["terminals", "timeouts"])
def test_one_kind_of_end_is_enough(tmp_path: Path, kept: str):
    other = {"terminals": "timeouts", "timeouts": "terminals"}[kept]
    transitions = load(tmp_path / "own.npz", {k: v for k, v in flat().items() if k != other})
    assert len(transitions.episode_starts) == 2


def test_other_names_types_and_shapes(tmp_path: Path):
    arrays = flat()
    expected = load(tmp_path / "expected.npz", arrays)
    others = {
        "observations": arrays["observations"].astype(np.int64),
        "actions": arrays["actions"].astype(np.float16).astype(np.float64),
        "rewards": arrays["rewards"].astype(np.int32)[:, None],
        "terminations": arrays["terminals"].astype(np.float64),
        "truncations": arrays["timeouts"].astype(np.uint8)[:, None],
    }
    transitions = load(tmp_path / "own.hdf5", others)
    np.testing.assert_array_equal(transitions.observations, expected.observations)
    np.testing.assert_array_equal(transitions.rewards, expected.rewards)
    np.testing.assert_array_equal(transitions.timeouts, expected.timeouts)
    np.testing.assert_array_equal(transitions.terminals, expected.terminals)


def test_a_written_table_reads_back_unchanged(tmp_path: Path):
    table = load(tmp_path / "own.npz", flat())
    again = load(tmp_path / "again.hdf5", table.arrays())
    for name, array in table.arrays().items():
        np.testing.assert_array_equal(getattr(again, name), array)


# -------------------------------------------------------------------------------------------------- broken flat files


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda a: a.pop("observations"), "the key 'observations' is missing"),
        (lambda a: (a.pop("terminals"), a.pop("timeouts")), "neither 'terminals' nor 'timeouts'"),
        (lambda a: a.update(actions=a["actions"][:-1]), r"'actions' has shape \(11, 2\); \(12, action_dim\) is needed"),
        (lambda a: a.update(actions=a["rewards"]), r"'actions' has shape \(12,\); \(12, action_dim\) is needed"),
        (lambda a: a.update(rewards=a["actions"]), r"'rewards' has shape \(12, 2\); \(n,\) is needed"),
        (lambda a: a.update(terminals=np.arange(12)), "'terminals' holds values other than 0 and 1"),
        (lambda a: a.update(timeouts=np.zeros(11)), r"'timeouts' has shape \(11,\); \(12,\) is needed beside 12"),
        (lambda a: a["observations"].__setitem__((7, 1), np.nan), "'observations' holds NaN or infinity, .* in row 7"),
        (lambda a: a.update(observations=a["observations"] * 1e300), "'observations' holds NaN or infinity"),
        (lambda a: a.update(rewards=np.array(["x"] * 12, "S1")), r"'rewards' holds \|S1 values; numbers are needed"),
        (lambda a: a.update({k: v[:0] for k, v in a.items()}), "the dataset has no transitions"),
        (lambda a: a.update({k: v[:1] for k, v in a.items()}), "the dataset has no transitions"),
        (
            lambda a: a.update(next_observations=np.zeros((12, 2))),
            r"'next_observations' has shape \(12, 2\); \(12, 3\) is needed",
        ),
    ],
)
def test_broken_arrays(tmp_path: Path, suffix: str, damage: Callable[[Arrays], object], complaint: str):
    arrays = flat()
    damage(arrays)
    path = tmp_path / f"own{suffix}"
    with pytest.raises(UserError, match=complaint) as error:
        load(path, arrays)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("size", [0, 10, 700, 2000])
@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_truncated_files(tmp_path: Path, suffix: str, size: int):
    path = tmp_path / f"own{suffix}"
    save(path, flat(200))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"own\.") as error:
        sources.load(str(path))
    assert "\n" not in str(error.value)


def test_changed_bytes_of_a_zip(tmp_path: Path):
    path = tmp_path / "own.npz"
    save(path, flat(200))
    content = bytearray(path.read_bytes())
    content[1000:1100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"own\.npz: 'observations' cannot be read"):
        sources.load(str(path))


def test_pickles_are_never_opened(tmp_path: Path):
    path = tmp_path / "own.npz"
    np.savez(path, **{**flat(), "actions": np.array([{"a": 1}] * 12, dtype=object)})
    with pytest.raises(UserError, match=r"own\.npz: 'actions' cannot be read \(Object arrays"):
        sources.load(str(path))
    path.write_bytes(pickle.dumps(flat()))
    with pytest.raises(UserError, match=r"is no \.npz file"):
        sources.load(str(path))


def test_a_group_where_an_array_should_be(tmp_path: Path):
    with h5py.File(tmp_path / "own.hdf5", "w") as file:
        file.create_group("observations")
        file["rewards"] = np.zeros(3)
    with pytest.raises(UserError, match=r"own\.hdf5: 'observations' is a group, not an array"):
        sources.load(str(tmp_path / "own.hdf5"))


def test_a_file_of_another_kind(tmp_path: Path):
    (tmp_path / "own.xlsx").write_text("1,2")
    with pytest.raises(UserError, match=r"own\.xlsx: files of your own end in \.csv, \.parquet, \.h5, \.hdf5, \.npz"):
        sources.load(str(tmp_path / "own.xlsx"))


# --------------------------------------------------------------------------------------------- folders of episodes


def episode(first: int, steps: int, **others: np.ndarray) -> Arrays:
    """Observations first, first + 1, ...: one more than steps."""
    rows = np.arange(first, first + steps + 1)
    return {
        "observations": np.outer(rows, [1.0, 2.0]),
        "actions": np.zeros((steps, 1)),
        "rewards": rows[:-1].astype(float),
        **others,
    }


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_a_folder_of_whole_episodes(tmp_path: Path, suffix: str):
    """Twelve files, so that `episode_10` would come before `episode_2` in alphabetical order; every third terminal."""
    for i in range(12):
        ends = {"terminals": np.arange(3) == 2} if i % 3 == 0 else {}
        save(tmp_path / f"episode_{i}{suffix}", episode(10 * i, 3, **ends))
    (tmp_path / "notes.txt").write_text("not an episode")
    transitions, info = sources.load(str(tmp_path))
    assert rows_of(transitions) == [10 * i + step for i in range(12) for step in range(3)]
    assert successors_of(transitions) == [10 * i + step + 1 for i in range(12) for step in range(3)]
    assert np.flatnonzero(transitions.terminals).tolist() == [2, 11, 20, 29]
    assert transitions.episode_starts.tolist() == [*range(0, 36, 3)]
    assert info.source == "file"
    assert len(info.sha256) == 64


def test_a_folder_of_episodes_without_their_last_observation(tmp_path: Path):
    for i, terminal in enumerate([False, True]):
        arrays = episode(10 * i, 4, terminals=np.array([False] * 3 + [terminal]))
        save(tmp_path / f"{i}.npz", {**arrays, "observations": arrays["observations"][:-1]})
    transitions, _ = sources.load(str(tmp_path))
    assert rows_of(transitions) == [0, 1, 2, 10, 11, 12, 13]
    assert successors_of(transitions) == [1, 2, 3, 11, 12, 13, 13]
    assert np.flatnonzero(transitions.timeouts).tolist() == [2]
    assert np.flatnonzero(transitions.terminals).tolist() == [6]


def test_broken_folders(tmp_path: Path):
    folder = tmp_path / "episodes"
    folder.mkdir()
    with pytest.raises(UserError, match=r"episodes: the folder holds no episodes, i\.e\. no \.csv, \.parquet, \.h5"):
        sources.load(str(folder))
    save(folder / "1.npz", episode(0, 3))
    save(folder / "2.npz", {**episode(0, 3), "actions": np.zeros((3, 2))})
    with pytest.raises(UserError, match=r"2\.npz: 'actions' has shape \(3, 2\); the episodes before have width 1"):
        sources.load(str(folder))
    save(folder / "2.npz", {**episode(0, 3), "observations": np.zeros((5, 2))})
    with pytest.raises(UserError, match=r"2\.npz: 'observations' .*beside 3 rewards \(or one observation more\)"):
        sources.load(str(folder))
    (folder / "2.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"2\.npz: is no \.npz file"):
        sources.load(str(folder))


@pytest.mark.parametrize("kind", ["external storage", "external link", "virtual dataset"])
def test_data_stored_in_other_files_are_not_read(kind: str, tmp_path: Path):
    """A dataset from elsewhere must not carry other files of the reader into caches and conversions."""
    secret, path = tmp_path / "secret.bin", tmp_path / "log.hdf5"
    secret.write_bytes(np.zeros((6, 3), np.float32).tobytes())
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["observations"] = np.zeros((6, 3), np.float32)
    with h5py.File(path, "w") as file:
        file["actions"], file["rewards"] = np.zeros((6, 2)), np.zeros(6)
        file["terminals"] = np.arange(6) == 5
        if kind == "external storage":
            file.create_dataset("observations", (6, 3), "f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
        elif kind == "external link":
            file["observations"] = h5py.ExternalLink("other.hdf5", "/observations")
        else:
            layout = h5py.VirtualLayout((6, 3), "f4")
            layout[:] = h5py.VirtualSource("other.hdf5", "observations", (6, 3))
            file.create_virtual_dataset("observations", layout)
    with pytest.raises(UserError, match=r"'observations' is (a link to|stored in) another file"):
        sources.load(str(path))
    assert not list(tmp_path.glob("*.cache.npz"))


def table(folder: Path, **changes: object) -> Path:
    arrays = {
        "observations": np.zeros((20, 3)) + np.arange(20)[:, None],
        "actions": np.linspace(-1, 1, 40).reshape(20, 2),
        "rewards": np.arange(20.0),
        "terminals": np.arange(20) % 5 == 4,
    }
    np.savez(folder / "log.npz", **{**arrays, **changes})
    return folder / "log.npz"


def test_clipped_actions_are_said_before_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    words = tiny_words(tmp_path / "runs", "--evaluation.enabled=false", "--data.reward=raw", "--trainer.max_steps=10")
    file = table(tmp_path, actions=np.full((20, 2), 1e6))
    assert main([*words, f"--data.dataset={file}"]) == 0
    assert "note: actions outside [-1, 1] in 20 of 20 transitions" in capfd.readouterr().out


def test_huge_rewards_are_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["data", "check", str(table(tmp_path, rewards=np.full(20, 1e9)))]) == 0
    assert "- rewards reach 1e+09" in capfd.readouterr().out
    assert main(["data", "check", str(table(tmp_path))]) == 0
    assert "rewards reach" not in capfd.readouterr().out


def test_a_file_that_is_open_for_writing_elsewhere_is_not_called_broken(tmp_path: Path):
    file = tmp_path / "log.hdf5"
    writer = (
        f"import h5py, time; file = h5py.File({str(file)!r}, 'w'); file['rewards'] = [1.0]; file.flush();"
        "print('open', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="is open for writing elsewhere"):
            sources.load(str(file))
    finally:
        process.kill()
        process.wait()
