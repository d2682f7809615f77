"""Where the jobs of a command run: on this machine, or on a cluster."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_offrl.cli.parser import CommandParser
from lit_offrl.errors import UserError
from lit_offrl.jobs.local import Job, report_failures, run_jobs

# Options of submitit that the command line has; the site's file may hold all of them.
SLURM_OPTIONS = {
    "partition": (str, "partition of the cluster"),
    "timeout_min": (int, "minutes after which a job is stopped and queued again"),
    "gpus_per_node": (int, "GPUs of a job"),
    "cpus_per_task": (int, "cores of a job, and its threads"),
    "array_parallelism": (int, "most jobs that run at a time"),
}


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add `--engine` and the options of SLURM."""
    group = parser.add_argument_group("cluster")
    group.add_argument("--engine", choices=("local", "slurm"), default="local", help="this machine (default), or SLURM")
    for name, (kind, text) in SLURM_OPTIONS.items():
        group.add_argument(f"--slurm.{name}", type=kind, help=text)


def split_engine(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of `add_engine_options`, and the other words.

    Raises:
        UserError: A value is wrong.
    """
    parser = CommandParser(prog="python -m lit_offrl fit", add_help=False, allow_abbrev=False)
    add_engine_options(parser)
    return parser.parse_known_args(words)


def slurm_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of SLURM that were given.

    Raises:
        UserError: They were given without `--engine slurm`.
    """
    values = {name: getattr(options, f"slurm.{name}") for name in SLURM_OPTIONS}
    given = {name: value for name, value in values.items() if value is not None}
    if given and options.engine != "slurm":
        raise UserError(f"--slurm.{next(iter(given))} belongs to --engine slurm")
    return given


def run_on_engine(
    options: argparse.Namespace, jobs: Sequence[Job], folder: Path, at_once: int | None = None, repeat: bool = False
) -> int:
    """Run the jobs here and return the exit code, or submit them and return 0.

    Args:
        options: Options of `add_engine_options`.
        jobs: Jobs with distinct names.
        folder: Where index and logs of a cluster go.
        at_once: Number of jobs at a time on this machine.
        repeat: Submit also those that have finished.
    """
    given = slurm_options(options)
    if options.engine == "local":
        return report_failures(jobs, run_jobs(jobs, at_once))
    if at_once is not None:
        raise UserError("--parallel: how many jobs of a cluster run at a time, --slurm.array_parallelism says")
    if any(starts_anew(job.words) for job in jobs):
        raise UserError("--overwrite: a job that is queued again would start anew: choose another folder of runs")
    from lit_offrl.jobs import slurm

    ids = slurm.submit(slurm.make_executor(folder, given), jobs, folder, skip_finished=not repeat)
    print(f"{len(ids)} of {len(jobs)} jobs submitted" + (f", {ids[0]} to {ids[-1]}" if ids else ""))
    if len(ids) < len(jobs):
        print("the others are finished, or in the queue")
    print(f"see what they do: python -m lit_offrl grid status {folder}; stop them: ... grid cancel {folder}")
    return 0


def starts_anew(words: Sequence[str]) -> bool:
    """Return whether the words of a training hold `--overwrite`, with or without a value."""
    return any(word.replace("=", " ").lower().startswith("--overwrite") for word in words)


def print_status(folder: Path) -> int:
    """Print what became of the jobs of a folder; return the exit code."""
    from lit_offrl.jobs.slurm import statuses

    found = statuses(folder)
    width = max(len(each.name) for each in found)
    for each in found:
        print(f"{each.state:7}  {each.job:>10}  {each.name:{width}}  {each.line}")
    counts = Counter(each.state for each in found)
    print(f"{len(found)} jobs: {', '.join(f'{number} {state}' for state, number in counts.most_common())}")
    return 0


def cancel_jobs(folder: Path) -> int:
    """Cancel the jobs of a folder; return the exit code."""
    from lit_offrl.jobs.slurm import cancel

    print(f"{cancel(folder)} jobs cancelled; the same command submits them again, and their runs continue")
    return 0
