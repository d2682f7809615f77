"""Episodes from several processes, in order.

The workers are fresh interpreters that run this module's `serve`, not `multiprocessing` children: those would import
the caller's main module again, which breaks scripts without a main guard. They are single-threaded, so that an
episode's bits do not depend on how a linear algebra library splits its work, and end by themselves when the parent
goes away.
"""

from __future__ import annotations

import contextlib
import io
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO

import numpy as np

from lit_offrl.collect.catalog import CATALOG
from lit_offrl.collect.episodes import Episode, EpisodeRecorder
from lit_offrl.errors import RunFailure

_LENGTH_BYTES = 8
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_COMMAND = "from lit_offrl.collect.workers import serve; serve()"


def ordered_episodes(dataset_id: str, seed: int, processes: int) -> Iterator[Episode]:
    """Yield episodes 0, 1, 2, ... without end; the same for any number of processes.

    Close the iterator to stop the workers.

    Args:
        dataset_id: A key of the catalog.
        seed: Seed of the whole dataset.
        processes: Number of workers.

    Raises:
        RunFailure: A worker died; carries the last line it printed.
    """
    workers: list[_Worker] = []
    try:
        workers += (_Worker(dataset_id, seed) for _ in range(processes))
        indices = count()
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker.output, selectors.EVENT_READ, worker)
                worker.ask(next(indices))
            done: dict[int, Episode] = {}
            for index in count():
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
    """One process; at most one episode is asked for at a time."""

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
            cwd=home,  # first on the worker's path: this very package, not whatever lies where the user stands
        )

    @property
    def output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def ask(self, index: int) -> None:
        self.asked = index
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"%d\n" % index)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def receive(self) -> Episode:
        header = self.output.read(_LENGTH_BYTES)
        payload = self.output.read(int.from_bytes(header, "little"))
        if len(header) < _LENGTH_BYTES or len(payload) < int.from_bytes(header, "little"):
            raise self._death()
        return _unpack(payload)

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
    """Answer each episode number on standard input with the episode on standard output (the worker's main program)."""
    # Libraries print to standard output, too: keep it for the episodes.
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)
        recorder = EpisodeRecorder(CATALOG[sys.argv[1]], int(sys.argv[2]))
        for line in sys.stdin:
            payload = _pack(recorder.record(int(line)))
            output.write(len(payload).to_bytes(_LENGTH_BYTES, "little") + payload)
            output.flush()


def _pack(episode: Episode) -> bytes:
    buffer = io.BytesIO()
    parts = {f"observations/{key}": part for key, part in episode.observations.items()}
    np.savez(
        buffer,
        actions=episode.actions,
        rewards=episode.rewards,
        terminations=episode.terminations,
        truncations=episode.truncations,
        kind=np.array(episode.kind),
        fell=np.array(episode.fell),
        **parts,  # type: ignore[arg-type]
    )
    return buffer.getvalue()


def _unpack(payload: bytes) -> Episode:
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        return Episode(
            observations={
                name.partition("/")[2]: arrays[name] for name in arrays.files if name.startswith("observations/")
            },
            actions=arrays["actions"],
            rewards=arrays["rewards"],
            terminations=arrays["terminations"],
            truncations=arrays["truncations"],
            kind=str(arrays["kind"]),
            fell=bool(arrays["fell"]),
        )
