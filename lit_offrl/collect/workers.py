"""Episodes from several worker processes, in order.

Workers are fresh interpreters that run `serve`. Neither library that was looked at serves: `multiprocessing` imports
the caller's main module again, which breaks scripts without a main guard, and joblib's workers outlive a killed parent.
These workers end when their standard input closes. They are single-threaded, so that the bits of an episode do not
depend on how a linear algebra library splits its work.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import BinaryIO, cast

from lit_offrl.collect.catalog import CATALOG, CollectedDataset, LocomotionDataset, MazeDataset
from lit_offrl.collect.episodes import Recorder
from lit_offrl.collect.journal import read_record, write_record
from lit_offrl.collect.locomotion_episodes import LocomotionRecorder
from lit_offrl.collect.maze_episodes import MazeRecorder
from lit_offrl.errors import RunFailure

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_COMMAND = "from lit_offrl.collect.workers import serve; serve()"


def make_recorder(dataset: CollectedDataset, seed: int) -> Recorder:
    """Return the recorder of a dataset."""
    if isinstance(dataset, MazeDataset):
        return MazeRecorder(dataset, seed)
    assert isinstance(dataset, LocomotionDataset)
    return LocomotionRecorder(dataset, seed)


def ordered_records(dataset_id: str, seed: int, processes: int, first: int = 0) -> Iterator[bytes]:
    """Yield the episodes `first`, `first` + 1, ... as bytes; they do not depend on the number of processes.

    The iterator is endless; close it to stop the workers.

    Args:
        dataset_id: A key of the catalog.
        seed: Seed of the whole dataset.
        processes: Number of workers.
        first: Number of the first episode.

    Raises:
        RunFailure: A worker died; the message holds the last line that it printed.
    """
    workers: list[_Worker] = []
    try:
        workers += (_Worker(dataset_id, seed) for _ in range(processes))
        indices = count(first)
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker.output, selectors.EVENT_READ, worker)
                worker.ask(next(indices))
            done: dict[int, bytes] = {}
            for index in count(first):
                while index not in done:
                    for key, _ in selector.select():
                        worker = key.data
                        done[worker.asked] = worker.receive()
                        worker.ask(next(indices))
                yield done.pop(index)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process, which records one episode at a time."""

    def __init__(self, dataset_id: str, seed: int) -> None:
        self.asked = -1
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        home = Path(__file__).resolve().parents[2]
        paths = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, dataset_id, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env={**os.environ, **_ONE_THREAD, "PYTHONPATH": paths},
            cwd=home,  # first on the worker's path, so that it imports this package and not a folder of the same name
        )

    @property
    def output(self) -> BinaryIO:
        return cast(BinaryIO, self._process.stdout)

    def ask(self, index: int) -> None:
        self.asked = index
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"%d\n" % index)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def receive(self) -> bytes:
        record = read_record(self.output)
        if record is None:
            raise self._death()
        return record

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._complaints.close()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _death(self) -> RunFailure:
        self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines() or ["no message"]
        return RunFailure(f"a collecting process died at episode {self.asked}: {lines[-1]}")


def serve() -> None:
    """Main program of a worker: read episode numbers from standard input, write episodes to standard output."""
    # Libraries may print to standard output; send that to standard error.
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)
        recorder = make_recorder(CATALOG[sys.argv[1]], int(sys.argv[2]))
        for line in sys.stdin:
            write_record(output, recorder.record(int(line)).to_bytes())
