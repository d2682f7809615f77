"""Files that are written completely or not at all, and locks between processes."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_offrl.errors import UserError


def home_folder(variable: str) -> Path:
    """Return the user's home folder.

    Args:
        variable: An environment variable that names a folder in its place, for the error message.

    Raises:
        UserError: The user has none, as in some containers.
    """
    try:
        return Path.home()
    except RuntimeError:
        raise UserError(f"there is no home folder: set {variable} to the folder of the datasets") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path` in one step.

    Raises:
        OSError: The file cannot be written; what was at `path` is still there, and no temporary file remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content`, atomically."""
    write_atomically(path, lambda file: file.write_bytes(content))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON, atomically; numbers that are not finite, which JSON does not have, become null."""
    write_bytes(path, (json.dumps(_finite(content), indent=2, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def temporary_lock(path: Path, timeout_s: float = -1) -> Iterator[None]:
    """Hold an exclusive lock, and remove its file at the end; it dies with its holder, however that dies.

    `FileLock` notices that the file it waited for was removed, and makes a new one.
    """
    from filelock import FileLock

    with FileLock(path, timeout=timeout_s):
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file; there filelock does so itself
                path.unlink()


@contextmanager
def no_files_left() -> Iterator[None]:
    """Give code that builds environments a temporary folder of its own, which is removed afterwards.

    Gymnasium-Robotics and OGBench write the model of every maze into the temporary folder, read it once, and leave it
    there. The name of Gymnasium-Robotics' file is the time, so that processes which build at the same moment would also
    share the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        usual, tempfile.tempdir = tempfile.tempdir, folder
        try:
            yield
        finally:
            tempfile.tempdir = usual
