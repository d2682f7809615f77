from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from lit_offrl.collect.catalog import CATALOG
from lit_offrl.data.info import DatasetInfo, EnvironmentInfo
from lit_offrl.envs.make import environment_for, make_env
from lit_offrl.envs.rollout import Rollouts, rollout
from lit_offrl.envs.scores import d4rl_reference, reference_for
from lit_offrl.errors import UserError


class Countdown(gymnasium.Env):
    """Lasts `seed % 7 + 1` steps; the observation holds the seed and the number of steps taken."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, report_success: bool = True):
        self.report_success = report_success

    def reset(self, *, seed=None, options=None):
        assert seed is not None, "an episode was begun without its seed"
        self.seed, self.steps = seed, 0
        return self._observation(), {}

    def step(self, action):
        assert self.steps <= self.seed % 7, "a finished episode was stepped"
        assert np.abs(action) <= 1
        self.steps += 1
        done = self.steps == self.seed % 7 + 1
        info = {"success": done and self.seed % 2 == 0} if self.report_success else {}
        return self._observation(), float(action[0]), False, done, info

    def _observation(self):
        return np.array([self.seed, self.steps], np.float32)


def half(observations):
    return np.full((len(observations), 1), 0.5)


def info_of(source="offrl", environment=None, id="x-v0", reference=None):  # noqa: A002
    return DatasetInfo(id, source, Path(), "", environment=environment, reference=reference)


# -------------------------------------------------------------------------------------------------------- rollouts


@pytest.mark.parametrize("num_envs", [1, 3, 10, 40])
@pytest.mark.parametrize("processes", [False, True])
def test_every_seed_is_played_once_and_in_order(num_envs, processes):
    seeds = [5, 20, 3, 3, 17, 0, 8, 41, 12, 6, 30]
    episodes = rollout(half, Countdown, seeds, num_envs, processes)
    assert [e.seed for e in episodes] == seeds
    assert [e.length for e in episodes] == [s % 7 + 1 for s in seeds]
    assert [e.episode_return for e in episodes] == [0.5 * (s % 7 + 1) for s in seeds]
    assert [e.success for e in episodes] == [s % 2 == 0 for s in seeds]


def test_policy_sees_active_rows_only_and_freed_environments_go_on_at_once():
    sizes, seen = [], []

    def policy(observations):
        sizes.append(len(observations))
        seen.extend(map(tuple, observations))
        return half(observations)

    seeds = [6, 0, 1, 2]  # 7, 1, 2 and 3 steps in 2 environments: 7 + 6 of the calls
    rollout(policy, Countdown, seeds, num_envs=2)
    assert sizes == [2, 2, 2, 2, 2, 2, 1]
    assert sorted(seen) == sorted((s, t) for s in seeds for t in range(s % 7 + 1))


def test_actions_are_clipped_and_bad_ones_refused():
    assert rollout(lambda o: np.full((len(o), 1), 9.0), Countdown, [0])[0].episode_return == 1.0
    with pytest.raises(ValueError, match="not finite"):
        rollout(lambda o: np.full((len(o), 1), np.nan), Countdown, [0])
    with pytest.raises(ValueError, match=r"\(2, 3\), not \(2, 1\)"):
        rollout(lambda o: np.zeros((2, 3)), Countdown, [0, 1])


def test_success_is_none_where_the_environment_reports_none():
    assert rollout(half, functools.partial(Countdown, False), [0])[0].success is None


def test_rollouts_are_reusable_and_stop_when_told():
    with Rollouts(Countdown, 2) as rollouts:
        first = rollouts.rollout(half, range(6))
        calls = iter([False, True])
        assert [e.seed for e in rollouts.rollout(half, [6, 0, 6], should_stop=lambda: next(calls))] == [0]
        assert rollouts.rollout(half, range(6)) == first
        assert rollouts.rollout(half, []) == []


def test_an_error_in_a_worker_reaches_the_caller():
    with Rollouts(Countdown, 2, processes=True) as rollouts, pytest.raises(Exception, match="seed"):
        rollouts.rollout(half, [0, None])


def test_spawned_workers_do_not_run_the_main_script_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import functools\n"
        "print('main runs')\n"
        "from lit_offrl.envs.make import make_env\n"
        "from lit_offrl.envs.rollout import rollout\n"
        "from lit_offrl.collect.catalog import recipe_for\n"
        "recipe = recipe_for('offrl/pointmaze/umaze-v0')\n"
        "make = functools.partial(make_env, recipe.environment, recipe.observation_keys)\n"
        "episodes = rollout(lambda o: o[:, :2] * 0, make, [0, 1, 2, 3], 4, processes=True)\n"
        "print([e.length for e in episodes])\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["main runs", "[300, 300, 300, 300]"], done.stderr


@pytest.mark.parametrize("dataset", ["offrl/pointmaze/umaze-v0", "offrl/antmaze/umaze-v0"])
def test_an_episode_is_the_same_alone_and_among_others(dataset):
    recipe = CATALOG[dataset]
    short = EnvironmentInfo(recipe.env_id, recipe.environment.kwargs, 30)
    make = functools.partial(make_env, short, recipe.observation_keys)
    finals = {}

    def policy(observations):
        for row in observations:
            finals[row.tobytes()] = True
        size = make_action_size(recipe.body)
        return np.sin(7 * observations[:, :size] + np.arange(size))

    alone = [rollout(policy, make, [seed])[0] for seed in (11, 12, 13)]
    rows_alone = set(finals)
    finals.clear()
    together = rollout(policy, make, [13, 11, 12], num_envs=2)
    assert {e.seed: e for e in alone} == {e.seed: e for e in together}
    assert set(finals) == rows_alone  # every single observation, bit for bit


def make_action_size(body):
    return {"point": 2, "ant": 8}[body]


@pytest.mark.slow
def test_processes_change_nothing():
    recipe = CATALOG["offrl/antmaze/umaze-v0"]
    make = functools.partial(make_env, recipe.environment, recipe.observation_keys)

    def policy(observations):
        return np.sin(7 * observations[:, :8])

    assert rollout(policy, make, range(4), 4) == rollout(policy, make, range(4), 4, processes=True)


# ---------------------------------------------------------------------------------------------------- environments


@pytest.mark.parametrize(
    ("dataset", "size", "start", "goal"),
    [
        ("offrl/pointmaze/umaze-v0", 4, None, (-1.0, -1.0)),
        ("offrl/antmaze/umaze-v0", 29, (-4.0, 4.0), (-4.0, -4.0)),
    ],
)
def test_collected_mazes_have_a_fixed_goal_and_flat_observations(dataset, size, start, goal, capfd):
    recipe = CATALOG[dataset]
    env = make_env(environment_for(info_of(environment=recipe.environment)), recipe.observation_keys)
    starts = []
    for seed in range(5):
        observation, _ = env.reset(seed=seed)
        assert observation.dtype == np.float32
        assert observation.shape == (size,) == env.observation_space.shape
        # Wherever the goal is placed, its cell's center lies within the 0.45 m of success.
        assert np.linalg.norm(env.unwrapped.goal - np.array(goal)) < 0.45
        starts.append(observation[:2])
    if start is None:
        assert np.ptp(np.array(starts), axis=0).max() > 1.0
    else:
        assert np.abs(np.array(starts) - start).max() <= 0.3 + 1e-6
    assert env.spec.max_episode_steps == recipe.max_episode_steps
    assert capfd.readouterr().out == ""


def test_observation_keys_are_concatenated_in_their_order():
    recipe = CATALOG["offrl/pointmaze/umaze-v0"]
    env = make_env(recipe.environment, ("desired_goal", "observation"), reset_options={"reset_cell": np.array([1, 2])})
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation[:2], env.unwrapped.goal.astype(np.float32))
    assert np.abs(observation[2:4] - (0.0, 1.0)).max() <= 0.25
    with pytest.raises(UserError, match="no observation 'speed'"):
        make_env(recipe.environment, ("speed",))


def test_unknown_environments_are_user_errors():
    with pytest.raises(UserError, match="NoSuch-v0"):
        make_env(EnvironmentInfo("NoSuch-v0", {}, 10))
    with pytest.raises(UserError, match="no environment to evaluate in"):
        environment_for(info_of())
    with pytest.raises(UserError, match="only boxes"):
        make_env(EnvironmentInfo("CartPole-v1", {}, 10))


@pytest.mark.parametrize(
    ("env_id", "source", "kwargs", "steps"),
    [
        ("PointMaze_UMaze-v3", "minari", {"continuing_task": False, "reset_target": False}, 300),
        ("PointMaze_Medium-v3", "minari", {"continuing_task": False, "reset_target": False}, 600),
        ("PointMaze_LargeDense-v3", "minari", {"continuing_task": True, "reset_target": False}, 800),
        ("AntMaze_UMaze-v4", "minari", {"continuing_task": False, "reset_target": False}, 700),
        ("AntMaze_Large_Diverse_GR-v4", "d4rl", {"continuing_task": False, "reset_target": False}, 1000),
        ("PointMaze_UMaze-v3", "d4rl", {"continuing_task": True, "reset_target": True}, 7),
        ("AdroitHandPen-v1", "d4rl", {"continuing_task": True, "reset_target": True}, 100),
        ("AdroitHandPen-v1", "minari", {"continuing_task": True, "reset_target": True}, 7),
        ("Hopper-v5", "minari", {"continuing_task": True, "reset_target": True}, 7),
    ],
)
def test_recording_environments_become_evaluation_environments(env_id, source, kwargs, steps):
    recorded = EnvironmentInfo(env_id, {"continuing_task": True, "reset_target": True}, 7)
    assert environment_for(info_of(source, recorded)) == EnvironmentInfo(env_id, kwargs, steps)


# ---------------------------------------------------------------------------------------------------------- scores


def test_scores_against_published_pairs():

    hopper = reference_for(info_of("d4rl", id="hopper-medium-v2"))
    assert (hopper.name, hopper.minimum, hopper.maximum) == ("d4rl", -20.272305, 3234.3)
    assert hopper.normalize(-20.272305) == 0.0
    assert hopper.normalize(3234.3) == 100.0
    assert hopper.normalize(1606.9963) == pytest.approx(50.0, abs=0.01)
    assert d4rl_reference("halfcheetah-full-replay-v2") == (-280.178953, 12135.0)
    assert d4rl_reference("halfcheetah-full-replay-v0") is None
    assert d4rl_reference("antmaze-large-diverse-v2") == (0.0, 1.0)
    assert d4rl_reference("antmaze-umaze-v1") is None
    assert d4rl_reference("door-cloned-v1") == (-56.512833, 2880.5693087298737)
    assert d4rl_reference("kitchen-mixed-v0") == (0.0, 4.0)
    assert d4rl_reference("maze2d-eval-large-v1") == (16.4, 302.22)


def test_tables_are_never_mixed():
    assert reference_for(info_of("minari", id="hopper-medium-v2")) is None
    assert reference_for(info_of("d4rl", id="offrl/antmaze/umaze-v0", reference=(0.0, 1.0))) is None
    assert reference_for(info_of("file", reference=(0.0, 1.0))) is None
    assert reference_for(info_of("minari", reference=(1.0, 3.0))).name == "minari"
    local = reference_for(info_of("offrl", reference=(0.5, 1.0)))
    assert (local.name, local.normalize(0.75)) == ("local", 50.0)
    assert reference_for(info_of("minari", reference=(1.0, 1.0))) is None
