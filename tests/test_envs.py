"""Environments, episodes and scores, in the real simulators."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from lit_offrl.data.info import DatasetInfo, EnvironmentInfo
from lit_offrl.data.sources.d4rl import D4RL_FILES
from lit_offrl.envs.make import environment_for, make_env
from lit_offrl.envs.rollout import Array, Episode, Policy, Rollouts, StoppedEarly
from lit_offrl.envs.scores import ScoreReference, reference_for
from lit_offrl.errors import RunFailure, UserError
from lit_offrl.system.files import no_files_left

EPISODIC = {"continuing_task": False, "reset_target": False}
HOPPER = EnvironmentInfo("Hopper-v5", {}, 100)
POINTMAZE = EnvironmentInfo("PointMaze_Open-v3", EPISODIC, 60)
POINTMAZE_KEYS = ("achieved_goal", "observation", "desired_goal")
make_hopper = partial(make_env, HOPPER)
make_pointmaze = partial(make_env, POINTMAZE, POINTMAZE_KEYS)


def info(dataset: str, source: str, environment: EnvironmentInfo | None = None, reference: Any = None) -> DatasetInfo:
    return DatasetInfo(dataset, source, Path("x"), "", environment=environment, reference=reference)


def feedback(action_dim: int) -> Policy:
    """A deterministic policy whose rows do not depend on the batch they are in (a matrix product's may)."""

    def policy(observations: Array, episodes: Sequence[int]) -> Array:
        phases = 3 * observations.sum(axis=1, dtype=np.float64)[:, None] + np.arange(action_dim)
        return np.sin(phases).astype(np.float32)

    return policy


def toward_goal(observations: Array, episodes: Sequence[int]) -> Array:
    """Push a point toward its goal; the columns are those of `POINTMAZE_KEYS`."""
    return 10 * (observations[:, 6:] - observations[:, :2]) - observations[:, 4:6]


class Countdown(gym.Env[np.ndarray, np.ndarray]):
    """Ends after `seed` steps with reward 1 each; counts how it is used."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gym.spaces.Box(-0.5, 0.5, (1,), np.float32)
        self.resets: list[int] = []
        self.actions: list[float] = []
        self.closed = 0
        self.left = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        assert seed is not None
        self.resets.append(seed)
        self.left = seed
        return np.array([seed, 0], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.left > 0, "stepped after its end"
        self.left -= 1
        self.actions.append(float(action[0]))
        # Success in the middle of an episode must not be forgotten at its end; odd seeds never succeed.
        success = self.resets[-1] % 2 == 0 and self.left == 1
        return np.array([self.resets[-1], self.left], np.float32), 1.0, self.left == 0, False, {"success": success}

    def close(self) -> None:
        self.closed += 1


class Broken(Countdown):
    def step(self, action: np.ndarray) -> Any:
        raise ArithmeticError("unstable simulation")


# ------------------------------------------------------------------------------------------------------------ make


@pytest.mark.parametrize(
    ("env_id", "keys", "size"),
    [
        ("PointMaze_UMaze-v3", ("achieved_goal", "observation", "desired_goal"), 8),
        ("PointMaze_UMaze-v3", ("observation", "desired_goal"), 6),
        ("AntMaze_UMaze-v4", ("achieved_goal", "observation"), 29),
        ("FrankaKitchen-v1", ("observation",), 59),
    ],
)
def test_dictionary_observations_are_concatenated_in_the_order_of_the_keys(
    env_id: str, keys: tuple[str, ...], size: int
) -> None:
    kwargs = {} if "Kitchen" in env_id else EPISODIC
    env = make_env(EnvironmentInfo(env_id, kwargs, 10), keys)
    with no_files_left():
        raw = gym.make(env_id, disable_env_checker=True, **kwargs)
    flat, expected = env.reset(seed=7)[0], raw.reset(seed=7)[0]
    for _ in range(3):
        assert flat.dtype == np.float32
        assert env.observation_space.contains(flat)
        assert flat.shape == env.observation_space.shape == (size,)
        np.testing.assert_array_equal(flat, np.concatenate([expected[key] for key in keys]).astype(np.float32))
        action = np.full(raw.action_space.shape, 0.3, np.float32)
        flat, expected = env.step(action)[0], raw.step(action)[0]
    env.close()
    raw.close()


def test_plain_observations_become_float32() -> None:
    env = make_hopper()
    observation, _ = env.reset(seed=0)
    assert observation.dtype == env.observation_space.dtype == np.float32
    np.testing.assert_array_equal(observation, gym.make("Hopper-v5").reset(seed=0)[0].astype(np.float32))


def test_nested_observations_are_named_by_paths() -> None:
    keys = ("observation", "achieved_goal/microwave", "desired_goal/microwave")
    env = make_env(EnvironmentInfo("FrankaKitchen-v1", {"tasks_to_complete": ["microwave"]}, 10), keys)
    raw = gym.make("FrankaKitchen-v1", tasks_to_complete=["microwave"], disable_env_checker=True)
    expected = raw.reset(seed=3)[0]
    parts = [expected["observation"], expected["achieved_goal"]["microwave"], expected["desired_goal"]["microwave"]]
    np.testing.assert_array_equal(env.reset(seed=3)[0], np.concatenate(parts).astype(np.float32))


def test_without_a_time_limit_the_environments_own_holds() -> None:
    env = make_env(EnvironmentInfo("Pendulum-v1", {}, None))
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[3] for _ in range(200)]
    assert ends == [False] * 199 + [True]


def test_the_time_limit_truncates() -> None:
    env = make_env(EnvironmentInfo("HalfCheetah-v5", {}, 3))
    env.reset(seed=0)
    ends = [env.step(np.zeros(6, np.float32))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


@pytest.mark.parametrize(
    ("environment", "keys", "message"),
    [
        (EnvironmentInfo("PointMaze_UMase-v3", {}, 10), None, "did you mean 'PointMaze_UMaze-v3'"),
        (EnvironmentInfo("Hopper-v99", {}, 10), None, "Hopper-v99"),
        (EnvironmentInfo("no_such_package:Hopper-v5", {}, 10), None, "is its package installed"),
        (EnvironmentInfo("Hopper-v5", {"no_such_option": 1}, 10), None, "no_such_option"),
        (POINTMAZE, ("observation", "goal"), "achieved_goal, desired_goal, observation"),
        (POINTMAZE, None, "achieved_goal, desired_goal, observation"),
        (HOPPER, ("observation",), "no dictionary"),
        (EnvironmentInfo("FrankaKitchen-v1", {}, 10), ("observation", "achieved_goal"), "achieved_goal/microwave"),
        (EnvironmentInfo("Blackjack-v1", {}, 10), None, "made of vectors"),
    ],
)
def test_an_environment_that_cannot_be_built_is_a_user_error_of_one_line(
    environment: EnvironmentInfo, keys: tuple[str, ...] | None, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_env(environment, keys)
    assert "\n" not in str(caught.value)


def test_building_old_environments_is_silent() -> None:
    # In a fresh interpreter: gymnasium-robotics prints when it is first imported.
    program = (
        "from lit_offrl.data.info import EnvironmentInfo\n"
        "from lit_offrl.envs.make import make_env\n"
        "make_env(EnvironmentInfo('PointMaze_UMaze-v3', {}, 10), ('observation',)).reset(seed=0)\n"
        "make_env(EnvironmentInfo('Hopper-v4', {}, 10)).reset(seed=0)\n"
        "import sys; assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_silence_does_not_outlive_the_construction() -> None:
    make_hopper().close()
    with pytest.warns(UserWarning, match="still heard"):
        warnings.warn("still heard", UserWarning, stacklevel=1)


@pytest.mark.parametrize("env_id", ["AntMaze_UMaze-v4", "AntMaze_UMaze-v5", "PointMaze_UMaze-v3"])
def test_a_maze_leaves_no_file_behind_and_needs_none(
    env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    env = make_env(EnvironmentInfo(env_id, EPISODIC, 10), ("observation", "desired_goal"))
    assert tempfile.gettempdir() == str(tmp_path)
    assert not list(tmp_path.iterdir())
    plays = []
    for seed in (1, 2, 1):
        observations = [env.reset(seed=seed)[0]]
        observations += [env.step(np.full(env.action_space.shape, 0.3))[0] for _ in range(3)]
        plays.append(np.concatenate(observations))
    np.testing.assert_array_equal(plays[0], plays[2])
    assert not np.array_equal(plays[0], plays[1])


def test_worker_processes_leave_no_files_of_mazes_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # for this process, and
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for its workers
    make = partial(make_env, EnvironmentInfo("AntMaze_UMaze-v4", EPISODIC, 10), ("observation",))
    with Rollouts(make, 4, processes=True) as rollouts:
        assert [episode.length for episode in rollouts.run(feedback(8), range(6))] == [10] * 6
    assert not list(tmp_path.rglob("*.xml"))  # multiprocessing keeps a folder of its own there


@pytest.mark.parametrize(
    ("dataset", "source", "kwargs", "limit"),
    [
        ("D4RL/pointmaze/open-v2", "minari", EPISODIC, 300),
        ("D4RL/pointmaze/umaze-v2", "minari", EPISODIC, 300),
        ("D4RL/pointmaze/medium-v2", "minari", EPISODIC, 600),
        ("D4RL/pointmaze/large-v2", "minari", EPISODIC, 800),
        ("D4RL/pointmaze/large-dense-v2", "minari", {"continuing_task": True, "reset_target": False}, 800),
        ("D4RL/antmaze/umaze-diverse-v1", "minari", EPISODIC, 700),
        ("D4RL/antmaze/medium-play-v1", "minari", EPISODIC, 1000),
        ("D4RL/antmaze/large-diverse-v1", "minari", EPISODIC, 1000),
        ("D4RL/pen/human-v2", "minari", {"continuing_task": True, "reset_target": True}, 100),
        ("offrl/antmaze/umaze-v0", "offrl", {"continuing_task": True, "reset_target": True}, 1000000),
        ("mujoco/hopper/medium-v0", "minari", {"continuing_task": True, "reset_target": True}, 1000000),
        ("someone/antmaze/umaze-v1", "minari", {"continuing_task": True, "reset_target": True}, 1000000),
    ],
)
def test_d4rl_datasets_are_evaluated_as_d4rl_does_and_others_as_they_say(
    dataset: str, source: str, kwargs: dict[str, Any], limit: int
) -> None:
    stored = EnvironmentInfo("Any-v0", {"maze_map": [[1]], "continuing_task": True, "reset_target": True}, 1000000)
    environment = environment_for(info(dataset, source, stored))
    assert environment == EnvironmentInfo("Any-v0", {"maze_map": [[1]], **kwargs}, limit)
    assert stored.kwargs["continuing_task"] is True


def test_kitchen_pays_once_per_task_and_keeps_its_time_limit() -> None:
    stored = EnvironmentInfo("FrankaKitchen-v1", {"remove_task_when_completed": False}, 450)
    environment = environment_for(info("D4RL/kitchen/mixed-v2", "minari", stored))
    assert environment == EnvironmentInfo("FrankaKitchen-v1", {"remove_task_when_completed": True}, 450)


def test_a_dataset_without_environment_cannot_be_evaluated() -> None:
    with pytest.raises(UserError, match=r"my/data.*--data\.environment"):
        environment_for(info("my/data.hdf5", "file"))
    noted = replace(info("maze2d-umaze-v1", "d4rl"), environment_note="other physics")
    with pytest.raises(UserError, match="other physics"):
        environment_for(noted)


# --------------------------------------------------------------------------------------------------------- rollout


def play_alone(make: Any, policy: Policy, seed: int) -> Episode:
    """The loop that anybody would write, in an environment of its own."""
    env = make()
    observation, _ = env.reset(seed=seed)
    rewards: list[float] = []
    successes: list[bool] = []
    done = False
    while not done:
        action = np.clip(policy(observation[None], [0])[0], env.action_space.low, env.action_space.high)
        observation, reward, terminated, truncated, extra = env.step(action)
        rewards.append(float(reward))
        if "success" in extra:
            successes.append(bool(extra["success"]))
        done = terminated or truncated
    env.close()
    return Episode(seed, sum(rewards), len(rewards), any(successes) if successes else None)


@pytest.mark.parametrize(
    ("make", "policy", "successes"), [(make_hopper, feedback(3), {None}), (make_pointmaze, toward_goal, {True, False})]
)
@pytest.mark.parametrize(("num_envs", "processes"), [(1, False), (4, False), (20, False), (3, True)])
def test_an_episode_is_the_same_alone_and_among_others(
    make: Any, policy: Policy, successes: set[bool | None], num_envs: int, processes: bool
) -> None:
    seeds = [11, 3, 5, 3, 8, 2, 14, 1, 9]
    expected = [play_alone(make, policy, seed) for seed in seeds]
    with Rollouts(make, num_envs, processes) as rollouts:
        assert rollouts.run(policy, seeds) == expected
        assert rollouts.run(policy, seeds[::-1]) == expected[::-1]  # nothing is left over from the first run
    assert len({episode.length for episode in expected}) > 3
    assert {episode.success for episode in expected} == successes


def test_a_real_success_is_reported() -> None:
    """In an open maze a point that is pushed toward its goal gets there."""
    environment = replace(POINTMAZE, max_episode_steps=300)

    with Rollouts(partial(make_env, environment, POINTMAZE_KEYS), 2) as rollouts:
        episodes = rollouts.run(toward_goal, range(4))
    assert all(episode.success is True and episode.episode_return == 1.0 for episode in episodes)
    assert all(0 < episode.length < 300 for episode in episodes)


def test_free_environments_start_the_next_seed_at_once_and_idle_ones_are_left_alone() -> None:
    envs: list[Countdown] = []

    def make() -> Countdown:
        envs.append(Countdown())
        return envs[-1]

    batches: list[list[int]] = []
    places: list[list[int]] = []

    def policy(observations: Array, episodes: Sequence[int]) -> Array:
        batches.append(observations[:, 0].astype(int).tolist())
        places.append(sorted(episodes))
        return np.full((len(observations), 1), 7.0)

    ended: list[int] = []
    with Rollouts(make, 2) as rollouts:
        episodes = rollouts.run(policy, [9, 2, 4, 1], on_episode=lambda episode: ended.append(episode.seed))
    assert episodes == [
        Episode(9, 9, 9, False),
        Episode(2, 2, 2, True),
        Episode(4, 4, 4, True),
        Episode(1, 1, 1, False),
    ]
    assert ended == [2, 4, 1, 9]
    assert [env.resets for env in envs] == [[9], [2, 4, 1]]
    assert [sorted(batch) for batch in batches] == [[2, 9]] * 2 + [[4, 9]] * 4 + [[1, 9]] + [[9]] * 2
    assert places == [[0, 1]] * 2 + [[0, 2]] * 4 + [[0, 3]] + [[0]] * 2
    assert {action for env in envs for action in env.actions} == {0.5}  # clipped to the box
    assert [env.closed for env in envs] == [1, 1]


def test_no_seeds_no_episodes() -> None:
    with Rollouts(Countdown, 2) as rollouts:
        assert rollouts.run(feedback(1), []) == []


@pytest.mark.parametrize("processes", [False, True])
def test_should_stop_ends_a_run_and_the_next_one_is_sound(processes: bool) -> None:
    asked = iter([False] * 3 + [True])
    with Rollouts(Countdown, 2, processes) as rollouts:
        with pytest.raises(StoppedEarly):
            rollouts.run(feedback(1), [9, 2, 4], should_stop=lambda: next(asked))
        assert [episode.length for episode in rollouts.run(feedback(1), [9, 2, 4])] == [9, 2, 4]


def test_actions_that_are_no_actions_are_refused() -> None:
    with Rollouts(Countdown, 2) as rollouts:
        with pytest.raises(RunFailure, match="not finite"):
            rollouts.run(lambda observations, _: np.full((len(observations), 1), np.nan, np.float32), [3])
        with pytest.raises(ValueError, match=r"\(1, 2\) instead of \(1, 1\)"):
            rollouts.run(lambda observations, _: np.zeros((len(observations), 2), np.float32), [3])
        assert rollouts.run(feedback(1), [3])[0].length == 3


def test_worker_processes_end_with_the_rollouts_and_hand_on_failures() -> None:
    with pytest.raises(UserError, match="Nowhere-v0"):
        Rollouts(partial(make_env, EnvironmentInfo("Nowhere-v0", {}, 1)), 2, processes=True)
    rollouts = Rollouts(Broken, 2, processes=True)
    with pytest.raises(RuntimeError, match="unstable simulation"):
        rollouts.run(feedback(1), [3, 4])
    rollouts.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(RuntimeError, match="unstable simulation"):
        rollouts.run(feedback(1), [3, 4])  # in environments that were built anew
    rollouts.close()


def count_construction(folder: Path) -> Countdown:
    (folder / uuid.uuid4().hex).touch()
    return Countdown()


@pytest.mark.parametrize(("cores", "num_envs"), [(1, 20), (1, 3), (2, 5), (4, 4), (4, 2)])
def test_worker_processes_build_as_many_environments_as_were_asked_for(
    cores: int, num_envs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_offrl.envs.rollout.available_cores", lambda: cores)
    with Rollouts(partial(count_construction, tmp_path), num_envs, processes=True) as rollouts:
        built = len(list(tmp_path.iterdir())) - 1  # the first one shows this process the action space
        assert built == num_envs
        assert [episode.length for episode in rollouts.run(feedback(1), range(1, num_envs + 3))] == [
            *range(1, num_envs + 3)
        ]


def test_a_nonsensical_number_of_environments_or_kind_of_action_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        Rollouts(Countdown, 0)
    with pytest.raises(UserError, match="Discrete"):
        Rollouts(lambda: gym.make("CartPole-v1"), 1)


# ---------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("dataset", "episode_return", "score"),
    [
        ("hopper-medium-v2", 3234.3, 100.0),
        ("hopper-full-replay-v1", -20.272305, 0.0),
        ("walker2d-medium-replay-v2", 4592.3, 100.0),
        ("halfcheetah-medium-expert-v0", 12135.0, 100.0),
        ("ant-random-v2", -325.6, 0.0),
        ("antmaze-large-diverse-v2", 0.5, 50.0),
        ("antmaze-umaze-v0", 1.0, 100.0),
        ("antmaze-medium-play-v1", 1.0, 100.0),
        ("antmaze-eval-large-play-v0", 1.0, 100.0),
        ("ant-random-expert-v0", 3879.7, 100.0),
        ("kitchen-mixed-v0", 3.0, 75.0),
        ("pen-cloned-v1", 96.262799, 0.0),
        ("door-human-v0", 2880.5693087298737, 100.0),
        ("maze2d-umaze-v1", 161.86, 100.0),
        ("maze2d-large-dense-v0", 27.38831, 0.0),
    ],
)
def test_d4rl_scores(dataset: str, episode_return: float, score: float) -> None:
    reference = reference_for(info(dataset, "d4rl"))
    assert reference is not None
    assert reference.name == "d4rl"
    assert reference.normalize(episode_return) == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize("dataset", D4RL_FILES)
def test_every_dataset_of_d4rl_has_a_reference(dataset: str) -> None:
    assert reference_for(info(dataset, "d4rl")) is not None


@pytest.mark.parametrize("dataset", ["hopper-full-replay-v0", "antmaze-eval-umaze-v2", "D4RL/antmaze/umaze-v1"])
def test_what_d4rl_has_no_reference_for_has_no_score(dataset: str) -> None:
    assert reference_for(info(dataset, "d4rl")) is None


def test_references_of_different_sources_are_never_mixed() -> None:
    own = (10.0, 30.0)
    assert reference_for(info("offrl/hopper/medium-v0", "offrl", reference=own)) == ScoreReference("local", 10, 30)
    assert reference_for(info("mujoco/hopper/medium-v0", "minari", reference=own)) == ScoreReference("minari", 10, 30)
    # An id that D4RL's table knows counts only for a dataset that came from D4RL, and then only the table counts.
    assert reference_for(info("hopper-medium-v2", "minari")) is None
    assert reference_for(info("hopper-medium-v2", "file", reference=own)) is None
    d4rl = reference_for(info("hopper-medium-v2", "d4rl", reference=own))
    assert d4rl is not None
    assert d4rl.minimum == -20.272305


def test_a_reference_that_is_no_scale_is_none() -> None:
    assert reference_for(info("offrl/x/y-v0", "offrl", reference=(5.0, 5.0))) is None
    assert reference_for(info("offrl/x/y-v0", "offrl", reference=json.loads("[NaN, 5.0]"))) is None


class NotFinite(gym.Env[np.ndarray, np.ndarray]):
    """Pays NaN in its third step."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**options)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.zeros(1, np.float32), np.nan if self.steps == 3 else 1.0, False, False, {}


def test_a_reward_that_is_not_finite_names_episode_and_step() -> None:
    with Rollouts(NotFinite, 1) as rollouts, pytest.raises(RunFailure, match="in step 3 of the episode with seed 7"):
        rollouts.run(lambda observations, _: np.zeros_like(observations), seeds=[7])
