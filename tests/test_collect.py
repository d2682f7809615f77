from __future__ import annotations

import json
import math
import subprocess
import sys

import h5py
import numpy as np
import pytest

from lit_offrl.collect import recorder
from lit_offrl.collect.behaviors import ANT_ARTIFACT, AntWalker, ant_features, ant_heading
from lit_offrl.collect.catalog import CATALOG, BehaviorMix, recipe_for
from lit_offrl.collect.mazes import MazeRoutes, Route
from lit_offrl.collect.recorder import EpisodePlayer, collect_dataset
from lit_offrl.data.sources import file_sha256
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
    recipe = recipe_for(ANT)
    player = EpisodePlayer(recipe, 0)
    maze = player._env.unwrapped.maze
    routes = MazeRoutes(recipe.maze_map, recipe.cell_size)
    for cell in routes.free:
        np.testing.assert_allclose(routes.center(cell), maze.cell_rowcol_to_xy(np.array(cell)))
        assert routes.cell(*routes.center(cell)) == cell
    assert routes.cell(-3.9, 2.2 - 0.3) == (1, 1)  # in the wall, just below the start
    player.close()


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
    player = EpisodePlayer(recipe_for(ANT), 0)
    for seed in (500, 501, 502):
        episode = player.walk("direct", seed, None, 0, noise, np.random.default_rng(seed))
        assert episode.terminated
        assert len(episode) < 400
    player.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "noise"), [(ANT, 0.0), (ANT, 0.1), (POINT, 0.5), ("offrl/pointmaze/medium-v0", 0.5)]
)
def test_behaviors_reach_the_goal_on_unseen_seeds(dataset, noise):
    player = EpisodePlayer(recipe_for(dataset), 0)
    episodes = [player.walk("direct", seed, None, 0, noise, np.random.default_rng(seed)) for seed in range(7000, 7030)]
    player.close()
    assert np.mean([episode.terminated for episode in episodes]) >= 0.95
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
    player = EpisodePlayer(recipe_for(POINT), 3)
    for number, episode in enumerate(episodes):
        played = player.play(number).cut(len(episode.rewards))
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
    player.close()

    metadata = dataset.storage.metadata
    successes = [bool(episode.terminations[-1]) for episode in episodes]
    assert metadata["success_rate"] == pytest.approx(np.mean(successes))
    assert sum(kind["episodes"] for kind in metadata["categories"].values()) == len(episodes)
    assert sum(kind["steps"] for kind in metadata["categories"].values()) == 3000
    assert metadata["categories"]["wander"]["successes"] == 0
    assert metadata["observation_keys"] == ["observation"]
    assert (metadata["seed"], metadata["steps"]) == (3, 3000)
    assert metadata["behavior_mix"]["wander"] == 0.5
    assert metadata["action_noise"] == [0.5, 0.5]
    assert metadata["reference_measurement"]["episodes"] == 100
    assert minari.get_normalized_score(dataset, np.array([metadata["ref_min_score"], 1.0])).tolist() == [0.0, 1.0]


def test_the_stored_specification_rebuilds_the_evaluation(collected, monkeypatch):
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(collected[0]))
    env = minari.load_dataset(POINT).recover_environment(eval_env=True)
    ours = EpisodePlayer(recipe_for(POINT), 0)._env
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
    assert info.environment == recipe_for(POINT).environment
    assert tuple(info.observation_keys) == ("observation",)
    assert info.reference == (recipe_for(POINT).reference.minimum, 1.0)


def test_the_result_does_not_depend_on_processes(collected, tmp_path):
    _, path = collected
    alone = collect_dataset(POINT, steps=3000, seed=3, root=tmp_path, processes=1, progress=False)
    assert contents(alone) == contents(path)
    other = collect_dataset(POINT, steps=3000, seed=4, root=tmp_path / "other", processes=1, progress=False)
    assert contents(other) != contents(path)


@pytest.mark.slow
def test_ant_data_do_not_depend_on_processes(tmp_path):
    paths = [
        collect_dataset(ANT, steps=6000, root=tmp_path / str(processes), processes=processes, progress=False)
        for processes in (1, 3)
    ]
    assert contents(paths[0]) == contents(paths[1])


def contents(path):
    found = {}
    with h5py.File(path / "data" / "main_data.hdf5") as file:
        file.visititems(lambda name, item: found.update({name: item[()].tobytes()} if hasattr(item, "dtype") else {}))
    return found


def test_an_existing_dataset_is_kept_unless_told_otherwise(collected):
    root, path = collected
    digest = file_sha256(path / "data" / "main_data.hdf5")
    with pytest.raises(UserError, match="already lies in"):
        collect_dataset(POINT, steps=10, root=root, progress=False)
    assert file_sha256(path / "data" / "main_data.hdf5") == digest


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

    monkeypatch.setattr(recorder, "describe", fail)  # called when the episodes are in the file already
    with pytest.raises(OSError, match="disk full"):
        collect_dataset(POINT, steps=50, root=tmp_path, processes=1, overwrite=overwrite, progress=False)
    assert everything_below(tmp_path) == before
    if overwrite:
        metadata = json.loads((tmp_path / POINT / "data" / "metadata.json").read_text())
        assert metadata["total_steps"] == 30


def everything_below(root):
    """Names of what lies in the datasets' folder besides the lock files."""
    target = root / POINT
    assert [path for path in (root / ".lit_offrl").glob("*") if path.suffix != ".lock"] == [] or not root.exists()
    return {path.name for path in target.rglob("*")}


def test_two_collectors_at_once_make_one_dataset(tmp_path):
    script = (
        "import sys; from pathlib import Path; from lit_offrl.collect.recorder import collect_dataset\n"
        f"print(collect_dataset({POINT!r}, steps=400, processes=1, root=Path(sys.argv[1]), progress=False))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in both:
        output, errors = process.communicate(timeout=60)
        # The slower one may come so late that it finds the finished dataset and says so.
        assert output.strip() == str(tmp_path / POINT) or "already lies in" in errors
    assert everything_below(tmp_path) == {"data", "main_data.hdf5", "metadata.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_id": "offrl/antmaze/umase-v0"}, "did you mean 'offrl/antmaze/umaze-v0'"),
        ({"dataset_id": POINT, "steps": 0}, "steps: 0 is too small"),
        ({"dataset_id": POINT, "processes": 0}, "processes: 0 is too small"),
        ({"dataset_id": POINT, "seed": -1}, "seed: -1 is too small"),
    ],
)
def test_bad_arguments_are_user_errors(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        collect_dataset(**arguments, root=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_probabilities_must_sum_to_one():
    with pytest.raises(ValueError, match="do not sum to 1"):
        BehaviorMix(direct=0.5, detour=0.5, wander=0.5, evaluation_start=0.5)


@pytest.mark.parametrize("dataset", list(CATALOG))
def test_catalog_rows_hold_together(dataset):
    recipe = CATALOG[dataset]
    assert recipe.id == dataset
    assert len({len(row) for row in recipe.layout}) == 1
    assert sum(row.count("g") for row in recipe.layout) == 1
    assert any("r" in row for row in recipe.layout)
    routes = MazeRoutes(recipe.maze_map, recipe.cell_size)
    assert set(routes.distances(recipe.goal_cell)) == set(routes.free)
    assert recipe.reference.minimum < recipe.reference.maximum
    json.dumps(recipe.environment.kwargs)


def test_importing_the_catalog_and_recorder_is_light():
    script = (
        "import sys; import lit_offrl.collect.recorder, lit_offrl.envs.rollout\n"
        "print([m for m in ('torch', 'lightning', 'minari', 'gymnasium_robotics', 'h5py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
