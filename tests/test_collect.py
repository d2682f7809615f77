from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import sys
import time
from contextlib import closing
from hashlib import sha256
from threading import Thread

import gymnasium
import h5py
import numpy as np
import pytest

from lit_offrl.collect import recorder
from lit_offrl.collect.behaviors import ANT_ARTIFACT, AntWalker, ant_features, ant_heading
from lit_offrl.collect.catalog import CATALOG, BehaviorMix
from lit_offrl.collect.episodes import EpisodeRecorder, make_environment
from lit_offrl.collect.mazes import MazeRoutes, Route
from lit_offrl.collect.recorder import collect_dataset
from lit_offrl.collect.workers import ordered_episodes
from lit_offrl.errors import UserError

POINT, ANT = "offrl/pointmaze/umaze-v0", "offrl/antmaze/umaze-v0"

# A U around a wall, and a chamber that nothing leads to.
MAP = [
    [1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 1, 0],
    [1, 1, 1, 0, 1, 1],
    [1, 0, 0, 0, 1, 1],
    [1, 1, 1, 1, 1, 1],
]


# ---------------------------------------------------------------------------------------------------------- routes


def test_distances_of_a_map_counted_by_hand():
    steps = MazeRoutes(MAP, 2.0).distances((3, 1))
    assert steps == {(3, 1): 0, (3, 2): 1, (3, 3): 2, (2, 3): 3, (1, 3): 4, (1, 2): 5, (1, 1): 6}


def test_cells_and_centers_agree_with_the_simulator():
    dataset = CATALOG[ANT]
    env = make_environment(dataset)
    maze = env.unwrapped.maze
    routes = MazeRoutes(dataset.maze_map, dataset.cell_size)
    for cell in routes.free:
        np.testing.assert_allclose(routes.center(cell), maze.cell_rowcol_to_xy(np.array(cell)))
        assert routes.cell(*routes.center(cell)) == cell
    assert routes.cell(-3.9, 2.2 - 0.3) == (1, 1)  # in the wall, just below the start
    env.close()


def test_carrots_follow_the_corridor_and_end_at_the_goal():
    routes = MazeRoutes(MAP, 2.0)
    goal = (routes.center((3, 1))[0] + 0.3, routes.center((3, 1))[1] - 0.1)
    x, y = routes.center((1, 1))
    assert routes.carrot(x, y, goal) == (x + 1.0, y)
    assert routes.carrot(x + 0.4, y + 0.5, goal) == (pytest.approx(x + 1.4), y)  # back to the middle of the corridor
    x, y = routes.center((1, 3))
    assert routes.carrot(x, y, goal) == (x, y - 1.0)
    x, y = routes.center((3, 1))
    assert routes.carrot(x, y, goal) == goal


def test_walking_after_the_carrot_visits_all_waypoints_without_touching_walls():
    routes = MazeRoutes(MAP, 2.0)
    stops = [routes.center(cell) for cell in ((1, 3), (1, 1), (3, 1))]
    route = Route(routes, stops, arrival=0.2)
    x, y = routes.center((3, 2))
    visited = []
    for _ in range(400):
        target = route.target(x, y)
        if route.finished:
            break
        distance = math.dist(target, (x, y))
        x, y = x + 0.1 * (target[0] - x) / distance, y + 0.1 * (target[1] - y) / distance
        row, column = math.floor(5 - y / 1) // 2, math.floor((x + 6) / 2)
        assert MAP[row][column] != 1, (x, y)
        if not visited or visited[-1] != routes.cell(x, y):
            visited.append(routes.cell(x, y))
    assert route.finished
    assert visited == [
        *[(3, 2), (3, 3), (2, 3), (1, 3)],
        *[(1, 2), (1, 1)],
        *[(1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)],
    ]


def test_unreachable_goals_are_refused():
    routes = MazeRoutes(MAP, 2.0)
    with pytest.raises(ValueError, match="no route"):
        routes.carrot(*routes.center((1, 1)), routes.center((1, 5)))
    with pytest.raises(ValueError, match="not free"):
        routes.distances((0, 0))
    with pytest.raises(ValueError, match="no free cell"):
        MazeRoutes([[1]], 1.0)


# ------------------------------------------------------------------------------------------------------- behaviors


def ant_observation(rng):
    observation = rng.standard_normal(27)
    yaw = rng.uniform(-np.pi, np.pi)
    observation[1:5] = math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)
    return observation, yaw


def test_the_ant_walks_the_same_whichever_way_the_world_is_turned():
    rng = np.random.default_rng(0)
    walker = AntWalker()
    for turn in (0.3, math.pi / 2, 2.5):
        observation, yaw = ant_observation(rng)
        turned = observation.copy()
        turned[1:5] = math.cos((yaw + turn) / 2), 0.0, 0.0, math.sin((yaw + turn) / 2)
        cos, sin = math.cos(turn), math.sin(turn)
        vx, vy = observation[13:15]
        turned[13:15] = cos * vx - sin * vy, sin * vx + cos * vy
        target = (1.0, -0.4)
        turned_target = (cos * target[0] - sin * target[1], sin * target[0] + cos * target[1])
        np.testing.assert_allclose(
            walker.act(observation, 0, 0, target), walker.act(turned, 0, 0, turned_target), atol=1e-9
        )


def test_the_ant_has_no_front():
    """Relabeling the legs by a quarter turn and heading a quarter turn aside relabels the torques."""
    rng = np.random.default_rng(1)
    walker = AntWalker()
    signs = np.array([1.0, -1.0, -1.0, 1.0])
    hip_actuator = np.array([2, 4, 6, 0])
    for _ in range(5):
        observation, yaw = ant_observation(rng)
        direction = yaw + rng.uniform(-0.7, 0.7)
        # The body turned back by a quarter turn while leg i takes the place and the motion of leg i - 1.
        turned = observation.copy()
        turned[1:5] = math.cos((yaw - math.pi / 2) / 2), 0.0, 0.0, math.sin((yaw - math.pi / 2) / 2)
        wx, wy = observation[16:18]
        turned[16:18] = -wy, wx  # the same spin seen from the turned body
        for base in (5, 19):
            for leg in range(4):
                turned[base + 2 * ((leg + 1) % 4)] = observation[base + 2 * leg]
                ankle = signs[leg] * observation[base + 2 * leg + 1]
                turned[base + 2 * ((leg + 1) % 4) + 1] = signs[(leg + 1) % 4] * ankle
        target = (math.cos(direction), math.sin(direction))
        before, after = walker.act(observation, 0, 0, target), walker.act(turned, 0, 0, target)
        for leg in range(4):
            next_leg = (leg + 1) % 4
            assert after[hip_actuator[next_leg]] == pytest.approx(before[hip_actuator[leg]], abs=1e-9)
            assert signs[next_leg] * after[hip_actuator[next_leg] + 1] == pytest.approx(
                signs[leg] * before[hip_actuator[leg] + 1], abs=1e-9
            )


def test_headings_are_quarter_turns_and_a_rest():
    observation, yaw = ant_observation(np.random.default_rng(2))
    for direction in np.linspace(-7, 7, 57):
        quarter_turns, error = ant_heading(observation, direction)
        assert abs(error) <= math.pi / 4 + 1e-12
        assert math.remainder(direction - yaw - quarter_turns * math.pi / 2 - error, 2 * math.pi) == pytest.approx(0)
        assert ant_features(observation, direction, quarter_turns, error).shape == (26,)


def test_artifact_is_small_and_holds_plain_arrays():
    assert ANT_ARTIFACT.stat().st_size <= 50 * 1024
    with np.load(ANT_ARTIFACT, allow_pickle=False) as arrays:
        assert {arrays[name].dtype for name in arrays.files} == {np.dtype(np.float16)}


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_ant_reaches_the_goal(noise):
    recorder = EpisodeRecorder(CATALOG[ANT], 0)
    for seed in (500, 501):
        episode = recorder.attempt(seed, noise)
        assert episode.success
        assert len(episode) < 400
    recorder.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "noise"), [(ANT, 0.0), (ANT, 0.1), (POINT, 0.5), ("offrl/pointmaze/medium-v0", 0.5)]
)
def test_behaviors_reach_the_goal_on_unseen_seeds(dataset, noise):
    recorder = EpisodeRecorder(CATALOG[dataset], 0)
    episodes = [recorder.attempt(seed, noise) for seed in range(7000, 7030)]
    recorder.close()
    assert np.mean([episode.success for episode in episodes]) >= 0.95
    assert not any(episode.fell for episode in episodes)


# -------------------------------------------------------------------------------------------------------- recorder


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
    recorder = EpisodeRecorder(CATALOG[POINT], 3)
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
    assert facts["behavior_mix"]["wander"] == 0.5
    assert facts["action_noise"] == [0.5, 0.5]
    assert facts["versions"]["lit_offrl"]
    assert minari.get_normalized_score(dataset, np.array([metadata["ref_min_score"], 1.0])).tolist() == [0.0, 1.0]


def test_the_stored_specification_rebuilds_the_evaluation(collected, monkeypatch):
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(collected[0]))
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


def test_ant_episodes_do_not_depend_on_those_before():
    recorder = EpisodeRecorder(CATALOG[ANT], 5)
    alone = recorder.record(1)
    recorder.close()
    with closing(ordered_episodes(ANT, 5, 1)) as episodes:
        next(episodes)
        second = next(episodes)
    np.testing.assert_array_equal(alone.actions, second.actions)
    for key, part in alone.observations.items():
        np.testing.assert_array_equal(part, second.observations[key])


def test_episodes_cut_short_end_in_a_truncation():
    recorder = EpisodeRecorder(CATALOG[POINT], 0)
    episode = recorder.attempt(3, 0.0)
    recorder.close()
    assert episode.success
    assert episode.cut(len(episode)) is episode
    part = episode.cut(4)
    assert (len(part), part.success, part.truncations.tolist()) == (4, False, [False, False, False, True])
    assert all(len(observations) == 5 for observations in part.observations.values())
    assert not episode.truncations.any()


def test_a_worker_that_dies_is_reported():
    with closing(ordered_episodes("no such dataset", 0, 1)) as episodes, pytest.raises(RuntimeError, match="KeyError"):
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
def test_a_failure_while_writing_leaves_no_trace(tmp_path, monkeypatch, overwrite):
    if overwrite:
        collect_dataset(POINT, steps=30, root=tmp_path, processes=1, progress=False)
    before = everything_below(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(recorder, "_metadata", fail)  # called when the episodes are in the file already
    with pytest.raises(OSError, match="disk full"):
        collect_dataset(POINT, steps=50, root=tmp_path, processes=1, overwrite=overwrite, progress=False)
    assert everything_below(tmp_path) == before
    if overwrite:
        metadata = json.loads((tmp_path / POINT / "data" / "metadata.json").read_text())
        assert metadata["total_steps"] == 30


def everything_below(root):
    """Names of what lies in the dataset's folder; nothing but the lock may lie elsewhere."""
    assert {path.name for path in (root / ".lit_offrl").glob("*/*")} <= {"lock"}
    return {path.name for path in (root / POINT).rglob("*")}


def test_a_second_collector_waits_and_takes_the_first_ones_result(tmp_path, capsys):
    path = collect_dataset(POINT, steps=30, root=tmp_path, processes=1, progress=False)
    aside = tmp_path / "aside"
    path.rename(aside)  # as if the first were not done yet
    with (tmp_path / ".lit_offrl" / "offrl-pointmaze-umaze-v0" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
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


def test_probabilities_must_sum_to_one():
    with pytest.raises(ValueError, match="do not sum to 1"):
        BehaviorMix(direct=0.5, detour=0.5, wander=0.5, random_start=1.0, noise=(0.0, 0.0))


@pytest.mark.parametrize("dataset", list(CATALOG))
def test_catalog_rows_hold_together(dataset):
    row = CATALOG[dataset]
    assert row.id == dataset
    assert len({len(cells) for cells in row.maze}) == 1
    goals = [(i, j) for i, cells in enumerate(row.maze) for j, cell in enumerate(cells) if cell == "g"]
    assert len(goals) == 1
    routes = MazeRoutes(row.maze_map, row.cell_size)
    assert set(routes.distances(goals[0])) == set(routes.free)
    assert row.reference[0] < row.reference[1]
    env = make_environment(row)
    assert env.unwrapped.maze.maze_size_scaling == row.cell_size
    walls = [[cell == 1 for cell in cells] for cells in row.maze_map]
    registered = gymnasium.spec(row.env_id)
    assert walls == [[cell == 1 for cell in cells] for cells in registered.kwargs["maze_map"]]
    assert registered.max_episode_steps == row.max_episode_steps
    assert json.loads(env.spec.to_json())["kwargs"].items() >= row.env_kwargs.items()
    env.close()


def test_importing_catalog_and_recorder_is_light():
    script = (
        "import sys; import lit_offrl.collect.catalog, lit_offrl.collect.recorder\n"
        "print([m for m in ('torch', 'lightning', 'minari', 'gymnasium_robotics', 'h5py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
