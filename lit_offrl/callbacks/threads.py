"""Fewer CPU threads where other programs use the cores."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import lightning
import torch

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.algorithms.loop import Named, Phase
from lit_offrl.batch import Batch
from lit_offrl.callbacks.acceleration import Kind, kind_of
from lit_offrl.callbacks.base import AlgorithmCallback, print_note
from lit_offrl.system.cores import SHARE_OF_CORES

FIXED_BY = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def fixed_by_user() -> bool:
    """Return whether the user has set how many threads there are, or how they wait."""
    return any(name in os.environ for name in FIXED_BY) and SHARE_OF_CORES not in os.environ


class ThreadFallback(AlgorithmCallback):
    """Continues with fewer threads where the CPU cores do not run all threads of an update at once.

    The threads of an update wait for each other a thousand times a second, and spin while they wait. On idle cores that
    is the fastest way: on two cores, two threads make 1.3 to 1.7 times the steps of one. If another program uses a
    core, all wait for the thread that is not scheduled, and two threads make a quarter or a tenth of the steps of one.
    Spinning threads use CPU time, so that an update of n threads takes n times its wall time in CPU time exactly if all
    of them are scheduled.

    Results depend on the number of threads by rounding. So a reduced number is kept for the rest of the run, also by a
    resumed run, and nothing is reduced where the user has set one of the variables `FIXED_BY`.
    """

    WINDOW_S = 5.0  # a shorter disturbance is no reason
    MISSING = 0.3  # of the threads, on average over the window; on idle cores 0.02 are missing

    def __init__(self) -> None:
        self.threads: int | None = None  # reduced number, also from a checkpoint
        self._threads_before = torch.get_num_threads()
        self._seen: set[Kind] = set()
        self._cpu_s = self._wall_s = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the reduced number of threads, if it was reduced."""
        return {} if self.threads is None else {"threads": self.threads}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.threads = state_dict["threads"]

    def on_fit_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Watch the updates; `Acceleration` has set before how they run."""
        if algorithm.device.type != "cpu" or fixed_by_user():
            return
        if self.threads is not None:
            torch.set_num_threads(min(self.threads, torch.get_num_threads()))
        run = algorithm.run_update

        def run_and_watch(algorithm: OfflineAlgorithm, phase: Phase, batch: Batch) -> Named:
            if torch.get_num_threads() == 1:
                return run(algorithm, phase, batch)
            kind, cpu_s, wall_s = kind_of(algorithm, phase), time.process_time(), time.perf_counter()
            named = run(algorithm, phase, batch)
            if kind in self._seen:  # the first update of a kind may be compiled, on one thread
                self._cpu_s += time.process_time() - cpu_s
                self._wall_s += time.perf_counter() - wall_s
                self._reduce_where_threads_wait(trainer)
            self._seen.add(kind)
            return named

        algorithm.run_update = run_and_watch

    def teardown(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm, stage: str) -> None:
        """Give the process the number of threads back that it had."""
        if self.threads is not None:
            torch.set_num_threads(self._threads_before)

    def _reduce_where_threads_wait(self, trainer: lightning.Trainer) -> None:
        if self._wall_s < self.WINDOW_S:
            return
        scheduled, threads = self._cpu_s / self._wall_s, torch.get_num_threads()
        self._cpu_s = self._wall_s = 0.0
        if scheduled < threads - self.MISSING:
            self.threads = max(math.floor(scheduled), 1)
            torch.set_num_threads(self.threads)
            print_note(
                trainer,
                f"note: other programs use the CPU: {self.threads} of {threads} threads from here on, which is faster "
                "now; OMP_NUM_THREADS sets a number for the whole run",
            )
