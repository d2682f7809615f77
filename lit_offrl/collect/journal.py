"""Finished episodes on disk, so that a killed collection continues where it stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from lit_offrl.collect.episodes import Episode

_LENGTH_BYTES = 8
LONGEST_RECORD = 1 << 30  # bytes; an episode takes less than one per cent of this


def write_record(file: BinaryIO, record: bytes) -> None:
    """Write the length of a record and the record, and flush."""
    file.write(len(record).to_bytes(_LENGTH_BYTES, "little") + record)
    file.flush()


def read_record(file: BinaryIO) -> bytes | None:
    """Return the next record; None at the end of the file, and for a record that is cut off or no record at all."""
    header = file.read(_LENGTH_BYTES)
    length = int.from_bytes(header, "little")
    if len(header) < _LENGTH_BYTES or length > LONGEST_RECORD:
        return None
    record = file.read(length)
    return record if len(record) == length else None


def stored_records(path: Path, title: bytes) -> Iterator[bytes]:
    """Yield the complete records of a journal behind its title; none where it is missing or has another title."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        if read_record(file) == title:
            while record := read_record(file):
                yield record


class Journal:
    """A file with the episodes of a collection in order, one record each; a context manager.

    A journal with the same title keeps its complete episodes when it is opened again; with another title it is emptied.

    Args:
        path: The file.
        title: First record of the file: everything that the episodes depend on.
    """

    def __init__(self, path: Path, title: bytes) -> None:
        self.path = path
        self.episodes = 0
        self.steps = 0
        path.touch()
        self._file = path.open("r+b")
        if read_record(self._file) == title:
            whole = self._file.tell()
            for episode in self._read():
                self.episodes += 1
                self.steps += len(episode)
                whole = self._file.tell()
            self._file.seek(whole)
            self._file.truncate()
        else:
            self._file.seek(0)
            self._file.truncate()
            write_record(self._file, title)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, record: bytes) -> None:
        """Add an episode, as bytes."""
        steps = len(Episode.from_bytes(record))
        write_record(self._file, record)
        self.episodes += 1
        self.steps += steps

    def read(self, steps: int) -> Iterator[Episode]:
        """Yield the episodes of the first `steps` steps, the last one truncated. Do not append while reading."""
        self._file.seek(0)
        read_record(self._file)
        for episode in self._read():
            yield episode.cut(steps)
            steps -= len(episode)
            if steps <= 0:
                return

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink()

    def _read(self) -> Iterator[Episode]:
        # A record of full length can be damaged if the machine crashed before it was on disk.
        with contextlib.suppress(ValueError):
            while record := read_record(self._file):
                yield Episode.from_bytes(record)
