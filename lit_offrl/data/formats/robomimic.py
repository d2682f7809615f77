"""robomimic's HDF5 files: a group `data/demo_<i>` per demonstration.

A demonstration of n steps holds `actions` `[n, action_dim]`, `rewards` `[n]`, `dones` `[n]`, `obs/<key>` `[n, ...]` and
`next_obs/<key>`. Observations are the vectors among the keys in alphabetical order, or the keys that the user names;
images are not read. A `done` step is terminal and ends the demonstration. robomimic marks the steps after a success as
`done`, too; an evaluation that ends at the success never gets there.

Layout: https://robomimic.github.io/docs/datasets/overview.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_offrl.data.columns import SUCCESS_AT_END, LogColumns
from lit_offrl.data.formats.arrays import (
    TableBuilder,
    episode_fields,
    flags,
    floats,
    natural_order,
    open_hdf5,
    read_columns,
    reading,
    stored_array,
)
from lit_offrl.data.formats.cache import Table
from lit_offrl.errors import UserError, did_you_mean


def is_robomimic(arrays: Mapping[str, Any]) -> bool:
    """Whether an HDF5 file has the group that robomimic keeps demonstrations in."""
    return "data" in arrays and not hasattr(arrays["data"], "dtype")


def read_robomimic(path: Path, columns: LogColumns) -> Table:
    """Read a file of demonstrations.

    Args:
        path: The file.
        columns: `observations` names keys below `obs`; `rewards` may be `success_at_end`.

    Raises:
        UserError: The file is broken, or has no such keys.
    """
    for name in (each.name for each in fields(columns) if each.name != "observations"):
        if getattr(columns, name) not in (None, SUCCESS_AT_END):
            raise UserError(f"data.columns.{name}: robomimic's files have one place for it; choose observations only")
    at_end = columns.rewards == SUCCESS_AT_END
    with reading(path), open_hdf5(path) as file:
        data = file["data"]
        names = natural_order([name for name in data if name.startswith("demo")])
        if not names:
            raise UserError("holds no demonstrations, i.e. no groups data/demo_<i>")
        vectors, others = _keys(data[names[0]])
        chosen = columns.observations
        keys = vectors if chosen is None else [chosen] if isinstance(chosen, str) else chosen
        for key in keys:
            if key not in vectors:
                raise UserError(
                    f"data.columns.observations: no vector '{key}'{did_you_mean(key, vectors)}; there are "
                    f"{', '.join(vectors)}"
                )
        table, after = TableBuilder(sum(len(stored_array(data[name], "actions")) for name in names)), 0
        for name in names:
            with reading(name):
                demo = _demonstration(data[name], keys, at_end)
                kept = _until_done(demo)
                after += len(demo["rewards"]) - kept
                table.append(episode_fields(read_columns({key: array[:kept] for key, array in demo.items()})))
        notes = [f"observations are {', '.join(keys)}"]
        if unread := [*others, *(key for key in vectors if key not in keys)]:
            notes.append(f"keys not read: {', '.join(unread)}")
        if after:
            notes.append(f"{after:,} steps after the first 'done' of their demonstration are left out")
        if "mask" in file:
            notes.append(f"all demonstrations are read, the choices of mask/ ({', '.join(file['mask'])}) are not used")
        return Table(table.finish(), None, tuple(notes))  # environments of one's own give vectors


def _keys(demo: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the observation keys that hold vectors, and the others."""
    if "obs" not in demo:
        raise UserError(
            "holds no observations (data/demo_<i>/obs): extract them with robomimic's dataset_states_to_obs.py"
        )
    obs = demo["obs"]
    vectors = [key for key in obs if getattr(obs[key], "ndim", 0) == 2]
    return vectors, [key for key in obs if key not in vectors]


def _demonstration(demo: Mapping[str, Any], keys: list[str], at_end: bool) -> dict[str, NDArray[Any]]:
    """Return the arrays of a demonstration under the names of flat files."""
    arrays: dict[str, NDArray[Any]] = {"actions": floats(demo, "actions")}
    n = len(arrays["actions"])
    last = np.arange(n) == n - 1
    for name, group in (("observations", "obs"), ("next_observations", "next_obs")):
        if group in demo:
            arrays[name] = np.concatenate([floats(demo[group], key) for key in keys], axis=1)
    if not at_end and "rewards" not in demo:
        raise UserError(
            f"the key 'rewards' is missing: --data.columns.rewards {SUCCESS_AT_END} pays 1 at the last step"
        )
    arrays["rewards"] = last.astype(np.float32) if at_end else floats(demo, "rewards")
    arrays["terminals"] = last if at_end or "dones" not in demo else flags(demo, "dones")
    return arrays


def _until_done(demo: Mapping[str, NDArray[Any]]) -> int:
    """Return the number of steps up to the first terminal one."""
    terminals = demo["terminals"]
    return int(np.argmax(terminals)) + 1 if terminals.any() else len(terminals)
