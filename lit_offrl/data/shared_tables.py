"""Tables that several processes share in memory. Light: torch is imported when a table is made."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lit_offrl.system.files import temporary_lock, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

SHARED_TABLES = "LIT_OFFRL_SHARED_TABLES"
"""Environment variable that names a folder of shared tables; `lit_offrl.jobs.local` sets it."""
_PREFIX = "lit_offrl_tables_"


@contextmanager
def shared_tables() -> Iterator[dict[str, str]]:
    """Make a folder of shared tables; yield the environment variables of the processes that share them.

    The folder's name holds this process's number, by which the next call finds the folders of killed processes.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if not _is_alive(folder.name.removeprefix(_PREFIX).partition("_")[0]):
            shutil.rmtree(folder, ignore_errors=True)  # that of another user stays
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}_") as tables:
        yield {SHARED_TABLES: tables}


def _is_alive(process: str) -> bool:
    return not Path("/proc/self").exists() or not process.isdigit() or Path("/proc", process).exists()


def share_table(make_table: Callable[[], Tensor], width: int, options: Sequence[object]) -> Tensor:
    """Return a table, mapped from a file that all processes with the same folder share; without a folder, a plain one.

    The first process writes the file, the others wait for it.

    Args:
        make_table: Makes the table, float32 `[n, width]`.
        width: Number of columns.
        options: Everything that the table depends on; processes with equal options share it.
    """
    folder = os.environ.get(SHARED_TABLES)
    if folder is None:
        return make_table()
    import torch

    path = Path(folder) / hashlib.sha256(repr(options).encode()).hexdigest()
    with temporary_lock(path.with_suffix(".lock")):
        if not path.is_file():
            write_atomically(path, lambda file: make_table().numpy().tofile(file))
    size = path.stat().st_size // torch.float32.itemsize
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(-1, width)
