"""Jobs on a cluster: commands of the package as an array of SLURM's, submitted by submitit; and what became of them.

One element of an array is one command that can be started again at any time, such as `fit --ckpt_path auto`. SLURM
warns it before its time limit (SIGUSR2) or preempts it (SIGTERM). The command then writes its checkpoint and ends, and
its job goes back into the queue and continues from there. Jobs lie in `FOLDER/slurm`: an index of their ids, and a log
of each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_offrl.errors import UserError, one_line
from lit_offrl.jobs.local import Job
from lit_offrl.system.files import write_json
from lit_offrl.system.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from submitit import Executor
    from submitit.helpers import DelayedSubmission

# What the site's file and the command line may replace. submitit's own limits are 5 minutes and 3 restarts.
DEFAULTS: dict[str, Any] = {"timeout_min": 24 * 60, "cpus_per_task": 1, "signal_delay_s": 120, "name": "lit_offrl"}
MOST_RESTARTS = 1_000_000
LONGEST_ARRAY = 1000  # SLURM's MaxArraySize is 1001 unless a site changes it
TAIL_BYTES = 4096  # of a log, in which its last line lies
LISTED_AT_ONCE = 1000  # job ids in one `scancel`


class ClusterJob:
    """Runs a command of the package within a job; submitit imports it by its name on the node."""

    def __call__(self, words: Sequence[str]) -> None:
        """Run the command; end the job with its exit code, or put it back into the queue where a signal stopped it."""
        from lit_offrl import main

        # A fixed number of threads: a run that continues on another node repeats its bits.
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        code = main(words)
        if code - 128 in STOP_SIGNALS and (code - 128 == signal.SIGUSR2 or _is_still_wanted()):
            signal.raise_signal(signal.SIGUSR2)  # submitit's own, which calls `checkpoint` and requeues the job
        if code:
            sys.exit(code)

    def checkpoint(self, words: Sequence[str]) -> DelayedSubmission:
        """Return what the job does when it starts again: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, words)


def _is_still_wanted() -> bool:
    """Return whether SLURM lets this job run; not after `scancel`, nor where it requeues the job by itself."""
    try:
        return (
            _ask("squeue", "--noheader", f"--jobs={os.environ.get('SLURM_JOB_ID')}", "--format=%T").strip() == "RUNNING"
        )
    except UserError:  # there is no SLURM, or it does not answer
        return False


def make_executor(folder: Path, given: Mapping[str, Any]) -> Executor:
    """Return submitit's executor for SLURM.

    Args:
        folder: Where index and logs go; all nodes must see it.
        given: Options of submitit that win over those of the site's file.

    Raises:
        UserError: submitit or SLURM is not here, or an option is unknown.
    """
    try:
        from submitit import AutoExecutor
    except ImportError:
        raise UserError("--engine slurm needs submitit: pip install 'lit_offrl[cluster]'") from None
    options = {**DEFAULTS, **site_options(), **given, "stderr_to_stdout": True}
    options["additional_parameters"] = {"requeue": True, **(options.get("additional_parameters") or {})}
    try:
        executor = AutoExecutor(folder / "slurm", cluster="slurm", slurm_max_num_timeout=MOST_RESTARTS)
    except RuntimeError:
        raise UserError("--engine slurm: there is no SLURM on this machine (no srun)") from None
    try:
        executor.update_parameters(**{f"slurm_{name}": value for name, value in options.items()})
    except NameError as error:
        raise UserError(f"{site_file()}: {one_line(error).partition(' Known executors')[0]}") from error
    return executor


def site_file() -> Path:
    """Return the path of the file with the site's options."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "lit_offrl" / "slurm.yaml"


def site_options() -> dict[str, Any]:
    """Return the site's options; none without its file.

    Raises:
        UserError: The file is no YAML file of keys and values.
    """
    import yaml

    path = site_file()
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {one_line(error)[:200]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold keys and values, e.g. partition: gpu")
    return content


def submit(executor: Executor, jobs: Sequence[Job], folder: Path, skip_finished: bool = True) -> list[str]:
    """Submit those jobs that are neither queued nor running, and return their ids.

    Args:
        executor: See `make_executor`.
        jobs: Jobs with distinct names.
        folder: As for `make_executor`.
        skip_finished: Leave out jobs that have finished with the same words.

    Raises:
        UserError: SLURM refuses the jobs.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    index = read_index(folder)
    live = live_jobs() if index else {}
    wanted = []
    for job in jobs:
        known = index.get(job.name)
        queued = known is not None and known["job"] in live
        finished = known is not None and known["words"] == list(job.words) and is_done(folder, known["job"])
        if not queued and not (finished and skip_finished):
            wanted.append(job)
    ids = []
    for first in range(0, len(wanted), LONGEST_ARRAY):
        part = wanted[first : first + LONGEST_ARRAY]
        try:
            submitted = executor.map_array(ClusterJob(), [list(job.words) for job in part])
        except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError) as error:
            raise UserError(f"SLURM refuses the jobs: {one_line(error)[-300:]}") from error
        for job, each in zip(part, submitted, strict=True):
            index[job.name] = {"job": each.job_id, "words": list(job.words)}
            ids.append(each.job_id)
        write_json(folder / "slurm" / "jobs.json", index)
    return ids


def read_index(folder: Path) -> dict[str, Any]:
    """Return the job id and the words of each job by its name; nothing where none was submitted."""
    try:
        content: dict[str, Any] = json.loads((folder / "slurm" / "jobs.json").read_text())
    except FileNotFoundError:
        return {}
    return content


def _index_of_jobs(folder: Path) -> dict[str, Any]:
    index = read_index(folder)
    if not index:
        raise UserError(f"no jobs were submitted for {folder}: --engine slurm submits them")
    return index


def live_jobs() -> dict[str, str]:
    """Return the state of the user's jobs that are queued or running, by id."""
    lines = _ask("squeue", "--me", "--noheader", "--array", "--format=%i %T").splitlines()
    return {job: state for job, _, state in (line.partition(" ") for line in lines)}


def is_done(folder: Path, job: str) -> bool:
    """Return whether a job ended with exit code 0: only then submitit writes a result."""
    return (folder / "slurm" / f"{job}_0_result.pkl").is_file()


class Status(NamedTuple):
    """What became of a job.

    Attributes:
        state: done, running, waiting or failed; stopped, if its command ended without an error before it was done.
        job: The scheduler's id.
        line: The last line of its log.
    """

    name: str
    state: str
    job: str
    line: str


def statuses(folder: Path) -> list[Status]:
    """Return what became of the jobs of a folder.

    Raises:
        UserError: None was submitted.
    """
    index = _index_of_jobs(folder)
    live = live_jobs()
    found = []
    for name, entry in index.items():
        job, line = entry["job"], last_line(folder / "slurm" / f"{entry['job']}_0_log.out")
        if is_done(folder, job):
            state = "done"
        elif job in live:
            state = "waiting" if live[job] in ("PENDING", "REQUEUED") else "running"
        else:
            state = "stopped" if line.startswith("stopped") else "failed"
        found.append(Status(name, state, job, line))
    return found


def cancel(folder: Path) -> int:
    """Cancel all jobs of a folder that are queued or running; return their number. Runs write their checkpoints.

    Raises:
        UserError: None was submitted.
    """
    index, live = _index_of_jobs(folder), live_jobs()
    jobs = [entry["job"] for entry in index.values() if entry["job"] in live]
    for first in range(0, len(jobs), LISTED_AT_ONCE):
        _ask("scancel", *jobs[first : first + LISTED_AT_ONCE])
    return len(jobs)


def last_line(log: Path) -> str:
    """Return the last line of a log that the command has written, or the reason why it failed."""
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    # submitit writes lines of its own, and srun repeats the exit code.
    lines = [line.strip() for line in lines if line.strip() and not line.startswith(("submitit ", "srun: "))]
    return lines[-1] if lines else ""


def _ask(*command: str) -> str:
    """Return the output of a command of SLURM.

    Raises:
        UserError: It is not here, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"there is no SLURM on this machine (no {command[0]})") from None
    if done.returncode:
        raise UserError(f"{command[0]} fails: {one_line(RuntimeError(done.stderr))[:200]}")
    return done.stdout
