"""Mazes: routes, behaviors and episodes; and that the catalog's rows hold together."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter

import gymnasium
import numpy as np
import pytest

from lit_offrl.collect.behaviors import ANT_ARTIFACT, AntWalker, ant_features, ant_heading
from lit_offrl.collect.catalog import CATALOG, BehaviorMix, MazeDataset
from lit_offrl.collect.episodes import make_environment
from lit_offrl.collect.maze_episodes import MazeRecorder
from lit_offrl.collect.mazes import MazeRoutes, Route

MAZES = [dataset.id for dataset in CATALOG.values() if isinstance(dataset, MazeDataset)]
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


# -------------------------------------------------------------------------------------------------------- episodes


@pytest.mark.parametrize(
    ("dataset", "noise"),
    [(ANT, 0.0), (ANT, 0.1), ("offrl/antmaze/medium-play-v0", 0.06), ("offrl/antmaze/large-diverse-v0", 0.06)],
)
def test_the_ant_reaches_the_goal_well_within_the_limit(dataset, noise):
    recorder = MazeRecorder(CATALOG[dataset], 0)
    for seed in (500, 501):
        episode = recorder.attempt(seed, noise)
        assert episode.success
        assert len(episode) < 0.75 * CATALOG[dataset].max_episode_steps
    recorder.close()


@pytest.mark.slow
@pytest.mark.parametrize("dataset", MAZES)
def test_behaviors_reach_the_goal_on_unseen_seeds(dataset):
    recorder = MazeRecorder(CATALOG[dataset], 0)
    episodes = [recorder.attempt(seed, CATALOG[dataset].mix.noise[1]) for seed in range(7000, 7030)]
    recorder.close()
    assert np.mean([episode.success for episode in episodes]) >= 0.95
    assert sum(episode.fell for episode in episodes) <= 1  # about one ant in a thousand episodes falls


@pytest.mark.slow
@pytest.mark.parametrize("dataset", MAZES)
def test_about_half_of_the_episodes_fail(dataset):
    recorder = MazeRecorder(CATALOG[dataset], 0)
    episodes = [recorder.record(index) for index in range(60)]
    recorder.close()
    # 0.5 of the episodes mean to fail, and some detours run out of time: 60 of them lie within 0.2 of 0.45 at 3 sigma.
    assert 0.25 < np.mean([episode.success for episode in episodes]) < 0.65
    assert sum(episode.fell for episode in episodes) <= 1  # about one ant in a thousand episodes falls


def plans(dataset, count):
    """Return where the first episodes start, which cells they are led through and their kinds, without playing them."""
    recorder = MazeRecorder(CATALOG[dataset], 0)
    routes = recorder._routes
    recorder._play = lambda rng, observation, points, kind, noise: (
        routes.cell(*observation["achieved_goal"]),
        [routes.cell(*point) for point in points],
        kind,
    )
    drawn = [recorder.record(index) for index in range(count)]
    recorder.close()
    return drawn


def test_kinds_come_in_the_shares_of_the_mix():
    mix, drawn = CATALOG[ANT].mix, plans(ANT, 400)
    kinds = Counter(kind for _, _, kind in drawn)
    for kind, share in (("direct", mix.direct), ("detour", mix.detour), ("wander", mix.wander)):
        assert kinds[kind] / 400 == pytest.approx(share, abs=0.075)  # 3 standard deviations of a share of 0.5
    at_start = sum(start == (1, 1) for start, _, _ in drawn) / 400
    assert at_start == pytest.approx(0.75 + 0.25 / 6, abs=0.075)


@pytest.mark.parametrize("maze", ["medium", "large"])
def test_play_keeps_to_picked_places_and_diverse_goes_anywhere(maze):
    play, diverse = f"offrl/antmaze/{maze}-play-v0", f"offrl/antmaze/{maze}-diverse-v0"
    cells = {(i, j): mark for i, row in enumerate(CATALOG[play].maze) for j, mark in enumerate(row)}
    goal = next(cell for cell, mark in cells.items() if mark == "g")
    picked = {cell for cell, mark in cells.items() if mark == "p"}
    starts, ways = set(), set()
    for start, way, kind in plans(play, 100):
        starts.add(start)
        ways |= set(way)
        assert (way[-1] == goal) == (kind != "wander")
    assert starts == picked | {(1, 1)}
    assert ways == picked | {goal}
    free = {cell for cell, mark in cells.items() if mark != "1"}
    drawn = plans(diverse, 400)
    assert {start for start, _, _ in drawn} == free - {goal}
    assert set().union(*(way for _, way, _ in drawn)) == free


def test_ant_episodes_do_not_depend_on_those_before():
    recorder = MazeRecorder(CATALOG[ANT], 5)
    alone = recorder.record(1)
    recorder.record(0)
    again = recorder.record(1)
    recorder.close()
    np.testing.assert_array_equal(alone.actions, again.actions)
    for key, part in alone.observations.items():
        np.testing.assert_array_equal(part, again.observations[key])


def test_episodes_cut_short_end_in_a_truncation():
    recorder = MazeRecorder(CATALOG[POINT], 0)
    episode = recorder.attempt(3, 0.0)
    recorder.close()
    assert episode.success
    assert episode.cut(len(episode)) is episode
    part = episode.cut(4)
    assert (len(part), part.success, part.truncations.tolist()) == (4, False, [False, False, False, True])
    assert all(len(observations) == 5 for observations in part.observations.values())
    assert not episode.truncations.any()


# --------------------------------------------------------------------------------------------------------- catalog


def test_probabilities_must_sum_to_one():
    with pytest.raises(ValueError, match="do not sum to 1"):
        BehaviorMix(direct=0.5, detour=0.5, wander=0.5, random_start=1.0, noise=(0.0, 0.0))


@pytest.mark.parametrize("dataset", list(CATALOG))
def test_catalog_rows_hold_together(dataset):
    row = CATALOG[dataset]
    assert row.id == dataset
    assert row.reference is None or row.reference[0] < row.reference[1]
    assert row.license.startswith("MIT")
    env = make_environment(row)
    limit = gymnasium.spec(row.env_id.removeprefix("ogbench/")).max_episode_steps
    assert limit == row.max_episode_steps == env.spec.max_episode_steps
    assert json.loads(env.spec.to_json())["kwargs"].items() >= row.env_kwargs.items()
    assert (env.action_space.low == -1).all()
    assert (env.action_space.high == 1).all()
    assert isinstance(env.observation_space, gymnasium.spaces.Dict) == (row.observation_keys is not None)
    env.close()


@pytest.mark.parametrize("dataset", MAZES)
def test_mazes_have_one_goal_that_can_be_reached_and_the_walls_of_their_environment(dataset):
    row = CATALOG[dataset]
    assert len({len(cells) for cells in row.maze}) == 1
    goals = [(i, j) for i, cells in enumerate(row.maze) for j, cell in enumerate(cells) if cell == "g"]
    assert len(goals) == 1
    routes = MazeRoutes(row.maze_map, row.cell_size)
    assert set(routes.distances(goals[0])) == set(routes.free)
    env = make_environment(row)
    assert env.unwrapped.maze.maze_size_scaling == row.cell_size
    env.close()
    walls = [[cell == 1 for cell in cells] for cells in row.maze_map]
    assert walls == [[cell == 1 for cell in cells] for cells in gymnasium.spec(row.env_id).kwargs["maze_map"]]


def test_importing_catalog_and_recorder_is_light():
    script = (
        "import sys; import lit_offrl.collect.catalog, lit_offrl.collect.recorder\n"
        "print([m for m in ('torch', 'lightning', 'minari', 'gymnasium_robotics', 'h5py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
