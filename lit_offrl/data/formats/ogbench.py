"""OGBench's files: one `.npz` of whole episodes, to which the package `ogbench` adds the rewards of one task.

The last row of an episode is a state without a successor, so no transition begins there. The package computes `rewards`
and `masks` of each row from the simulator's state in that row. A mask is 0 where the task is solved, also in the middle
of an episode, because the data were recorded without the task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_offrl.data.formats.arrays import flags, open_arrays, reading
from lit_offrl.data.sources.ogbench import INSTALL
from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import UserError, one_line
from lit_offrl.system.files import no_files_left
from lit_offrl.system.global_state import as_a_guest

if TYPE_CHECKING:
    import gymnasium


def read_ogbench(path: Path, environment: str) -> Transitions:
    """Read the transitions of a file with the rewards of a task, both made by the package's own functions.

    Args:
        path: The `.npz` file in OGBench's format.
        environment: Name of a single-task environment of the package, e.g. `cube-single-singletask-task2-v0`.

    Raises:
        UserError: The package is missing, or the file is missing, broken or of another environment.
    """
    env = build_task(environment)
    with open_arrays(path) as arrays:
        _check_ends(flags(arrays, "terminals"))
    from ogbench.relabel_utils import relabel_dataset
    from ogbench.utils import load_dataset

    with contextlib.closing(env), reading(path), as_a_guest(np.random.RandomState(0)):
        try:
            dataset = load_dataset(str(path), add_info=True)
        except IndexError as error:
            raise UserError(f"its arrays differ in length ({one_line(error)})") from error
        _check_widths(dataset, env)
        relabel_dataset(environment, env, dataset)  # it resets the environment, which sets the task
        return ogbench_transitions(dataset)


def ogbench_transitions(dataset: Mapping[str, NDArray[Any]]) -> Transitions:
    """Return the transitions of a dataset that the package has loaded for a single task.

    Args:
        dataset: `observations`, `actions`, `terminals`, `rewards`, `masks`, and `next_observations` (regular) or
            `valids` (compact), as `ogbench.make_env_and_datasets` returns them.
    """
    rows: Any = slice(None)
    if "valids" in dataset:  # a compact table: the next row is the successor, where the row is a start at all
        rows = np.flatnonzero(dataset["valids"])
        successors = dataset["observations"][rows + 1]
    else:
        successors = dataset["next_observations"]
    solved, ends = dataset["masks"][rows] == 0, dataset["terminals"][rows] == 1
    return Transitions(
        observations=dataset["observations"][rows],
        actions=dataset["actions"][rows],
        rewards=dataset["rewards"][rows],
        next_observations=successors,
        terminals=solved,
        timeouts=ends & ~solved,
        ends=ends,
    )


def _check_ends(ends: NDArray[np.bool_]) -> None:
    """Check that the rows of a file are whole episodes, which the package takes for granted."""
    if not len(ends) or not ends[-1]:
        raise UserError("the last row is not marked in 'terminals': the file is cut off, or not one of OGBench's")
    if ends.all():
        raise UserError("every row is marked in 'terminals': there are no transitions")


def _check_widths(dataset: Mapping[str, NDArray[Any]], env: gymnasium.Env[Any, Any]) -> None:
    """Check that a dataset is of the environment that computes its rewards."""
    task: Any = env.unwrapped
    observation_space: Any = env.observation_space
    action_space: Any = env.action_space
    widths = {"observations": observation_space.shape[0], "actions": action_space.shape[0]}
    widths["qpos"] = (task.model if hasattr(task, "model") else task._model).nq
    if hasattr(task, "_num_buttons"):
        widths["button_states"] = task._num_buttons
    for name, width in widths.items():
        if name not in dataset:
            raise UserError(f"the key '{name}' is missing, without which there are no rewards")
        if dataset[name].shape[1:] != (width,):
            raise UserError(
                f"'{name}' has shape {dataset[name].shape}; a width of {width} is needed for {task.spec.id}"
            )


# ------------------------------------------------------------------------------------------------- the environment


def build_task(environment: str, **options: Any) -> gymnasium.Env[Any, Any]:
    """Build a single-task environment by the package's own function, without its warnings.

    Args:
        environment: Its name in the package, e.g. `cube-single-singletask-task2-v0`.
        **options: Of the environment, e.g. `max_episode_steps` or `render_mode`.

    Raises:
        UserError: The package is missing.
    """
    try:
        import ogbench
    except ModuleNotFoundError as error:
        raise UserError(f"OGBench's datasets and environments need its package: {INSTALL}") from error
    # The package takes the name of a dataset, of which it drops the type.
    dataset = environment.replace("-singletask", "-play-singletask")
    with as_a_guest(np.random.RandomState(0)), no_files_left():  # mazes leave a file of their model
        env: gymnasium.Env[Any, Any] = ogbench.make_env_and_datasets(
            dataset, env_only=True, **{"disable_env_checker": True, **options}
        )
    return env
