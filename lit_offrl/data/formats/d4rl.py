"""Original D4RL files: the transitions of D4RL's `qlearning_dataset`, or all transitions with their true ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_offrl.data.formats.arrays import (
    Columns,
    Fields,
    fields_of_rows,
    flat_fields,
    open_arrays,
    read_columns,
    rows_where,
)
from lit_offrl.data.formats.cache import Table
from lit_offrl.data.transitions import Transitions

# Meters: a step in D4RL's mazes changes the position, where an observation begins, by less than half of this.
_LARGEST_MOVE = 1.0


def read_d4rl(path: Path, time_limit: int, compat: bool, is_maze: bool) -> Table:
    """Read an original D4RL file.

    Args:
        path: The file.
        time_limit: Steps of an episode, for files without `timeouts`.
        compat: Keep what D4RL's `qlearning_dataset` keeps, see `compat_fields`; else the true ends of episodes, see
            `true_fields`.
        is_maze: Observations begin with a position.

    Raises:
        UserError: The file is broken.
    """
    with open_arrays(path) as arrays:
        columns = read_columns(arrays)
    fields = compat_fields(columns, time_limit) if compat else true_fields(columns, time_limit, is_maze)
    return Table(Transitions(**fields))


def compat_fields(columns: Columns, time_limit: int) -> Fields:
    """Return the transitions and successors of D4RL's `qlearning_dataset`.

    The next row is the successor, also of a terminal step. The last step of an episode that ran into the time limit is
    dropped, even if it is terminal, and so is the last row of the file. The step before a dropped step ends its episode
    (`timeouts`), which `qlearning_dataset` does not mark.

    Args:
        columns: The arrays of the file.
        time_limit: Limit of an episode, for files without `timeouts`.
    """
    n = len(columns.rewards)
    terminals = np.zeros(n, bool) if columns.terminals is None else columns.terminals
    timeouts = columns.timeouts
    if timeouts is None:
        # D4RL's step counter is 1, not 0, after a terminal step.
        timeouts = steps_at_limit(terminals, time_limit, first_after_terminal=1)
    kept = ~timeouts
    kept[-1:] = False
    rows = np.flatnonzero(kept)
    return fields_of_rows(columns, terminals, rows, rows + 1, timeouts=~kept[rows + 1] & ~terminals[rows])


def true_fields(columns: Columns, time_limit: int, is_maze: bool) -> Fields:
    """Return all transitions with the true ends of episodes, by the rules of flat files.

    Args:
        columns: The arrays of the file.
        time_limit: Limit of an episode, for files without `timeouts`.
        is_maze: Observations begin with a position; an episode ends where it jumps, even if nothing is marked there.
    """
    terminals = np.zeros(len(columns.rewards), bool) if columns.terminals is None else columns.terminals
    timeouts = columns.timeouts
    if timeouts is None:
        timeouts = steps_at_limit(terminals, time_limit, first_after_terminal=0)
    if is_maze and columns.next_observations is None:
        timeouts = timeouts.copy()
        timeouts[:-1] |= rows_where(_moved_far, columns.observations[:-1], columns.observations[1:])
    return flat_fields(replace(columns, terminals=terminals, timeouts=timeouts))


def _moved_far(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.bool_]:
    far: NDArray[np.bool_] = np.linalg.norm(second[:, :2] - first[:, :2], axis=1) > _LARGEST_MOVE
    return far


def steps_at_limit(terminals: NDArray[np.bool_], limit: int, first_after_terminal: int) -> NDArray[np.bool_]:
    """Return a mask of the last steps before the time limit, `[n]`, for files that mark terminal steps only.

    Args:
        terminals: bool `[n]`.
        limit: Steps of an episode.
        first_after_terminal: Number of the first step after a terminal step; it is 0 after a time limit.
    """
    at_limit = np.zeros(len(terminals), bool)
    origin = 0  # the row that is, or would be, step 0 of the episode
    for end in [*np.flatnonzero(terminals).tolist(), len(terminals) - 1]:
        at_limit[origin + limit - 1 : end + 1 : limit] = True
        origin = end + 1 if at_limit[end] else end + 1 - first_after_terminal
    return at_limit
