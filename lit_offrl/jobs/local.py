"""Several commands at once, each in a process of its own: the seeds of a training, the runs of a table."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lit_offrl.data.local import SHARED_TABLES
from lit_offrl.errors import UserError
from lit_offrl.system.cores import available_cores


@dataclass(frozen=True)
class Job:
    """A command of the package.

    Attributes:
        name: What its lines are marked with.
        words: What follows `python -m lit_offrl`.
    """

    name: str
    words: Sequence[str]


def run_jobs(jobs: Sequence[Job], at_once: int | None = None) -> dict[str, int]:
    """Run commands, some at a time, and pass their lines on, each marked with its job.

    Processes and not one batched network: on a CPU batching small networks gains nothing, and on a GPU it would put a
    dimension for seeds into every line of every algorithm. Jobs that train on the same data share one table in memory.
    Each has its share of the cores, unless OMP_NUM_THREADS says otherwise; several GPUs are taken in turn. Ctrl-C and
    SIGTERM reach all of them, and no further one is started.

    Args:
        jobs: Their names are distinct.
        at_once: How many run at a time; by default as many as there are cores.

    Returns:
        Exit codes by name, of the jobs that were started.
    """
    at_once = max(min(at_once or available_cores(), len(jobs)), 1)
    waiting, codes, width = queue.SimpleQueue[Job](), dict[str, int](), max(len(job.name) for job in jobs)
    for job in jobs:
        waiting.put(job)
    with tempfile.TemporaryDirectory() as tables, _forwarding_signals() as running:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(available_cores() // at_once, 1))),
            SHARED_TABLES: tables,
        }

        def work(slot: int) -> None:
            while not running.stopped:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                process = subprocess.Popen(
                    [sys.executable, "-m", "lit_offrl", *job.words],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**environment, **_device(slot)},
                )
                running.add(process)
                assert process.stdout is not None
                for line in process.stdout:
                    sys.stdout.write(f"{job.name:{width}} | {line.rstrip()}\n")
                    sys.stdout.flush()
                codes[job.name] = process.wait()

        threads = [threading.Thread(target=work, args=(slot,)) for slot in range(at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return codes


def run_seeds(words: Sequence[str], seeds: str, at_once: str | None = None) -> int:
    """Train the seeds that a list such as "0,1,2" names; return the exit code.

    Each is the run that `fit --seed_everything SEED` makes, in the folder where that puts it. A seed that is finished
    is left alone, one that was interrupted goes on.

    Args:
        words: What was typed behind `fit`, without the seeds.
        seeds: Comma-separated.
        at_once: How many run at a time.

    Raises:
        UserError: The list or the number is none, or `words` say what belongs to a single run.
    """
    numbers = whole_numbers("--seeds", seeds)
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds: {seeds} names a seed twice")
    for single in ("--seed_everything", "--ckpt_path"):
        if any(word.partition("=")[0] == single for word in words):
            raise UserError(f"{single} belongs to a single run: leave it out beside --seeds")
    fresh = any(word.replace("=", " ").lower().startswith("--overwrite") for word in words)
    go_on = [] if fresh else ["--ckpt_path=auto"]
    jobs = [Job(f"seed {seed}", ["fit", *words, f"--seed_everything={seed}", *go_on]) for seed in numbers]
    codes = run_jobs(jobs, None if at_once is None else whole_numbers("--parallel", at_once)[0])
    return report_failures(jobs, codes)


def report_failures(jobs: Sequence[Job], codes: dict[str, int]) -> int:
    """Say which jobs failed or were not started; return an exit code: 0, or that of the first that failed."""
    failed = {name: code for name, code in codes.items() if code}
    left = [job.name for job in jobs if job.name not in codes]
    done = len(jobs) - len(failed) - len(left)
    sys.stdout.write(f"{done} of {len(jobs)} finished")
    sys.stdout.write("".join(f"; {name} failed with exit code {code}" for name, code in failed.items()))
    sys.stdout.write(f"; not started: {', '.join(left)}\n" if left else "\n")
    return next(iter(failed.values()), 1 if left else 0)


def take_option(words: list[str], name: str) -> str | None:
    """Take `--name VALUE` or `--name=VALUE` out of `words`; return the value, or None where it is not there.

    Raises:
        UserError: There is no value.
    """
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == name:
            if not equals and (i + 1 == len(words) or words[i + 1].startswith("--")):
                raise UserError(f"{name} needs a value, e.g. {name} 0,1,2")
            taken = value if equals else words[i + 1]
            del words[i : i + (1 if equals else 2)]
            return taken
    return None


def whole_numbers(name: str, text: str) -> list[int]:
    """Return the numbers of a list such as "0,1,2".

    Args:
        name: The option's name in the error message.
        text: The list, with or without brackets.

    Raises:
        UserError: The text is no list of whole numbers from 0.
    """
    try:
        numbers = [int(each) for each in text.strip("[]").split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise UserError(f"{name}: give whole numbers, e.g. {name} 0,1,2, not '{text}'")
    return numbers


def _device(slot: int) -> dict[str, str]:
    """Return the environment that gives a slot one of several GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = [each for each in visible.split(",") if each]
    else:
        devices = [str(i) for i, _ in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*")))]
    return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if len(devices) > 1 else {}


class _Running:
    """The processes under way, and whether they were asked to stop."""

    def __init__(self) -> None:
        self.stopped = False
        self._processes: list[subprocess.Popen[str]] = []

    def add(self, process: subprocess.Popen[str]) -> None:
        self._processes.append(process)
        if self.stopped:  # it was started while the request came
            process.terminate()

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Ask all to stop; SIGINT has reached those of a terminal already, and a second one would be an order."""
        self.stopped = True
        for process in self._processes:
            if process.poll() is None and (number != signal.SIGINT or not sys.stdin.isatty()):
                process.send_signal(signal.SIGTERM)


@contextmanager
def _forwarding_signals() -> Iterator[_Running]:
    running = _Running()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, running.stop) for number in numbers}
    try:
        yield running
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
