"""The cache: the table that was read from a slow format is stored beside the source as plain arrays."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_offrl.data.formats.arrays import READ_ERRORS
from lit_offrl.data.transitions import Transitions
from lit_offrl.errors import UserError, one_line
from lit_offrl.system.files import write_atomically

SUFFIX = ".cache.npz"
# Version of the layout of cache files and of the rules that make transitions: increase it when either changes.
_VERSION = 1


class Table(NamedTuple):
    """What a reader makes of a source.

    Attributes:
        transitions: The transitions.
        observation_keys: Keys of a dictionary observation that they were made of.
        notes: What a user should know about the reading, a line each, e.g. what was left out.
    """

    transitions: Transitions
    observation_keys: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def cached(source: Path, options: Mapping[str, Any], read: Callable[[], Table]) -> tuple[Table, str]:
    """Return what `read` returns and the SHA-256 digest of the source; take both from the cache if it is up to date.

    A cache that is outdated, broken or made with other options is replaced. If the cache cannot be written, a line on
    standard error says so, and no partial file remains.

    Args:
        source: File or folder that is read.
        options: Everything else that the result depends on; plain values.
        read: Reads the source.
    """
    cache = source.with_name(source.name + SUFFIX)
    fingerprint = _fingerprint(source, options)
    stored = _read_cache(cache, fingerprint)
    if stored is not None:
        return stored
    table = read()
    digest = source_sha256(source)
    header = {"observation_keys": table.observation_keys, "notes": table.notes}
    _write_cache(cache, table.transitions, {"fingerprint": fingerprint, "sha256": digest, **header})
    return table, digest


def source_sha256(source: Path) -> str:
    """Return the SHA-256 digest of a file's bytes, or of the names and bytes of a folder's files, in hexadecimal."""
    digest = sha256()
    for path in _files(source):
        if path != source:
            digest.update(f"{path.relative_to(source).as_posix()}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _files(source: Path) -> Iterator[Path]:
    if source.is_file():
        yield source
        return
    for folder, folders, names in os.walk(source):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and not name.endswith(SUFFIX) and path.is_file():  # no link to nowhere
                yield path


def _fingerprint(source: Path, options: Mapping[str, Any]) -> str:
    digest = sha256(json.dumps(options, sort_keys=True).encode())
    for path in _files(source):
        status = path.stat()
        digest.update(f"{path.relative_to(source.parent)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_cache(cache: Path, fingerprint: str) -> tuple[Table, str] | None:
    if not cache.is_file():
        return None
    try:
        with np.load(cache, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if (header["version"], header["fingerprint"]) != (_VERSION, fingerprint):
                return None
            transitions = Transitions(**{name: file[name] for name in file.files if name != "header"})
            keys = header["observation_keys"]
            notes = header.get("notes", ())  # caches of earlier versions have none
            return Table(transitions, None if keys is None else tuple(keys), tuple(notes)), header["sha256"]
    except (*READ_ERRORS, UserError):  # truncated, or another kind of file
        return None


def _write_cache(cache: Path, transitions: Transitions, header: dict[str, Any]) -> None:
    packed = np.frombuffer(json.dumps({"version": _VERSION, **header}).encode(), np.uint8)

    def write(path: Path) -> None:
        with path.open("wb") as file:  # np.savez would append a suffix to a path
            np.savez(file, header=packed, **transitions.arrays())

    try:
        write_atomically(cache, write)
    except OSError as error:
        print(f"{cache} cannot be written ({one_line(error)}): the next load is as slow as this one", file=sys.stderr)
