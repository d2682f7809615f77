"""The recorder: what it stores, and that no interruption harms or changes it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from filelock import FileLock

from lit_offrl.collect import recorder
from lit_offrl.collect.catalog import CATALOG
from lit_offrl.collect.episodes import Episode, make_environment
from lit_offrl.collect.journal import Journal
from lit_offrl.collect.maze_episodes import MazeRecorder
from lit_offrl.collect.recorder import collect_dataset
from lit_offrl.collect.workers import ordered_records
from lit_offrl.data.sources.minari import is_present
from lit_offrl.errors import RunFailure, UserError
from lit_offrl.system.files import no_files_left

POINT, ANT = "offrl/pointmaze/umaze-v0", "offrl/antmaze/umaze-v0"


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    root = tmp_path_factory.mktemp("minari")
    return root, collect_dataset(POINT, steps=3000, seed=3, root=root, processes=2, progress=False)


def test_minari_round_trip(collected, monkeypatch):
    import minari

    root, path = collected
    assert path == root / POINT
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    assert list(minari.list_local_datasets()) == [POINT]
    dataset = minari.load_dataset(POINT)
    episodes = list(dataset.iterate_episodes())
    assert dataset.total_steps == sum(len(episode.rewards) for episode in episodes) == 3000
    recorder = MazeRecorder(CATALOG[POINT], 3)
    for number, episode in enumerate(episodes):
        played = recorder.record(number).cut(len(episode.rewards))
        for key in ("observation", "achieved_goal", "desired_goal"):
            assert episode.observations[key].shape[0] == len(episode.rewards) + 1
            np.testing.assert_array_equal(episode.observations[key], played.observations[key])
        np.testing.assert_array_equal(episode.actions, played.actions)
        np.testing.assert_array_equal(episode.rewards, played.rewards)
        # Exactly one of the two marks the end, and only the end; reward and termination come together.
        ends = episode.terminations | episode.truncations
        assert not ends[:-1].any()
        assert episode.terminations[-1] != episode.truncations[-1]
        assert episode.rewards.sum() == float(episode.terminations[-1])
    recorder.close()

    metadata = dataset.storage.metadata
    successes = [bool(episode.terminations[-1]) for episode in episodes]
    assert metadata["observation_keys"] == ["observation"]
    assert "100 episodes" in metadata["reference_note"]
    facts = metadata["collection"]
    assert facts["success_fraction"] == pytest.approx(np.mean(successes))
    assert sum(facts["episodes"].values()) == len(episodes)
    assert sum(facts["successes"].values()) == sum(successes)
    assert (facts["seed"], facts["steps"]) == (3, 3000)
    assert facts["license"] == CATALOG[POINT].license
    assert sum(facts["transitions"].values()) == 3000
    assert facts["mean_returns"]["direct"] == facts["successes"]["direct"] / facts["episodes"]["direct"]
    assert facts["behavior_mix"]["wander"] == 0.5
    assert facts["action_noise"] == [0.5, 0.5]
    assert facts["versions"]["lit_offrl"]
    assert minari.get_normalized_score(dataset, np.array([metadata["ref_min_score"], 1.0])).tolist() == [0.0, 1.0]


def test_the_stored_specification_rebuilds_the_evaluation(collected, monkeypatch):
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(collected[0]))
    with no_files_left():
        env = minari.load_dataset(POINT).recover_environment(eval_env=True)
    ours = make_environment(CATALOG[POINT])
    theirs, expected = env.reset(seed=4)[0], ours.reset(seed=4)[0]
    for key in expected:
        np.testing.assert_array_equal(theirs[key], expected[key])
    assert env.spec.max_episode_steps == 300
    assert env.unwrapped.continuing_task is False


def test_the_package_reads_what_it_collects(collected, monkeypatch):
    from lit_offrl.data.sources import load

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(collected[0]))
    transitions, info = load(POINT)
    assert transitions.observations.shape == (3000, 4)
    environment = info.environment
    assert (environment.env_id, environment.max_episode_steps) == ("PointMaze_UMaze-v3", 300)
    assert environment.kwargs.items() >= CATALOG[POINT].env_kwargs.items()
    assert tuple(info.observation_keys) == ("observation",)
    assert info.reference == CATALOG[POINT].reference
    with h5py.File(collected[1] / "data" / "main_data.hdf5") as file:
        first = file["episode_0"]["observations"]["observation"][()].astype(np.float32)
        last = file[f"episode_{len(file) - 1}"]["observations"]["observation"][-1].astype(np.float32)
    np.testing.assert_array_equal(transitions.next_observations[: len(first) - 1], first[1:])
    np.testing.assert_array_equal(transitions.next_observations[-1], last)


def test_the_result_does_not_depend_on_processes(collected, tmp_path):
    _, path = collected
    alone = collect_dataset(POINT, steps=3000, seed=3, root=tmp_path, processes=1, progress=False)
    assert digest(alone) == digest(path)
    other = collect_dataset(POINT, steps=3000, seed=4, root=tmp_path / "other", processes=1, progress=False)
    assert digest(other) != digest(path)


@pytest.mark.slow
def test_ant_data_do_not_depend_on_processes(tmp_path):
    paths = [
        collect_dataset(ANT, steps=6000, root=tmp_path / str(processes), processes=processes, progress=False)
        for processes in (1, 3)
    ]
    assert digest(paths[0]) == digest(paths[1])


def digest(path):
    """Of the file's bytes: nothing in it depends on when and where it was made."""
    return sha256((path / "data" / "main_data.hdf5").read_bytes()).hexdigest()


def test_a_worker_that_dies_is_reported():
    with closing(ordered_records("no such dataset", 0, 1)) as episodes, pytest.raises(RuntimeError, match="KeyError"):
        next(episodes)


def test_an_existing_dataset_is_kept_unless_told_otherwise(collected):
    root, path = collected
    before = digest(path)
    with pytest.raises(UserError, match="already lies in"):
        collect_dataset(POINT, steps=10, root=root, progress=False)
    assert digest(path) == before


def test_overwriting_replaces_all(tmp_path):
    for steps in (60, 40):
        path = collect_dataset(POINT, steps=steps, root=tmp_path, processes=1, overwrite=True, progress=False)
        assert json.loads((path / "data" / "metadata.json").read_text())["total_steps"] == steps
    assert everything_below(tmp_path) == {"data", "main_data.hdf5", "metadata.json"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_while_writing_leaves_nothing_but_the_journal(collected, tmp_path, monkeypatch, overwrite):
    if overwrite:
        collect_dataset(POINT, steps=30, root=tmp_path, processes=1, progress=False)
    before = everything_below(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "_metadata", fail)  # called when the episodes are in the file already
        with pytest.raises(RunFailure, match=r"disk full.*goes on from where it was"):
            collect_dataset(POINT, steps=50, root=tmp_path, processes=1, overwrite=overwrite, progress=False)
    assert everything_below(tmp_path, allowed=("lock", "journal")) == before
    if overwrite:
        metadata = json.loads((tmp_path / POINT / "data" / "metadata.json").read_text())
        assert metadata["total_steps"] == 30


def test_no_dataset_is_begun_without_room_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder.shutil, "disk_usage", lambda path: SimpleNamespace(free=50_000))
    with pytest.raises(RunFailure, match=r"0 MB are free.*goes on from where it was"):
        collect_dataset(POINT, steps=200, root=tmp_path, processes=1, progress=False)
    assert everything_below(tmp_path, allowed=("lock", "journal")) == set()


def everything_below(root, allowed=("lock",)):
    """Names of what lies in the dataset's folder; nothing but what is allowed may lie elsewhere."""
    assert {path.name for path in (root / ".lit_offrl").glob("*/*")} <= set(allowed)
    return {path.name for path in (root / POINT).rglob("*")}


@pytest.mark.parametrize("interruption", ["kill", "full disk"])
def test_an_interrupted_collection_goes_on_and_ends_in_the_same_bytes(collected, tmp_path, capsys, interruption):
    _, undisturbed = collected
    folder = collect_dataset(POINT, steps=30, root=tmp_path, processes=1, progress=False)
    older = digest(folder)
    journal = tmp_path / ".lit_offrl" / "offrl-pointmaze-umaze-v0" / "journal"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"  # files cannot grow further
    script = (
        f"from pathlib import Path; from lit_offrl.collect.recorder import collect_dataset\n"
        f"{limit if interruption == 'full disk' else ''}\n"
        f"collect_dataset({POINT!r}, steps=3000, seed=3, root=Path({str(tmp_path)!r}), overwrite=True, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    while interruption == "kill" and process.poll() is None:
        if journal.exists() and journal.stat().st_size > 30_000:
            process.kill()
            break
        time.sleep(0.002)
    _, err = process.communicate(timeout=60)
    if interruption == "kill":
        assert process.returncode == -signal.SIGKILL
    else:
        assert "RunFailure" in err
    assert 30_000 < journal.stat().st_size <= 200_000  # of some 300,000
    assert digest(folder) == older

    collect_dataset(POINT, steps=3000, seed=3, root=tmp_path, processes=3, overwrite=True)
    assert f"resuming {POINT}" in capsys.readouterr().err
    assert digest(folder) == digest(undisturbed)
    assert everything_below(tmp_path) == {"data", "main_data.hdf5", "metadata.json"}


def test_a_journal_keeps_the_whole_episodes_of_the_same_title(tmp_path):
    path = tmp_path / "journal"
    lengths = [3, 1, 5]
    episodes = [
        Episode({"observation": np.ones((n + 1, 2))}, np.zeros((n, 1), np.float32), *np.zeros((3, n)), "kind", False)
        for n in lengths
    ]
    sizes = []
    with Journal(path, b"title") as journal:
        for episode in episodes:
            journal.append(episode.to_bytes())
            sizes.append(path.stat().st_size)
    whole = path.read_bytes()

    def reopened(content, title=b"title"):
        path.write_bytes(content)
        with Journal(path, title) as journal:
            journal.append(episodes[1].to_bytes())
            kept = [len(episode) for episode in journal.read(100)]
            assert (journal.episodes, journal.steps) == (len(kept), sum(kept))
            return kept[:-1]

    assert reopened(whole) == lengths
    assert reopened(whole[:-1]) == reopened(whole[: sizes[1] + 1]) == reopened(whole[: sizes[1]]) == [3, 1]
    assert reopened(whole[: sizes[0] - 1]) == reopened(b"") == reopened(whole[:4]) == []
    assert reopened(whole, b"another title") == []
    damaged = bytearray(whole)
    damaged[sizes[0] + 100 : sizes[1]] = bytes(sizes[1] - sizes[0] - 100)  # zeros, as after a power failure
    assert reopened(bytes(damaged)) == [3]


def test_a_journal_of_nonsense_begins_anew(tmp_path):
    """A length that no memory could hold is no record."""
    (tmp_path / "journal").write_bytes(b"\xff" * 100)
    with Journal(tmp_path / "journal", b"title") as journal:
        assert (journal.episodes, journal.steps) == (0, 0)
    whole = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(whole + b"\xff" * 100)
    with Journal(tmp_path / "journal", b"title") as journal:
        assert (journal.episodes, journal.steps) == (0, 0)
    assert (tmp_path / "journal").read_bytes() == whole


def test_a_journal_is_read_up_to_a_step(tmp_path):
    with Journal(tmp_path / "journal", b"title") as journal:
        for n in (3, 1, 5):
            arrays = np.zeros((n, 1), np.float32), *np.zeros((3, n))
            journal.append(Episode({"observation": np.ones((n + 1, 2))}, *arrays, "kind", False).to_bytes())
        for steps, lengths in ((2, [2]), (3, [3]), (4, [3, 1]), (6, [3, 1, 2]), (9, [3, 1, 5])):
            assert [len(episode) for episode in journal.read(steps)] == lengths


def test_a_second_collector_waits_and_takes_the_first_ones_result(tmp_path, capsys):
    path = collect_dataset(POINT, steps=30, root=tmp_path, processes=1, progress=False)
    aside = tmp_path / "aside"
    path.rename(aside)  # as if the first were not done yet
    with FileLock(tmp_path / ".lit_offrl" / "offrl-pointmaze-umaze-v0" / "lock"):
        results = []
        second = Thread(target=lambda: results.append(collect_dataset(POINT, steps=30, root=tmp_path)))
        second.start()
        for _ in range(200):
            if "waiting" in capsys.readouterr().err:
                break
            time.sleep(0.05)
        else:
            pytest.fail("it did not wait")
        aside.rename(path)
        written = (path / "data" / "main_data.hdf5").stat().st_mtime_ns
    second.join(timeout=30)
    assert results == [path]
    assert (path / "data" / "main_data.hdf5").stat().st_mtime_ns == written


def test_an_interrupted_replacement_is_undone(tmp_path):
    path = collect_dataset(POINT, steps=30, root=tmp_path, processes=1, progress=False)
    path.rename(tmp_path / ".lit_offrl" / "offrl-pointmaze-umaze-v0" / "replaced")
    with pytest.raises(UserError, match="already lies in"):
        collect_dataset(POINT, steps=30, root=tmp_path, processes=1, progress=False)
    assert everything_below(tmp_path) == {"data", "main_data.hdf5", "metadata.json"}


def test_a_script_without_a_main_guard_can_collect(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path; from lit_offrl.collect.recorder import collect_dataset\n"
        f"print(collect_dataset({POINT!r}, steps=60, processes=2, root=Path({str(tmp_path)!r}), progress=False))"
    )
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, env=paths, cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / POINT), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_id": "offrl/antmaze/umase-v0"}, "did you mean 'offrl/antmaze/umaze-v0'"),
        ({"dataset_id": POINT, "steps": 0}, "steps: 0 transitions"),
        ({"dataset_id": POINT, "processes": 0}, "processes: 0 cannot"),
        ({"dataset_id": POINT, "seed": -1}, "seed: -1 is negative"),
    ],
)
def test_bad_arguments_are_user_errors(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        collect_dataset(**arguments, root=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_relative_minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", "here")
    collect_dataset("offrl/pointmaze/umaze-v0", steps=300, processes=1, progress=False)
    assert is_present("offrl/pointmaze/umaze-v0")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
