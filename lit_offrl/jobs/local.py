"""Several commands of the package at once: the seeds of a training, the runs of a table.

No library starts them: joblib's workers outlive a killed parent and print nothing until a job ends, and submitit's
local executor starts all jobs at once, into files, under controllers that are meant to survive their parent.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lit_offrl.data.shared_tables import shared_tables
from lit_offrl.errors import UserError
from lit_offrl.system.cores import SHARE_OF_CORES, available_cores
from lit_offrl.system.processes import forwarding_signals, start


@dataclass(frozen=True)
class Job:
    """A command of the package.

    Attributes:
        name: Printed before each of its lines.
        words: What follows `python -m lit_offrl`.
    """

    name: str
    words: Sequence[str]


def run_jobs(jobs: Sequence[Job], at_once: int | None = None) -> dict[str, int]:
    """Run commands, some at a time, and print their lines, each with the name of its job.

    Each job is a process: on a CPU batching the small networks of several seeds gains nothing, and it would put a
    dimension for seeds into every line of every algorithm. Jobs that train on the same data share one table in memory.
    Each job gets its share of the cores, unless OMP_NUM_THREADS is set, and the next of several GPUs. Ctrl-C and
    SIGTERM stop the jobs that run, and no further job starts.

    Args:
        jobs: Jobs with distinct names.
        at_once: Number of jobs that run at a time; None for the number of cores.

    Returns:
        Exit codes of the jobs that were started, by name.
    """
    at_once = max(min(at_once or available_cores(), len(jobs)), 1)
    width = max(len(job.name) for job in jobs)
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(at_once):
        slots.put(slot)
    codes: dict[str, int] = {}
    with shared_tables() as tables, forwarding_signals() as running:
        share = {"OMP_NUM_THREADS": str(max(available_cores() // at_once, 1)), SHARE_OF_CORES: "1"}
        environment = {**os.environ, **({} if "OMP_NUM_THREADS" in os.environ else share), **tables}

        def run(job: Job) -> None:
            if running.stopped:
                return
            slot = slots.get()
            process = start(job.words, subprocess.PIPE, {**environment, **_device(slot)})
            running.add(process)
            assert process.stdout is not None
            for line in process.stdout:
                sys.stdout.write(f"{job.name:{width}} | {line.rstrip()}\n")
                sys.stdout.flush()
            codes[job.name] = process.wait()
            slots.put(slot)

        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(run, jobs))
    return codes


def report_failures(jobs: Sequence[Job], codes: dict[str, int]) -> int:
    """Print which jobs failed or were not started; return 0, or the exit code of the first job that failed."""
    failed = {name: code for name, code in codes.items() if code}
    left = [job.name for job in jobs if job.name not in codes]
    done = len(jobs) - len(failed) - len(left)
    sys.stdout.write(f"{done} of {len(jobs)} finished")
    sys.stdout.write("".join(f"; {name} failed with exit code {code}" for name, code in failed.items()))
    sys.stdout.write(f"; not started: {', '.join(left)}\n" if left else "\n")
    return next(iter(failed.values()), 1 if left else 0)


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
    """Return the environment variables that assign one of several GPUs to a slot."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = [each for each in visible.split(",") if each]
    else:
        devices = [str(i) for i, _ in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*")))]
    return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if len(devices) > 1 else {}
