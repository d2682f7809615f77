"""Episodes of OGBench's robot arm, by the scripted planners that the package `ogbench` ships.

They are recorded as OGBench's authors record their `play` data: the arm does one sub-task after another, each drawn at
random, and knows nothing of the tasks that policies are trained for later. An episode ends by the time limit only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_offrl.collect.catalog import ManipulationDataset
from lit_offrl.collect.episodes import Episode, episode_entropy, make_environment
from lit_offrl.system.global_state import as_a_guest

if TYPE_CHECKING:
    import gymnasium

_NOISE = {"noise": 0.1, "noise_smoothing": 0.5}  # of a `play` planner: fractions of the package's own scales
_CUBE = slice(14, 17)  # position of the first cube in qpos, in meters
_STATE = ("qpos", "qvel", "button_states")
"""Parts of the simulator's state, from which the package computes the rewards of a task."""


class ManipulationRecorder:
    """Records the episodes of a manipulation dataset, one at a time and in any order.

    Args:
        dataset: The dataset.
        seed: Seed of the whole dataset.
    """

    def __init__(self, dataset: ManipulationDataset, seed: int) -> None:
        self._dataset = dataset
        self._entropy = episode_entropy(dataset, seed)
        self._task = make_environment(dataset)  # for its rewards
        self._env = _collecting_environment(dataset)
        self._planners = _planners(dataset.name, self._env)

    def record(self, index: int) -> Episode:
        """Return episode number `index`, from 0; it does not depend on the episodes recorded before."""
        from ogbench.relabel_utils import relabel_dataset

        rng = np.random.default_rng([*self._entropy, index])
        while True:
            states, actions = self._play(rng)
            # The authors discard such episodes, because pictures would not show where the cube is.
            if self._dataset.name != "scene" or not cube_is_lost(states["qpos"][:, _CUBE]):
                break
        relabel_dataset(self._dataset.name, self._task, states)
        rewards = states.pop("rewards")[:-1]
        del states["masks"]
        never, ends = np.zeros((2, len(actions)), dtype=bool)
        ends[-1] = True
        return Episode(states, actions, rewards, terminations=never, truncations=ends, kind="play", fell=False)

    def close(self) -> None:
        """Free the simulators."""
        self._task.close()
        self._env.close()

    def _play(self, rng: np.random.Generator) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
        """Return the states of an episode, `[T + 1, ...]` by name, and its actions `[T, action_dim]`."""
        task: Any = self._env.unwrapped
        p_stack = rng.uniform(*self._dataset.p_stack)
        reset_seed, planner_seed = (int(seed) for seed in rng.integers(2**31, size=2))
        with as_a_guest(np.random.RandomState(planner_seed)):
            observation, info = self._env.reset(seed=reset_seed)
            states, actions = [(observation, info)], []
            planner = self._planners[info["privileged/target_task"]]
            planner.reset(observation, info)
            truncated = False
            while not truncated:
                action = np.clip(planner.select_action(observation, info), -1.0, 1.0).astype(np.float32)
                observation, _, _, truncated, info = self._env.step(action)
                states.append((observation, info))
                actions.append(action)
                if planner.done:
                    target_observation, target = task.set_new_target(p_stack=p_stack)
                    planner = self._planners[target["privileged/target_task"]]
                    planner.reset(target_observation, target)
        parts = {name: np.stack([state[name] for _, state in states]) for name in _STATE if name in info}
        return {"observation": np.stack([each for each, _ in states]), **parts}, np.stack(actions)


def cube_is_lost(positions: NDArray[np.float64]) -> bool:
    """Return whether the cube ever lay too far on the right, or too far on the left and not in the drawer.

    Args:
        positions: `[T + 1, 3]`.
    """
    y, z = positions[:, 1], positions[:, 2]
    in_drawer = (z >= 0.06) & (z <= 0.08)
    return bool(((y >= 0.29) | ((y <= -0.3) & ~in_drawer)).any())


def _collecting_environment(dataset: ManipulationDataset) -> gymnasium.Env[Any, Any]:
    import gymnasium
    import ogbench  # noqa: F401 (registers the environments)

    with as_a_guest(np.random.RandomState(0)):
        return gymnasium.make(
            f"{dataset.name}-v0",
            terminate_at_goal=False,
            mode="data_collection",
            max_episode_steps=dataset.episode_steps,
            disable_env_checker=True,
        )


def _planners(name: str, env: gymnasium.Env[Any, Any]) -> dict[str, Any]:
    """Return the package's planner of each kind of sub-task."""
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    return {
        "cube": CubePlanOracle(env=env, **_NOISE),
        "button": ButtonPlanOracle(env=env, **_NOISE, gripper_always_closed=name.startswith("puzzle")),
        "drawer": DrawerPlanOracle(env=env, **_NOISE),
        "window": WindowPlanOracle(env=env, **_NOISE),
    }
