"""Logs of one table, CSV or Parquet: a row is a step, a column is a number of it.

Columns are found by their names, unless `LogColumns` names others:

- `observation...` or `obs...`, `action...` or `act...`, and optionally `next_observation...` or `next_obs...`: the
  numbers of a vector, in the order of the file. In Parquet a column may hold whole vectors (lists of one length).
- `reward`; `terminal` (the step led to a terminal state) and `timeout` (the episode was cut after the step), optional.
- `episode`: a number or name that changes where an episode ends. Without it the flags say where episodes end.
- `step`, or a time: steps of an episode must be in order.

The last row of an episode ends it, by a timeout unless it is terminal. Then the rules of flat arrays hold, see
`lit_offrl.data.formats.files`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_offrl.data.columns import SUCCESS_AT_END, LogColumns
from lit_offrl.data.formats.arrays import Fields, flat_fields, read_columns, reading
from lit_offrl.data.formats.cache import Table
from lit_offrl.data.transitions import Transitions, first_row_not_finite
from lit_offrl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pyarrow

_VECTORS = {  # a letter after the beginning makes another word: obs_speed, obs0 and obs.speed count, obstacle does not
    "next_observations": re.compile(r"next[_. ]?(observations?|obs)(?![a-z])", re.IGNORECASE),
    "observations": re.compile(r"(observations?|obs)(?![a-z])", re.IGNORECASE),
    "actions": re.compile(r"(actions?|act)(?![a-z])", re.IGNORECASE),
}
_NUMBERS = {  # usual names, the first that is there counts; those with a dot are LeRobot's
    "rewards": ("reward", "rewards", "next.reward"),
    "terminals": ("terminal", "terminals", "terminated", "termination", "terminations", "next.done"),
    "timeouts": ("timeout", "timeouts", "truncated", "truncation", "truncations"),
    "episode": ("episode", "episode_id", "episode_index", "trajectory", "trajectory_id"),
    "step": ("step", "timestep", "step_index", "frame_index", "timestamp", "time", "t"),
}
_UNEVEN = 1.5  # a step that takes this many times the usual one is told: rows may be missing there


@dataclass(frozen=True)
class Log:
    """A table as it is stored.

    Attributes:
        table: The columns.
        is_text: Rows are lines of a text file, below a line of names.
        files: First row and name of each file, where there are several.
    """

    table: pyarrow.Table
    is_text: bool
    files: tuple[tuple[int, str], ...] = ()

    def place(self, row: int) -> str:
        """Return what a user calls a row."""
        first, file = next((each for each in reversed(self.files) if each[0] <= row), (0, ""))
        place = f"line {row - first + 2}" if self.is_text else f"row {row - first}"
        return f"{place} of {file}" if file else place


def read_table(path: Path, columns: LogColumns) -> Table:
    """Read a CSV or Parquet file.

    Raises:
        UserError: The file is broken, a column is missing or holds wrong values; the message names the row.
    """
    with reading(path):
        return log_transitions(open_table(path), columns)


def read_tables(paths: Sequence[Path], columns: LogColumns) -> Table:
    """Read several files as one table; an episode ends where its file ends.

    Raises:
        UserError: See `read_table`; or the files have other columns than the first.
    """
    import pyarrow

    tables: list[pyarrow.Table] = []
    files: list[tuple[int, str]] = []
    for index, path in enumerate(paths):
        with reading(path):
            table = open_table(path).table
            if tables and table.column_names != tables[0].column_names[:-1]:
                raise UserError(f"has other columns than {paths[0].name}: {', '.join(table.column_names)}")
            files.append((sum(each.num_rows for each in tables), path.name))
            number = pyarrow.array(np.full(table.num_rows, index))
            tables.append(table.append_column(_FILE, number))
    with reading(paths[0].parent):
        # Widened, because a column of whole numbers may have fractions in the next file.
        whole = pyarrow.concat_tables(tables, promote_options="permissive")
        return log_transitions(Log(whole, is_text=paths[0].suffix == ".csv", files=tuple(files)), columns)


_FILE = "number of the file"  # column that `read_tables` adds


def open_table(path: Path) -> Log:
    """Read all columns of a file."""
    from pyarrow import csv, parquet

    if path.suffix == ".parquet":
        with parquet.ParquetFile(path) as file:
            return Log(file.read(), is_text=False)
    # With several threads an error would not name the line.
    table = csv.read_csv(path, read_options=csv.ReadOptions(use_threads=False))
    if table.num_columns == 1 and re.search(r"[;\t]", table.column_names[0]):
        raise UserError("has a single column: separate columns by commas, and write decimals with a point")
    return Log(table, is_text=True)


def log_transitions(log: Log, columns: LogColumns, not_told: Iterable[str] = ()) -> Table:
    """Make transitions of a log.

    Args:
        log: The table.
        columns: Which columns hold what.
        not_told: Columns that are no news if they are not used.

    Raises:
        UserError: A column is missing or holds wrong values, or rows are not in order.
    """
    names = log.table.column_names
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two columns are named '{twice}'")
    if not log.table.num_rows:
        raise UserError("the dataset has no transitions")
    roles = _find_columns(log, columns)
    arrays: Fields = {name: _vectors(log, roles[name]) for name in _VECTORS if name in roles}
    arrays |= {name: _flags(log, *roles[name]) for name in ("terminals", "timeouts") if name in roles}
    _mark_ends(log, roles, arrays)
    notes = list(_gaps(log, roles, arrays))
    if columns.rewards == SUCCESS_AT_END:
        ends = arrays["timeouts"] | arrays["terminals"]
        arrays |= {"rewards": ends.astype(np.float32), "terminals": ends, "timeouts": np.zeros_like(ends)}
    else:
        arrays["rewards"] = _vectors(log, roles["rewards"])
    transitions = Transitions(**flat_fields(read_columns(arrays)))
    used = {name for group in roles.values() for name in group}
    unused = [name for name in names if name not in (*used, *not_told, _FILE)]
    told = [f"{role} are {', '.join(roles[role])}" for role in ("observations", "actions")]
    told += [f"columns not used: {', '.join(unused)}"] if unused else []
    if lost := log.table.num_rows - len(transitions):
        told.append(f"{lost:,} rows are left out: the last row of an episode that was cut has no successor")
    return Table(transitions, None, (*told, *notes))


# ------------------------------------------------------------------------------------------------- names of columns


def _find_columns(log: Log, columns: LogColumns) -> dict[str, list[str]]:
    """Return the columns of each role; roles without a column are missing.

    Raises:
        UserError: A named column is missing, or one that is needed is not found.
    """
    names = [name for name in log.table.column_names if name != _FILE]
    pays_at_end = columns.rewards == SUCCESS_AT_END
    roles: dict[str, list[str]] = {}
    for role, named in vars(columns).items():
        if named is not None and not (role == "rewards" and pays_at_end):
            wanted = [named] if isinstance(named, str) else map(str, named)
            roles[role] = [name for each in wanted for name in _named(each, names, role)]
    free = [name for name in names if not any(name in group for group in roles.values())]
    for role, found in _usual_columns(log, free).items():
        # Usual successors would not be those of chosen observations.
        is_of_others = role == "next_observations" and columns.observations is not None
        if not is_of_others and not (role == "rewards" and pays_at_end):
            roles.setdefault(role, found)
    if log.files:
        roles.setdefault("episode", [_FILE])
    there = f"the columns are {', '.join(names)}"
    for role, start in (("observations", "obs"), ("actions", "act")):
        if not roles.get(role):
            raise UserError(f"no column begins with '{start}': name some, --data.columns.{role} '[a, b]'; {there}")
    if "rewards" not in roles and not pays_at_end:
        raise UserError(
            "no column is named 'reward': name one with --data.columns.rewards; for demonstrations that all succeed "
            f"give --data.columns.rewards {SUCCESS_AT_END}, 1 at the last step of each; {there}"
        )
    if not roles.keys() & {"episode", "terminals", "timeouts"}:
        raise UserError(
            f"no column says where episodes end: name one with --data.columns.episode (or terminals, timeouts); {there}"
        )
    return roles


def _usual_columns(log: Log, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns with usual names."""
    found: dict[str, list[str]] = {}
    for name in names:
        role = next((role for role, pattern in _VECTORS.items() if pattern.match(name)), None)
        if role is not None:
            found.setdefault(role, []).append(name)
    for role, usual in _NUMBERS.items():
        known = [name for each in usual for name in names if name.lower() == each]
        if role == "step":
            known = [name for name in known if _order(log, name) is not None]  # a time may be in words
        if known:
            found[role] = known[:1]
    return found


def _named(wanted: str, names: Sequence[str], role: str) -> list[str]:
    found = [wanted] if wanted in names else [name for name in names if "*" in wanted and fnmatchcase(name, wanted)]
    if not found:
        there = f"the columns are {', '.join(names)}"
        raise UserError(f"data.columns.{role}: no column '{wanted}'{did_you_mean(wanted, names)}; {there}")
    return found


# ----------------------------------------------------------------------------------------------------- one column


def _vectors(log: Log, names: Sequence[str]) -> NDArray[np.float32]:
    """Return columns side by side, float32 `[n, width]`."""
    return np.concatenate([_numbers(log, name) for name in names], axis=1)


def _numbers(log: Log, name: str) -> NDArray[np.float32]:
    """Return a column of numbers, or of lists of one length, as float32 `[n, width]`.

    Raises:
        UserError: A value is missing, no number, not finite, or a list has another length.
    """
    from pyarrow import types

    column = _complete(log, name)
    if types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        import pyarrow.compute as pc

        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        if (other := lengths != lengths[0]).any():
            row = int(np.argmax(other))
            raise UserError(
                f"'{name}' holds lists of {lengths[0]} numbers and, in {log.place(row)}, of {lengths[row]}: vectors of "
                "one width are needed"
            )
        inner, width = pc.list_flatten(column), int(lengths[0])
    else:
        inner, width = column, 1
    is_number = types.is_integer(inner.type) or types.is_floating(inner.type) or types.is_boolean(inner.type)
    if not is_number:
        raise UserError(f"'{name}' holds {_first_word(log, inner)}: numbers are needed")
    if inner.null_count:
        row = inner.is_null().to_numpy(zero_copy_only=False).argmax() // width
        raise UserError(f"'{name}' has an empty place in {log.place(int(row))}: repair or drop that episode")
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, which is checked
        numbers: NDArray[np.float32] = inner.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width)
    if (bad := first_row_not_finite(numbers)) is not None:
        raise UserError(f"'{name}' holds NaN or infinity, first in {log.place(bad)}: repair or drop that episode")
    return numbers


def _complete(log: Log, name: str) -> Any:
    """Return a column as one array.

    Raises:
        UserError: A cell is empty.
    """
    column = log.table.column(name).combine_chunks()
    if column.null_count == len(column):
        raise UserError(f"'{name}' has no values")
    if column.null_count:
        row = int(column.is_null().to_numpy(zero_copy_only=False).argmax())
        raise UserError(f"'{name}' is empty or NaN, first in {log.place(row)}: repair or drop that episode")
    return column


def _first_word(log: Log, column: Any) -> str:
    """Return the first value of a column of text that is no number, and its row; else the type."""
    if str(column.type) not in ("string", "large_string"):
        return f"{column.type} values"
    others = ((row, word) for row, word in enumerate(column.to_pylist()) if not _is_number(word))
    row, word = next(others, (0, column[0]))
    return f"'{str(word)[:40]}' as text in {log.place(row)}"


def _is_number(word: str | None) -> bool:
    try:
        float(word or "none")
    except ValueError:
        return False
    return True


def _flags(log: Log, name: str) -> NDArray[np.bool_]:
    values = _numbers(log, name)
    if values.shape[1] != 1 or not np.isin(values, (0, 1)).all():
        raise UserError(f"'{name}' holds values other than 0 and 1")
    return values[:, 0].astype(bool)


def _order(log: Log, name: str) -> NDArray[Any] | None:
    """Return a column of numbers or times as numbers; None if it holds others."""
    from pyarrow import types

    column = log.table.column(name)
    if types.is_timestamp(column.type) or types.is_unsigned_integer(column.type):
        column = column.cast("int64")  # differences may be negative
    if column.null_count or not (types.is_integer(column.type) or types.is_floating(column.type)):
        return None
    return column.to_numpy()  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------- ends of episodes


def _mark_ends(log: Log, roles: Mapping[str, list[str]], arrays: Fields) -> None:
    """Complete the flags `terminals` and `timeouts` by the ends of named episodes, and check the order of rows.

    Raises:
        UserError: An episode begins anew after another, or its steps are not in order.
    """
    n = log.table.num_rows
    terminals = arrays.setdefault("terminals", np.zeros(n, bool))
    timeouts = arrays.setdefault("timeouts", np.zeros(n, bool))
    if "episode" in roles:
        ids = _complete(log, roles["episode"][0]).dictionary_encode()
        numbers = ids.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        if log.files:  # each may count its episodes from 0
            numbers += len(ids.dictionary) * log.table.column(_FILE).to_numpy()
        begins = np.append(True, numbers[1:] != numbers[:-1])
        starts = np.flatnonzero(begins)
        _, first = np.unique(numbers[starts], return_index=True)
        if len(first) < len(starts):
            row = int(np.delete(starts, first)[0])
            raise UserError(
                f"episode {ids[row]} stands in two places, again from {log.place(row)} on: "
                f"sort the rows by '{roles['episode'][0]}', or give each episode a name of its own"
            )
        timeouts |= np.append(begins[1:], True) & ~terminals
    if "step" in roles:
        steps = _steps(log, roles["step"][0])
        back = np.append(False, steps[1:] <= steps[:-1]) & ~np.append(True, (terminals | timeouts)[:-1])
        if back.any():
            row = int(np.argmax(back))
            raise UserError(
                f"'{roles['step'][0]}' goes from {steps[row - 1]} to {steps[row]} in {log.place(row)}, within an "
                "episode: sort the rows, or name the column of the episode with --data.columns.episode"
            )


def _steps(log: Log, name: str) -> NDArray[Any]:
    steps = _order(log, name)
    if steps is None:
        kind = log.table.column(name).type
        raise UserError(
            f"data.columns.step: '{name}' has empty places, or its {kind} values are neither numbers nor times"
        )
    return steps


def _gaps(log: Log, roles: Mapping[str, list[str]], arrays: Fields) -> Iterator[str]:
    """Yield a line if steps are missing within episodes, so that a row is not the successor of the row before."""
    if "step" not in roles or "next_observations" in roles:
        return
    steps = _steps(log, roles["step"][0])
    rows = np.flatnonzero(~(arrays["terminals"] | arrays["timeouts"])[:-1]) + 1  # those that follow another
    taken = steps[rows] - steps[rows - 1]
    if len(taken) and (gaps := taken > _UNEVEN * np.median(taken)).any():
        yield (
            f"'{roles['step'][0]}' grows by more than its usual {np.median(taken):g} before {int(gaps.sum()):,} rows "
            f"(first: {log.place(int(rows[np.argmax(gaps)]))}): steps seem to be missing there"
        )
