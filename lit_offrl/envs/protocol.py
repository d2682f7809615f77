"""How an evaluation is played, and what differs from the benchmark that gave the dataset its name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lit_offrl.data.info import DatasetInfo, EnvironmentInfo
from lit_offrl.data.sources.d4rl import D4RL_NAMESPACE
from lit_offrl.data.sources.ogbench import OGBENCH_NAMESPACE

D4RL_RULES = "d4rl-1"
"""D4RL's environments as `lit_offrl.envs.d4rl` builds them; another number means that scores may have changed."""

OGBENCH_RULES = "ogbench-1.2"
"""Environments of the package `ogbench` since 1.2: rewards, success and ends are those of the state before a step."""

_OGBENCH_DIFFERENCE = "figures published with version 1.1 count success in the state after a step, later ones before it"

MUJOCO2_CONTACTS = "mujoco2_contacts"
_WITHOUT_CONTACTS = ("halfcheetah", "walker2d")  # families that MuJoCo's changes do not concern
_MINARI_NAMESPACE = "D4RL/"  # of Minari's D4RL datasets
_MINARI_DIFFERENCES = (  # what the environments of Minari's D4RL datasets do otherwise than D4RL's, by dataset
    (r"antmaze/", "the ant's motors are five times as strong as D4RL's, and a step takes half as long"),
    (r"pointmaze/(?!.*dense)", "an episode ends at the goal, in D4RL it goes on and every step at the goal pays"),
    (r"(antmaze|pointmaze)/", "starts and goals vary otherwise, and a goal is reached within 0.45 instead of 0.5"),
    (r"pen/", "an episode goes on when the pen has been dropped"),
    (r"kitchen/", "observations have velocities and less noise, and tasks are checked without noise"),
)


@dataclass(frozen=True)
class Protocol:
    """The rules of an evaluation.

    Attributes:
        rules: `d4rl-1` and `ogbench-1.2`, with which published scores are comparable; `minari-d4rl` (Minari's
            environments with D4RL's limits and one goal), `minari`, `local` (of this package) or `own`.
        environment: Gymnasium id.
        mujoco2_contacts: Whether contacts are computed as in MuJoCo 2; None outside D4RL's environments.
        differences: What is known to differ from the benchmark of the dataset's name, a sentence each.
    """

    rules: str
    environment: str
    mujoco2_contacts: bool | None
    differences: tuple[str, ...]


def protocol_of(info: DatasetInfo, environment: EnvironmentInfo) -> Protocol:
    """Return the protocol of policies trained on a dataset and played in an environment."""
    if environment.env_id.startswith(D4RL_NAMESPACE):
        name = environment.env_id.removeprefix(D4RL_NAMESPACE)
        contacts = bool(environment.kwargs.get(MUJOCO2_CONTACTS, True))
        return Protocol(D4RL_RULES, environment.env_id, contacts, tuple(_differences_to_d4rl(name, contacts)))
    if environment.env_id.startswith(OGBENCH_NAMESPACE):
        return Protocol(OGBENCH_RULES, environment.env_id, None, (_OGBENCH_DIFFERENCE,))
    info = info.parts[0] if info.parts else info  # all of them are evaluated alike
    rules = {"minari": "minari", "offrl": "local"}.get(info.source, "own")
    differences = []
    if info.source == "minari" and info.id.startswith(_MINARI_NAMESPACE):
        rules, name = "minari-d4rl", info.id.removeprefix(_MINARI_NAMESPACE)
        differences = [difference for pattern, difference in _MINARI_DIFFERENCES if re.match(pattern, name)]
    if re.match(r"AdroitHand(Door|Hammer|Relocate)-v1", environment.env_id):  # whoever recorded the data
        differences.append("the distance between hand and object is paid for, in D4RL it costs as much")
    return Protocol(rules, environment.env_id, None, tuple(differences))


def with_contacts(environment: EnvironmentInfo, mujoco2_contacts: bool) -> dict[str, Any]:
    """Return the keyword arguments of an environment with the choice of contacts, which only D4RL's offer."""
    if mujoco2_contacts or not environment.env_id.startswith(D4RL_NAMESPACE):
        return dict(environment.kwargs)
    return {**environment.kwargs, MUJOCO2_CONTACTS: False}


def _differences_to_d4rl(name: str, mujoco2_contacts: bool) -> Iterator[str]:
    family = name.partition("-")[0]
    if not mujoco2_contacts and family not in _WITHOUT_CONTACTS:
        yield "contacts are those of the installed MuJoCo instead of MuJoCo 2"
    elif family == "door":
        yield "collisions of capsules with boxes are those of the installed MuJoCo: up to 0.1 after 50 steps"
    elif family == "antmaze":
        yield "contacts of a leg deep in a wall are those of the installed MuJoCo"
    elif family in ("hammer", "relocate"):
        yield "contacts follow MuJoCo 2 to 1e-5 after 50 steps"
    elif family == "kitchen":
        yield "contacts follow MuJoCo 2 to 1e-3 after 30 steps"
    if family == "antmaze" and not name.endswith("-v2"):
        yield "the goal is drawn once from a fixed seed, in D4RL from numpy's global generator"
    if name.startswith("maze2d-open"):
        yield "D4RL's reference returns of this maze fit no rule that was found: scores far above 100 are possible"
