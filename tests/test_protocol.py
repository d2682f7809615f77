"""What a run says about its rules: the environment that was played, and what differs from D4RL."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_offrl.data.info import DatasetInfo, EnvironmentInfo
from lit_offrl.envs.make import environment_for
from lit_offrl.envs.protocol import Protocol, protocol_of


def protocol(dataset: str, source: str, env_id: str, mujoco2_contacts: bool = True) -> Protocol:
    info = DatasetInfo(dataset, source, Path("x"), "", environment=EnvironmentInfo(env_id, {}, None))
    return protocol_of(info, environment_for(info, mujoco2_contacts))


@pytest.mark.parametrize(
    ("name", "differences"),
    [
        ("hopper-v2", []),
        ("halfcheetah-v0", []),
        ("ant-v1", []),
        ("pen-v1", []),
        ("maze2d-umaze-dense-v1", []),
        ("maze2d-open-v0", ["reference returns"]),
        ("antmaze-umaze-v2", ["deep in a wall"]),
        ("antmaze-umaze-v1", ["deep in a wall", "the goal is drawn once"]),
        ("door-v0", ["capsules"]),
        ("hammer-v0", ["1e-5"]),
        ("kitchen-mixed-v0", ["1e-3"]),
    ],
)
def test_d4rl_environments_say_what_remains_different(name: str, differences: list[str]):
    found = protocol("x", "d4rl", f"D4RL/{name}")
    assert (found.rules, found.environment, found.mujoco2_contacts) == ("d4rl-1", f"D4RL/{name}", True)
    assert len(found.differences) == len(differences)
    assert all(part in whole for part, whole in zip(differences, found.differences, strict=True))


@pytest.mark.parametrize(("name", "matters"), [("hopper-v2", True), ("walker2d-v2", False), ("door-v0", True)])
def test_contacts_of_today_are_named_where_they_matter(name: str, matters: bool):
    found = protocol("x", "d4rl", f"D4RL/{name}", mujoco2_contacts=False)
    assert found.mujoco2_contacts is False
    assert ("contacts are those of the installed MuJoCo instead of MuJoCo 2" in found.differences) == matters


@pytest.mark.parametrize(
    ("dataset", "source", "env_id", "rules", "differences"),
    [
        ("D4RL/antmaze/umaze-v1", "minari", "AntMaze_UMaze-v4", "minari-d4rl", ["motors", "starts and goals"]),
        ("D4RL/pointmaze/umaze-v2", "minari", "PointMaze_UMaze-v3", "minari-d4rl", ["ends at", "starts and goals"]),
        ("D4RL/pointmaze/umaze-dense-v2", "minari", "PointMaze_UMaze-v3", "minari-d4rl", ["starts and goals"]),
        ("D4RL/pen/human-v2", "minari", "AdroitHandPen-v1", "minari-d4rl", ["dropped"]),
        ("D4RL/door/human-v2", "minari", "AdroitHandDoor-v1", "minari-d4rl", ["hand and object"]),
        ("D4RL/kitchen/mixed-v2", "minari", "FrankaKitchen-v1", "minari-d4rl", ["noise"]),
        ("mujoco/hopper/expert-v0", "minari", "Hopper-v5", "minari", []),
        ("offrl/antmaze/umaze-v0", "offrl", "AntMaze_UMaze-v4", "local", []),
        ("my/log.npz", "file", "Hopper-v5", "own", []),
        ("my/log.npz", "file", "AdroitHandHammer-v1", "own", ["hand and object"]),
    ],
)
def test_other_environments_have_rules_of_their_own(
    dataset: str, source: str, env_id: str, rules: str, differences: list[str]
):
    found = protocol(dataset, source, env_id)
    assert (found.rules, found.environment, found.mujoco2_contacts) == (rules, env_id, None)
    assert len(found.differences) == len(differences)
    assert all(part in whole for part, whole in zip(differences, found.differences, strict=True))
