"""The Minari adapter on files that Minari itself wrote."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from minari.data_collector import EpisodeBuffer

from lit_offrl.data import sources
from lit_offrl.errors import UserError
from lit_offrl.system.files import no_files_left

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari.*")  # asks for an e-mail address and the like


@pytest.fixture(scope="module", autouse=True)
def _no_models_of_mazes() -> Iterator[None]:
    """Minari's writer builds the environments of the datasets."""
    with no_files_left():
        yield


@pytest.fixture(scope="module", params=["hdf5", "arrow", "parquet"])
def form(request: pytest.FixtureRequest, minari_root: Path) -> str:
    if request.param != "hdf5":
        pytest.importorskip("pyarrow", reason="Minari's arrow format needs pyarrow")
    return request.param


def buffer(index: int, observations: object, actions: np.ndarray, rewards: object, terminal: bool = False):
    steps = len(actions)
    ends = [False] * (steps - 1) + [True]
    return EpisodeBuffer(
        id=index,
        observations=observations,
        actions=actions,
        rewards=list(rewards),
        terminations=ends if terminal else [False] * steps,
        truncations=[False] * steps if terminal else ends,
    )


@pytest.fixture(scope="module")
def pendulum(form: str) -> str:
    """13 episodes of Pendulum in Minari's own writer: flat observations, ends by time limit only."""
    env = gymnasium.make("Pendulum-v1", max_episode_steps=7)
    env.action_space.seed(0)
    buffers = []
    for episode in range(13):
        observations, rewards = [env.reset(seed=episode)[0]], []
        actions = [env.action_space.sample() for _ in range(7)]
        for action in actions:
            observation, reward, *_ = env.step(action)
            observations.append(observation)
            rewards.append(reward)
        buffers.append(buffer(episode, np.stack(observations), np.stack(actions), rewards))
    dataset = f"tests/pendulum-{form}-v0"
    minari.create_dataset_from_buffers(
        dataset, buffers, env=env, ref_min_score=-100.0, ref_max_score=-1.0, data_format=form
    )
    return dataset


def test_flat_observations(pendulum: str):
    transitions, info = sources.load(pendulum)
    reference = minari.load_dataset(pendulum)
    episodes = list(reference.iterate_episodes())
    assert len(transitions) == reference.total_steps == 13 * 7
    # more than ten episodes: `episode_10` must not come before `episode_2`
    np.testing.assert_allclose(transitions.rewards, np.concatenate([e.rewards for e in episodes]), rtol=1e-6)
    np.testing.assert_array_equal(transitions.observations, np.concatenate([e.observations[:-1] for e in episodes]))
    np.testing.assert_array_equal(transitions.next_observations, np.concatenate([e.observations[1:] for e in episodes]))
    np.testing.assert_array_equal(transitions.actions, np.concatenate([e.actions for e in episodes]))
    assert not transitions.terminals.any()
    assert np.flatnonzero(transitions.timeouts).tolist() == [7 * i + 6 for i in range(13)]
    assert info.source == "minari"
    assert info.observation_keys is None
    assert info.reference == (-100.0, -1.0)
    assert info.action_bounds == ((-2.0,), (2.0,))
    assert info.environment is not None
    assert (info.environment.env_id, info.environment.max_episode_steps) == ("Pendulum-v1", 7)
    assert len(info.sha256) == 64


def test_minari_still_reads_a_dataset_with_a_cache(pendulum: str, form: str, minari_root: Path):
    sources.load(pendulum)
    folder = minari_root / pendulum
    assert (folder / ("data/main_data.hdf5.cache.npz" if form == "hdf5" else "data.cache.npz")).is_file()
    assert minari.load_dataset(pendulum).total_episodes == 13
    assert pendulum in minari.list_local_datasets()


def test_a_file_outside_the_root(pendulum: str, form: str, minari_root: Path, tmp_path: Path):
    if form != "hdf5":
        return  # a folder; only its HDF5 sibling is one file
    file = tmp_path / "own.hdf5"
    file.write_bytes((minari_root / pendulum / "data" / "main_data.hdf5").read_bytes())
    transitions, info = sources.load(str(file))
    assert len(transitions) == 91
    assert (info.source, info.environment, info.reference) == ("file", None, None)


# ------------------------------------------------------------------------------------------------------------ goals


def goal_file(path: Path, *, goals: list[list[float]], begins_with_position: bool) -> Path:
    """Write episodes of a goal environment in Minari's layout."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for i, goal in enumerate(goals):
            observation = rng.normal(size=(4, 3))
            achieved = observation[:, :2] if begins_with_position else rng.normal(size=(4, 2))
            group = file.create_group(f"episode_{i}")
            group["observations/observation"] = observation
            group["observations/achieved_goal"] = achieved
            group["observations/desired_goal"] = np.tile(goal, (4, 1))
            group["actions"] = np.zeros((3, 2), np.float32)
            group["rewards"] = np.zeros(3)
            group["terminations"] = np.array([False, False, i == 0])
            group["truncations"] = np.zeros(3, bool)
    return path


@pytest.mark.parametrize(
    ("goals", "begins", "keys"),
    [
        ([[1, 2], [1, 2]], True, ("observation",)),
        ([[1, 2], [1, 2]], False, ("achieved_goal", "observation")),
        ([[1, 2], [3, 2]], True, ("observation", "desired_goal")),
        ([[1, 2], [3, 2]], False, ("achieved_goal", "observation", "desired_goal")),
    ],
)
def test_goal_observations_become_vectors(tmp_path: Path, goals: list, begins: bool, keys: tuple[str, ...]):
    path = goal_file(tmp_path / "goals.hdf5", goals=goals, begins_with_position=begins)
    transitions, info = sources.load(str(path))
    assert info.observation_keys == keys
    with h5py.File(path) as file:
        expected = np.concatenate([file["episode_1/observations"][key][:-1] for key in keys], axis=1)
    np.testing.assert_allclose(transitions.observations[3:], expected, rtol=1e-6)
    assert transitions.terminals.tolist() == [False, False, True, False, False, False]
    assert transitions.timeouts.tolist() == [False] * 5 + [True], "an episode that just stops was cut"


def box(width: int) -> Box:
    return Box(-np.inf, np.inf, (width,), np.float64)


def kitchen(form: str, name: str, goals: list[float]) -> tuple[str, list[dict]]:
    """Observations as FrankaKitchen's: a vector, and a dictionary with an entry per task for either goal."""
    tasks = {"microwave": 1, "kettle": 2}
    space = Dict(
        observation=box(4),
        achieved_goal=Dict({task: box(width) for task, width in tasks.items()}),
        desired_goal=Dict({task: box(width) for task, width in tasks.items()}),
    )
    rng = np.random.default_rng(0)
    observations = [
        {
            "observation": rng.normal(size=(6, 4)),
            "achieved_goal": {task: rng.normal(size=(6, width)) for task, width in tasks.items()},
            "desired_goal": {task: np.full((6, width), goal) for task, width in tasks.items()},
        }
        for goal in goals
    ]
    buffers = [buffer(i, o, rng.normal(size=(5, 2)), rng.random(5)) for i, o in enumerate(observations)]
    minari.create_dataset_from_buffers(
        name, buffers, env="FrankaKitchen-v1", observation_space=space, action_space=box(2), data_format=form
    )
    return name, observations


def test_nested_goals_that_never_change_are_left_out(form: str):
    name, observations = kitchen(form, f"tests/kitchen-fixed-{form}-v0", [1.0, 1.0])
    transitions, info = sources.load(name)
    assert info.observation_keys == ("observation",)
    np.testing.assert_allclose(transitions.observations[5:], observations[1]["observation"][:-1], rtol=1e-6)


def test_nested_goals_that_change_come_last_in_alphabetical_order(form: str):
    name, observations = kitchen(form, f"tests/kitchen-moving-{form}-v0", [1.0, 2.0])
    transitions, info = sources.load(name)
    assert info.observation_keys == ("observation", "desired_goal/kettle", "desired_goal/microwave")
    assert transitions.observation_dim == 4 + 2 + 1
    np.testing.assert_allclose(transitions.next_observations[5:, :4], observations[1]["observation"][1:], rtol=1e-6)
    assert (transitions.observations[5:, 4:] == 2).all()


def test_any_other_dictionary_is_flattened_in_alphabetical_order(form: str):
    space = Dict(velocity=box(1), body=Dict(tip=box(2), base=box(1)))
    rng = np.random.default_rng(0)
    parts = {key: rng.normal(size=(4, width)) for key, width in (("velocity", 1), ("tip", 2), ("base", 1))}
    observations = {"velocity": parts["velocity"], "body": {"tip": parts["tip"], "base": parts["base"]}}
    name = f"tests/body-{form}-v0"
    minari.create_dataset_from_buffers(
        name,
        [buffer(0, observations, rng.normal(size=(3, 2)), [0, 0, 1], terminal=True)],
        observation_space=space,
        action_space=box(2),
        data_format=form,
    )
    transitions, info = sources.load(name)
    assert info.observation_keys == ("body/base", "body/tip", "velocity")
    expected = np.concatenate([parts["base"], parts["tip"], parts["velocity"]], axis=1)
    np.testing.assert_allclose(transitions.observations, expected[:-1], rtol=1e-6)
    assert transitions.terminals.tolist() == [False, False, True]
    assert not transitions.timeouts.any()
    assert info.action_bounds is None, "they are infinite"
    assert (info.environment, info.environment_note) == (None, "the dataset's metadata names no environment")


@pytest.fixture(scope="module")
def moving_goals(form: str) -> str:
    """PointMaze as Minari records it: the goal moves when it is reached, and episodes are cut there."""
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    env = gymnasium.make("PointMaze_UMaze-v3", continuing_task=True, reset_target=True, max_episode_steps=1_000_000)
    observation, _ = env.reset(seed=0, options={"reset_cell": np.array([1, 1]), "goal_cell": np.array([1, 3])})
    episodes: list[list[dict]] = [[observation]]
    actions: list[list[np.ndarray]] = [[]]
    while len(episodes) < 2 or len(actions[-1]) < 5:
        away = observation["desired_goal"] - observation["achieved_goal"]
        action = np.clip(10 * away - observation["observation"][2:], -1, 1).astype(np.float32)
        observation, reward, *_ = env.step(action)
        episodes[-1].append(observation)
        actions[-1].append(action)
        if reward and len(episodes) < 2:
            episodes.append([observation])
            actions.append([])
    name = f"tests/moving-{form}-v0"
    stacked = [{key: np.stack([step[key] for step in episode]) for key in episode[0]} for episode in episodes]
    minari.create_dataset_from_buffers(
        name,
        [buffer(i, o, np.stack(a), np.zeros(len(a))) for i, (o, a) in enumerate(zip(stacked, actions, strict=True))],
        env=env,
        data_format=form,
    )
    assert (stacked[1]["desired_goal"][0] == stacked[0]["desired_goal"][0]).all(), "the pitfall is in the data"
    assert (stacked[1]["desired_goal"][1] != stacked[0]["desired_goal"][0]).any()
    return name


def test_the_first_goal_of_a_pointmaze_episode_is_repaired(moving_goals: str):
    transitions, info = sources.load(moving_goals)
    assert info.observation_keys == ("observation", "desired_goal")
    first, second = transitions.episode_starts
    goals = transitions.observations[:, 4:]
    assert (goals[second:] == goals[second + 1]).all(), "the whole second episode heads for its own goal"
    assert (goals[first:second] == goals[first]).all()
    assert (goals[first] != goals[second]).any()
    np.testing.assert_array_equal(transitions.next_observations[second - 1, 4:], goals[first])
    np.testing.assert_array_equal(transitions.observations[second, :4], transitions.next_observations[second - 1, :4])


def test_goals_of_other_sources_are_left_as_they_are(moving_goals: str, form: str, minari_root: Path, tmp_path: Path):
    if form != "hdf5":
        return
    file = tmp_path / "own.hdf5"
    file.write_bytes((minari_root / moving_goals / "data" / "main_data.hdf5").read_bytes())
    transitions, _ = sources.load(str(file))
    first, second = transitions.episode_starts
    np.testing.assert_array_equal(transitions.observations[second, 4:], transitions.observations[first, 4:])


def test_long_episodes_are_complete(form: str):
    """Arrow and Parquet files of more rows than Minari's own reader returns, 32,768."""
    steps = (40_000, 3)
    buffers = [buffer(i, np.arange(n + 1.0)[:, None], np.zeros((n, 1)), np.arange(n)) for i, n in enumerate(steps)]
    name = f"tests/long-{form}-v0"
    minari.create_dataset_from_buffers(name, buffers, observation_space=box(1), action_space=box(1), data_format=form)
    transitions, _ = sources.load(name)
    np.testing.assert_array_equal(transitions.rewards, np.concatenate([np.arange(n) for n in steps]))
    np.testing.assert_array_equal(transitions.next_observations[:, 0], transitions.rewards + 1)
    assert np.flatnonzero(transitions.timeouts).tolist() == [39_999, 40_002]


# ----------------------------------------------------------------------------------------------------- broken input


def test_broken_metadata(minari_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    folder = tmp_path / "tests" / "broken-v0" / "data"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"metadata\.json is not readable"):
        sources.load("tests/broken-v0")
    (folder / "metadata.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"main_data\.hdf5 is missing"):
        sources.load("tests/broken-v0")
    (folder / "metadata.json").write_text(json.dumps({"data_format": "zarr"}))
    with pytest.raises(UserError, match="hdf5, arrow, parquet are read"):
        sources.load("tests/broken-v0")


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_a_truncated_file_is_named(data_format: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset, steps = "tests/truncated-v0", 4
    minari.create_dataset_from_buffers(
        dataset,
        [buffer(0, np.zeros((steps + 1, 2)), np.zeros((steps, 1)), np.zeros(steps))],
        observation_space=box(2),
        action_space=box(1),
        data_format=data_format,
    )
    (file,) = (tmp_path / dataset / "data" / "0").glob(f"*.{data_format}")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"0/{file.name} is broken or not of its format"):
        sources.load(dataset)


def test_arrow_without_pyarrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    folder = tmp_path / "tests" / "arrow-v0" / "data"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"data_format": "arrow"}))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", None)
    with pytest.raises(UserError, match="needs pyarrow: pip install pyarrow"):
        sources.load("tests/arrow-v0")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda episode: episode.pop("actions"), "episode_1: the key 'actions' is missing"),
        (lambda episode: episode.pop("rewards"), "episode_1: the key 'rewards' is missing"),
        (
            lambda episode: episode.update(rewards=np.zeros(4)),
            "episode_1: has 3 observations for 4 rewards; one more is needed",
        ),
        (lambda episode: episode.update(rewards=np.array([0, np.nan])), "episode_1: 'rewards' holds NaN .* in row 1"),
        (
            lambda episode: episode.update(observations=np.zeros((3, 5))),
            r"episode_1: 'observations' has shape \(2, 5\); the episodes before have width 2",
        ),
        (lambda episode: episode.update(actions=np.zeros((2, 1), "S3")), r"episode_1: 'actions' holds \|S3 values"),
        (
            lambda episode: episode.update({"observations/a": np.zeros((3, 1))}),
            "episode_1: the key 'observations' is missing",
        ),
    ],
)
def test_broken_episodes(tmp_path: Path, damage: Callable[[dict], object], complaint: str):
    path = tmp_path / "own.hdf5"
    with h5py.File(path, "w") as file:
        for index in range(2):
            episode = {
                "observations": np.zeros((3, 2)),
                "actions": np.zeros((2, 1)),
                "rewards": np.zeros(2),
                "terminations": np.zeros(2, bool),
                "truncations": np.zeros(2, bool),
            }
            if index == 1:
                damage(episode)
                if "observations/a" in episode:
                    del episode["observations"]
            for name, array in episode.items():
                file[f"episode_{index}/{name}"] = array
    with pytest.raises(UserError, match=complaint) as error:
        sources.load(str(path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_remote_that_cannot_be_reached_is_known_at_once(minari_root: Path, monkeypatch: pytest.MonkeyPatch):
    begin = time.monotonic()
    with pytest.raises(UserError, match="its remote cannot be reached: copy it to"):
        sources.load("D4RL/antmaze/umaze-v1")
    assert time.monotonic() - begin < 6
