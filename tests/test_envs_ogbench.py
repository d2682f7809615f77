"""OGBench's environments: episodes repeat from their seeds, and success is the score."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

from lit_offrl.callbacks.rollout import Scores
from lit_offrl.data.info import EnvironmentInfo
from lit_offrl.data.sources.ogbench import SUCCESS
from lit_offrl.envs.make import make_env
from lit_offrl.envs.rollout import Array, Episode, Rollouts
from lit_offrl.errors import UserError


def environment(name: str, limit: int | None = None) -> EnvironmentInfo:
    return EnvironmentInfo(f"ogbench/{name}", {}, limit)


def walk(observations: Array, indices: Any) -> Array:
    """Return actions that differ from episode to episode."""
    return np.stack([np.sin(10 * observation[:1] + np.arange(2)) for observation in observations])


@pytest.mark.parametrize("maze", ["medium", "teleport"])
def test_episodes_of_mazes_repeat_however_many_are_played_at_once(maze: str):
    info = environment(f"pointmaze-{maze}-singletask-v0", 60)
    played: list[list[Episode]] = []
    for num_envs in (1, 3):
        np.random.seed(num_envs)  # noqa: NPY002 (which must have no part in it)
        with Rollouts(partial(make_env, info), num_envs) as rollouts:
            played.append(rollouts.run(walk, range(5)))
    assert played[0] == played[1]
    assert [episode.length for episode in played[0]] == [60] * 5
    assert {episode.success for episode in played[0]} == {False}


def test_starts_of_mazes_and_exits_of_teleports_depend_on_the_seed():
    env = make_env(environment("pointmaze-teleport-singletask-v0"))
    usual = np.random.get_state()[1].tolist()  # noqa: NPY002
    exits, starts = [], []
    for seed in range(12):
        starts.append(tuple(env.reset(seed=seed)[0]))
        maze: Any = env.unwrapped
        maze.set_xy(np.array(maze._teleport_info["teleport_in_xys"][0]))
        env.step(np.zeros(2, np.float32))  # its observation is that of before the teleport
        exits.append(tuple(maze.get_xy()))
    assert len(set(starts)) == 12
    assert len(set(exits)) == 3
    assert np.random.get_state()[1].tolist() == usual  # noqa: NPY002
    again = [tuple(env.reset(seed=seed)[0]) for seed in range(12)]
    assert again == starts


def test_building_a_maze_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    env = make_env(environment("antmaze-medium-singletask-v0"))
    assert env.observation_space.shape == (29,)
    assert env.reset(seed=0)[0].dtype == np.float32
    assert not [*tmp_path.iterdir()]


def test_the_oracle_solves_the_cube():
    """The package's own planner, told where the task wants the cube, solves every episode; standing still none."""
    info = environment("cube-single-singletask-v0", 200)
    env = make_env(info)
    oracle = CubePlanOracle(env=env.unwrapped, noise=0)

    def told(info: dict[str, Any]) -> dict[str, Any]:
        task: Any = env.unwrapped
        position = task._data.mocap_pos[0].copy()
        target = {"task": "cube", "block": 0, "block_pos": position, "block_yaw": np.zeros(1)}
        return info | {f"privileged/target_{name}": value for name, value in target.items()}

    episodes = []
    for seed in range(3):
        observation, facts = env.reset(seed=seed)
        oracle.reset(observation, told(facts))
        total, length, done = 0.0, 0, False
        while not done:
            action = np.clip(oracle.select_action(observation, told(facts)), -1, 1).astype(np.float32)
            observation, reward, terminated, truncated, facts = env.step(action)
            total, length, done = total + float(reward), length + 1, terminated or truncated
        assert terminated
        assert reward == 0, "the state before the last action is one in which the task is solved"
        assert total == 1 - length
        episodes.append(Episode(seed, total, length, bool(facts["success"])))
    assert all(episode.success for episode in episodes)
    scores = Scores.of([*episodes, Episode(3, -200.0, 200, False)], SUCCESS)
    assert (scores.normalized, scores.success_rate) == (75, 0.75)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cube-single-v0", "'ogbench/cube-single-v0' has no task: .* like ogbench/cube-single-singletask-v0$"),
        ("cube-sinlge-singletask-v0", "'ogbench/cube-sinlge-singletask-v0' is not known .did you mean"),
    ],
)
def test_unknown_environments(name: str, words: str):
    with pytest.raises(UserError, match=words):
        make_env(environment(name))
