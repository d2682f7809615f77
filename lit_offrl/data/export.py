"""Write transitions into a file that any tool can read (`data convert`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import UserError, one_line
from lit_offrl.system.files import write_atomically


def write_transitions(transitions: Transitions, path: Path) -> None:
    """Write the fields of `Transitions` as flat arrays; `sources.load` reads the file back unchanged.

    Args:
        transitions: The table.
        path: `.npz` (uncompressed) or `.hdf5` (gzip, the layout of D4RL's files); must not exist.

    Raises:
        UserError: The suffix is unknown, the file exists, or it cannot be written; no partial file remains.
    """
    writers: dict[str, Callable[[Transitions, Path], None]] = {".npz": _write_npz, ".hdf5": _write_hdf5}
    if path.suffix not in writers:
        raise UserError(f"{path}: cannot write '{path.suffix}' files; name a file that ends in {' or '.join(writers)}")
    if path.exists():
        raise UserError(f"{path} exists: remove it or choose another name")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {path.parent}")
    try:
        write_atomically(path, lambda file: writers[path.suffix](transitions, file))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({one_line(error)[:200]})") from error


def _write_npz(transitions: Transitions, path: Path) -> None:
    with path.open("wb") as file:  # np.savez would append a suffix to a path
        np.savez(file, **transitions.arrays())


def _write_hdf5(transitions: Transitions, path: Path) -> None:
    import h5py

    # In memory first: where the disk is full, the HDF5 library crashes the process while it closes the file.
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        for name, array in transitions.arrays().items():
            file.create_dataset(name, data=array, compression="gzip", shuffle=True)
        file.flush()
        path.write_bytes(file.id.get_file_image())
