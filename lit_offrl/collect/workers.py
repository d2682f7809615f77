"""Episodes from several worker processes, in order.

Workers are fresh interpreters that run `serve`. Neither library that was looked at serves: `multiprocessing` imports
the caller's main module again, which breaks scripts without a main guard, and joblib's workers outlive a killed parent.
These workers end when their standard input closes. They are single-threaded, so that the bits of an episode do not
depend on how a linear algebra library splits its work.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO, cast

from lit_offrl.collect.catalog import CATALOG, CollectedDataset, LocomotionDataset, ManipulationDataset, MazeDataset
from lit_offrl.collect.episodes import Recorder
from lit_offrl.collect.journal import read_record, write_record
from lit_offrl.collect.locomotion_episodes import LocomotionRecorder
from lit_offrl.collect.manipulation_episodes import ManipulationRecorder
from lit_offrl.collect.maze_episodes import MazeRecorder
from lit_offrl.errors import RunFailure

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Episodes per worker that may be requested before the next one in order is there. With one, workers would wait while
# another worker records a long episode.
_AHEAD = 4
_COMMAND = "from lit_offrl.collect.workers import serve; serve()"


def make_recorder(dataset: CollectedDataset, seed: int) -> Recorder:
    """Return the recorder of a dataset."""
    if isinstance(dataset, MazeDataset):
        return MazeRecorder(dataset, seed)
    if isinstance(dataset, ManipulationDataset):
        return ManipulationRecorder(dataset, seed)
    assert isinstance(dataset, LocomotionDataset)
    return LocomotionRecorder(dataset, seed)


def ordered_records(dataset_id: str, seed: int, processes: int, first: int = 0, every: int = 1) -> Iterator[bytes]:
    """Yield the episodes `first`, `first` + `every`, ... as bytes; they do not depend on the number of processes.

    The iterator is endless; close it to stop the workers.

    Args:
        dataset_id: A key of the catalog.
        seed: Seed of the whole dataset.
        processes: Number of workers.
        first: Number of the first episode.
        every: Distance between the numbers of two episodes.

    Raises:
        RunFailure: A worker died; the message holds the last line that it printed.
    """
    workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()  # those without work
    started: list[_Worker] = []

    def record(index: int) -> bytes:
        worker = workers.get()
        try:
            return worker.record(index)
        finally:
            workers.put(worker)

    pool = ThreadPoolExecutor(processes)
    indices = count(first, every)
    try:
        for _ in range(processes):
            started.append(_Worker(dataset_id, seed))
            workers.put(started[-1])
        pending = deque(pool.submit(record, index) for index in islice(indices, _AHEAD * processes))
        while True:
            yield pending.popleft().result()
            pending.append(pool.submit(record, next(indices)))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in started:
            worker.stop()
        pool.shutdown()


class _Worker:
    """One process, which records one episode at a time."""

    def __init__(self, dataset_id: str, seed: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        package_root = Path(__file__).resolve().parents[2]
        paths = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, dataset_id, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **_ONE_THREAD, "PYTHONPATH": paths},
            cwd=package_root,  # first on the worker's path, so that it imports this package and no folder of its name
        )

    def record(self, index: int) -> bytes:
        """Return an episode.

        Raises:
            RunFailure: The process died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        record = None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"%d\n" % index)
            self._process.stdin.flush()
            record = read_record(cast(BinaryIO, self._process.stdout))
        if record is None:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise RunFailure(f"a collecting process died at episode {index}: {lines[-1]}")
        return record

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):
                    file.close()


def serve() -> None:
    """Main program of a worker: read episode numbers from standard input, write episodes to standard output."""
    # Libraries may print to standard output; send that to standard error.
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)
        recorder = make_recorder(CATALOG[sys.argv[1]], int(sys.argv[2]))
        for line in sys.stdin:
            write_record(output, recorder.record(int(line)).to_bytes())
