"""Reading and checking arrays, and the rules that turn them into transitions; all formats share these.

Error messages name the key; `reading` puts the file name in front.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_offrl.data.transitions import Transitions, first_row_not_finite
from lit_offrl.errors import UserError, one_line

if TYPE_CHECKING:
    import h5py

Fields = dict[str, NDArray[Any]]
"""Arrays under the names of `Transitions`' fields."""

TERMINALS = ("terminals", "terminations")
TIMEOUTS = ("timeouts", "truncations")
READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Exceptions of numpy, zipfile, h5py and pyarrow for broken files."""

_NUMBERS = "fiub"
_ROWS_AT_A_TIME = 65_536
# Largest difference between a stored successor and the next row's observation within an episode: far above rounding.
_SAME_STATE = 1e-4


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn exceptions while a file or a part of it is read into one line that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except MemoryError as error:
        raise UserError(f"{path} does not fit into the memory ({one_line(error)[:200]})") from error
    except READ_ERRORS as error:
        text = one_line(error)
        if isinstance(error, PermissionError) or "Permission denied" in text:
            raise UserError(f"{path} cannot be read: permission denied") from error
        if "unable to lock file" in text or "already open for write" in text:
            raise UserError(f"{path} is open for writing elsewhere: close it there, or train on a copy") from error
        raise UserError(f"{path} is broken or not of its format ({text[:200]})") from error


@contextmanager
def open_arrays(path: Path) -> Iterator[Mapping[str, Any]]:
    """Open an `.npz` or HDF5 file as a mapping that reads an array when it is accessed.

    Raises:
        UserError: The file is missing or broken.
    """
    if not path.is_file():
        raise UserError(f"data.dataset: no file {path}")
    with reading(path):
        if path.suffix == ".npz":
            with path.open("rb") as stream:
                if not zipfile.is_zipfile(stream):
                    raise UserError("is no .npz file, or a truncated one: write it with numpy.savez")
            with np.load(path, allow_pickle=False) as file:
                yield file
        else:
            with open_hdf5(path) as file:
                yield file


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file all of whose data lie in it: a dataset from elsewhere must not read other files of the reader.

    Raises:
        UserError: A link or a dataset refers to another file.
    """
    import h5py

    # A name ends a visit. At the low level a visit takes a third of the time of `visititems`.
    def is_link_out(name: bytes, link: Any) -> bytes | None:
        return name if link.type == h5py.h5l.TYPE_EXTERNAL else None

    def is_stored_elsewhere(name: bytes, item: Any) -> bytes | None:
        if item.type != h5py.h5o.TYPE_DATASET:
            return None
        stored = h5py.h5d.open(file.id, name).get_create_plist()
        elsewhere = stored.get_external_count() or stored.get_layout() == h5py.h5d.VIRTUAL
        return name if elsewhere else None

    with h5py.File(path, "r") as file:
        if link := file.id.links.visit(is_link_out, info=True):
            raise UserError(f"'{link.decode()}' is a link to another file: copy the data into this one")
        if name := h5py.h5o.visit(file.id, is_stored_elsewhere, info=True):
            raise UserError(f"'{name.decode()}' is stored in another file: copy the data into this one")
        yield file


def natural_order(names: list[str]) -> list[str]:
    """Sort so that `episode_2` comes before `episode_10`."""

    def parts(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

    return sorted(names, key=parts)


# ------------------------------------------------------------------------------------------------------ one array


def floats(arrays: Mapping[str, Any], name: str) -> NDArray[np.float32]:
    """Read an array of finite numbers as float32. HDF5 converts while it reads, without a second copy.

    Raises:
        UserError: The array is missing, cannot be read, or holds other values.
    """
    stored = stored_array(arrays, name)
    try:
        with np.errstate(over="ignore"):  # values beyond float32 become infinite, which is checked below
            if isinstance(stored, np.ndarray):
                table = stored.astype(np.float32, copy=False)
            else:
                table = np.empty(stored.shape, np.float32)
                if table.size:
                    stored.read_direct(table)
    except READ_ERRORS as error:
        raise UserError(f"'{name}' cannot be read ({one_line(error)[:200]})") from error
    row = first_row_not_finite(table)
    if row is not None:
        raise UserError(f"'{name}' holds NaN or infinity, first in row {row}: repair or drop that episode")
    return table


def flags(arrays: Mapping[str, Any], name: str) -> NDArray[np.bool_]:
    """Read an array of flags of any stored type, bool `[n]`.

    Raises:
        UserError: The array is missing, cannot be read, or holds values other than 0 and 1.
    """
    stored = stored_array(arrays, name)
    try:
        values = _vector(stored[()])
    except READ_ERRORS as error:
        raise UserError(f"'{name}' cannot be read ({one_line(error)[:200]})") from error
    flagged: NDArray[np.bool_] = values.astype(bool)
    if not np.array_equal(flagged, values):
        raise UserError(f"'{name}' holds values other than 0 and 1")
    return flagged


def stored_array(arrays: Mapping[str, Any], name: str) -> Any:
    """Return an array of numbers as it is stored: a numpy array, or an HDF5 dataset that is not read yet.

    Raises:
        UserError: The array is missing, cannot be read, or holds no numbers.
    """
    try:
        stored = arrays[name]
    except KeyError:
        raise UserError(f"the key '{name}' is missing") from None
    except READ_ERRORS as error:
        raise UserError(f"'{name}' cannot be read ({one_line(error)[:200]})") from error
    if not hasattr(stored, "dtype"):
        raise UserError(f"'{name}' is a group, not an array")
    if stored.dtype.kind not in _NUMBERS:
        raise UserError(f"'{name}' holds {stored.dtype} values; numbers are needed")
    return stored


def _vector(array: NDArray[Any]) -> NDArray[Any]:
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


# -------------------------------------------------------------------------------------------- arrays of one source


@dataclass
class Columns:
    """Arrays of consecutive transitions with matching shapes.

    Attributes:
        observations: float32 `[n, observation_dim]`.
        actions: float32 `[n, action_dim]`.
        rewards: float32 `[n]`.
        terminals: bool `[n]`; None where the file has none.
        timeouts: bool `[n]`; None where the file has none.
        next_observations: float32 `[n, observation_dim]`; None where the file has none.
        ends: bool `[n]`, see `Transitions`; None where the file has none.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    terminals: NDArray[np.bool_] | None
    timeouts: NDArray[np.bool_] | None
    next_observations: NDArray[np.float32] | None
    ends: NDArray[np.bool_] | None = None


def read_columns(
    arrays: Mapping[str, Any], observations: NDArray[np.float32] | None = None, episode: bool = False
) -> Columns:
    """Read the arrays of a file or episode.

    Args:
        arrays: `observations`, `actions`, `rewards`, and optionally `terminals` (or `terminations`), `timeouts` (or
            `truncations`), `next_observations` and with these `ends`.
        observations: Replaces the array `observations`, e.g. vectors made of dictionary observations.
        episode: The arrays are one episode, which may have one observation more than rewards.

    Raises:
        UserError: A key is missing, shapes disagree, or values are wrong.
    """
    rewards = _vector(floats(arrays, "rewards"))
    if rewards.ndim != 1:
        raise UserError(f"'rewards' has shape {rewards.shape}; (n,) is needed")
    n = len(rewards)
    successors = floats(arrays, "next_observations") if "next_observations" in arrays else None
    if observations is None:
        observations = floats(arrays, "observations")
    if episode and successors is None and observations.ndim == 2 and len(observations) == n + 1:
        observations, successors = observations[:-1], observations[1:]
    columns = Columns(
        observations,
        floats(arrays, "actions"),
        rewards,
        _flags_under(arrays, TERMINALS),
        _flags_under(arrays, TIMEOUTS),
        successors,
        flags(arrays, "ends") if "ends" in arrays and successors is not None else None,
    )
    width = observations.shape[1] if observations.ndim == 2 else "observation_dim"
    needed: dict[str, tuple[int | str, ...]] = {
        "observations": (n, width),
        "actions": (n, "action_dim"),
        "next_observations": (n, width),
        "terminals": (n,),
        "timeouts": (n,),
        "ends": (n,),
    }
    more = " (or one observation more)" if episode else ""
    for name, shape in needed.items():
        array = getattr(columns, name)
        if array is not None and not _fits(array.shape, shape):
            form = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
            raise UserError(f"'{name}' has shape {array.shape}; {form} is needed beside {n} rewards{more}")
    return columns


def _fits(shape: tuple[int, ...], needed: tuple[int | str, ...]) -> bool:
    """Return whether a shape has the needed sizes; a name stands for any size."""
    sizes = zip(shape, needed, strict=False)
    return len(shape) == len(needed) and all(size == want or isinstance(want, str) for size, want in sizes)


def _flags_under(arrays: Mapping[str, Any], names: tuple[str, ...]) -> NDArray[np.bool_] | None:
    return next((flags(arrays, name) for name in names if name in arrays), None)


# ------------------------------------------------------------------------------------------- rules of transitions


def flat_fields(columns: Columns) -> Fields:
    """Make transitions of flat arrays, one episode after another; `lit_offrl.data.formats.files` states the rules.

    Raises:
        UserError: No array says where episodes end.
    """
    if columns.terminals is None and columns.timeouts is None:
        raise UserError(
            f"holds neither '{TERMINALS[0]}' nor '{TIMEOUTS[0]}' (or {TERMINALS[1]}, {TIMEOUTS[1]}), each one flag per "
            "transition; at least one is needed to know where episodes end"
        )
    n = len(columns.rewards)
    terminals = np.zeros(n, bool) if columns.terminals is None else columns.terminals
    cuts = np.zeros(n, bool) if columns.timeouts is None else columns.timeouts.copy()
    if columns.next_observations is not None:
        cuts[:-1] |= rows_where(_differ, columns.next_observations[:-1], columns.observations[1:])
        cuts[-1:] = True
        ends = {} if columns.ends is None else {"ends": columns.ends | cuts}
        return {
            "observations": columns.observations,
            "actions": columns.actions,
            "rewards": columns.rewards,
            "next_observations": columns.next_observations,
            "terminals": terminals,
            "timeouts": cuts & ~terminals,
            **ends,
        }
    cuts[-1:] = True
    unknown = cuts & ~terminals  # the successor is not in the file
    rows = np.flatnonzero(~unknown)
    following = np.where(terminals[rows], rows, rows + 1)
    return fields_of_rows(columns, terminals, rows, following, timeouts=~terminals[rows] & unknown[following])


def episode_fields(columns: Columns) -> Fields:
    """Make transitions of one episode: its last step ends it, by a timeout unless it is terminal."""
    n = len(columns.rewards)
    terminals = np.zeros(n, bool) if columns.terminals is None else columns.terminals
    return flat_fields(replace(columns, terminals=terminals))


def fields_of_rows(
    columns: Columns,
    terminals: NDArray[np.bool_],
    rows: NDArray[np.int64],
    following: NDArray[np.int64],
    timeouts: NDArray[np.bool_],
) -> Fields:
    """Return the transitions of some rows, with the observations of the rows `following` as successors."""
    return {
        "observations": columns.observations[rows],
        "actions": columns.actions[rows],
        "rewards": columns.rewards[rows],
        "next_observations": columns.observations[following],
        "terminals": terminals[rows],
        "timeouts": timeouts,
    }


def rows_where(
    condition: Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.bool_]],
    first: NDArray[np.float32],
    second: NDArray[np.float32],
) -> NDArray[np.bool_]:
    """Compare two tables row by row, in pieces, because the difference of whole tables would double the memory."""
    pieces = range(0, len(first), _ROWS_AT_A_TIME)
    compared = [condition(first[i : i + _ROWS_AT_A_TIME], second[i : i + _ROWS_AT_A_TIME]) for i in pieces]
    return np.concatenate(compared) if compared else np.zeros(0, bool)


def _differ(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.bool_]:
    different: NDArray[np.bool_] = (np.abs(first - second) > _SAME_STATE).any(axis=1)
    return different


# ------------------------------------------------------------------------------------------ one episode per piece


class TableBuilder:
    """A table that is filled episode by episode, without a second copy.

    Args:
        capacity: Largest number of transitions.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._table: Fields = {}
        self._rows = 0

    def append(self, fields: Fields) -> None:
        """Add the transitions of an episode.

        Raises:
            UserError: The width of an array differs from the episodes before.
        """
        end = self._rows + len(fields["rewards"])
        for name, array in fields.items():
            if name not in self._table:
                self._table[name] = np.empty((self._capacity, *array.shape[1:]), array.dtype)
            table = self._table[name]
            if table.shape[1:] != array.shape[1:]:
                raise UserError(f"'{name}' has shape {array.shape}; the episodes before have width {table.shape[1]}")
            table[self._rows : end] = array
        self._rows = end

    def finish(self) -> Transitions:
        """Return the table.

        Raises:
            UserError: No transition was added.
        """
        if not self._rows:
            raise UserError("the dataset has no transitions")
        return Transitions(**{name: table[: self._rows] for name, table in self._table.items()})
