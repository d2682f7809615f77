"""Transitions as a file that any tool can read: what `data convert` writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np

from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import UserError, one_line


def write_transitions(transitions: Transitions, path: Path) -> None:
    """Write flat arrays under the names of `Transitions`' fields: a file that `load` reads back unchanged.

    Args:
        transitions: What to write.
        path: `.npz` (uncompressed) or `.hdf5` (gzip, the layout of D4RL's files); must not exist.

    Raises:
        UserError: The suffix is another, the file exists, or it cannot be written; nothing is left behind then.
    """
    writers: dict[str, Callable[[Transitions, Path], None]] = {".npz": _write_npz, ".hdf5": _write_hdf5}
    if path.suffix not in writers:
        raise UserError(f"{path}: cannot write '{path.suffix}' files; name a file that ends in {' or '.join(writers)}")
    if path.exists():
        raise UserError(f"{path} exists: remove it or choose another name")
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        writers[path.suffix](transitions, unfinished)
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({one_line(error)[:200]})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _write_npz(transitions: Transitions, path: Path) -> None:
    with path.open("wb") as file:  # given a name, numpy would append its suffix to it
        np.savez(file, **{field.name: getattr(transitions, field.name) for field in fields(transitions)})


def _write_hdf5(transitions: Transitions, path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for field in fields(transitions):
            file.create_dataset(field.name, data=getattr(transitions, field.name), compression="gzip", shuffle=True)
