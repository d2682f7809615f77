"""Finished episodes on disk, so that a collection that was killed goes on where it stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from lit_offrl.collect.episodes import Episode

_LENGTH_BYTES = 8


def write_record(file: BinaryIO, record: bytes) -> None:
    """Write a record with its length before it, and flush."""
    file.write(len(record).to_bytes(_LENGTH_BYTES, "little") + record)
    file.flush()


def read_record(file: BinaryIO) -> bytes | None:
    """Return the next record; None where the file ends before its end."""
    header = file.read(_LENGTH_BYTES)
    record = file.read(int.from_bytes(header, "little"))
    whole = len(header) == _LENGTH_BYTES and len(record) == int.from_bytes(header, "little")
    return record if whole else None


class Journal:
    """The episodes of a collection in order, in a file that grows by one record per episode; a context manager.

    Opening it keeps what an earlier collection with the same title left, up to the last whole episode.

    Args:
        path: Of the file.
        title: What the episodes depend on, the file's first record. A file with another title is started anew.
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
        """Yield the first `steps` steps, an episode at a time, the last one cut off; append nothing meanwhile."""
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
        # A record can be whole in length and damaged: where the machine went down before it reached the disk.
        with contextlib.suppress(ValueError):
            while record := read_record(self._file):
                yield Episode.from_bytes(record)
