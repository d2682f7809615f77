"""One trial: a real `fit` per seed, each in a process of its own, watched through the metrics.csv that it writes.

Processes, because a trial may take down the one that it runs in (out of memory, a crash of the driver), because they
give back all memory, and because under DDP every rank starts from the same command line: whatever asks the study is
not among the ranks, which receive the parameters as flags.
"""

from __future__ import annotations

import csv
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_offrl.search.space import Objective
from lit_offrl.system.processes import start_detached, stop

POLL_S = 0.2
# Reading the growing metrics.csv may take this share of the time.
READING_SHARE = 0.05

Watch = Callable[[int, float], bool]


@dataclass(frozen=True)
class SeedRun:
    """A training with one seed.

    Attributes:
        seed: The seed.
        words: Command line of `fit`, without what says how to begin.
        root: Below it lies the run folder.
        log: File for all that the run prints.
    """

    seed: int
    words: tuple[str, ...]
    root: Path
    log: Path

    @property
    def folder(self) -> Path:
        """The run folder; before there is one, a folder that has none of its files."""
        return next((path for path in sorted(self.root.rglob(f"seed_{self.seed}")) if path.is_dir()), self.root)

    @property
    def finished(self) -> bool:
        """Whether the training has been done, e.g. before a restart of the search."""
        try:
            results = json.loads((self.folder / "results.json").read_text())
        except (OSError, json.JSONDecodeError):
            return False
        return bool((results["stage"], results["status"]) == ("fit", "finished"))

    def values(self, metric: str) -> list[tuple[int, float]]:
        """Return the gradient step and the value of each time that a metric was logged."""
        try:
            with (self.folder / "metrics.csv").open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row.get(metric)]
            return [(int(float(row["step"])), float(row[metric])) for row in rows]
        except (OSError, ValueError):  # not there yet, or its last row not whole yet
            return []

    def metrics(self) -> list[str]:
        """Return the names of what was logged."""
        try:
            with (self.folder / "metrics.csv").open(newline="") as file:
                return sorted(name for name in next(csv.reader(file)) if name != "step")
        except (OSError, StopIteration):
            return []


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        score: Mean over the seeds; None where the trial was pruned or failed.
        pruned: Whether the study gave it up.
        failure: Why it has no score, in one line; None where it has one or was pruned.
        bad_input: Whether it failed because `fit` refused the input.
    """

    score: float | None = None
    pruned: bool = False
    failure: str | None = None
    bad_input: bool = False


def run_trial(
    runs: Sequence[SeedRun],
    objective: Objective,
    max_steps: int,
    prune: Watch,
    tick: Callable[[], None],
    inherited: Sequence[int] = (),
) -> Outcome:
    """Train once with each seed, in turn, and score.

    Args:
        runs: One per seed.
        objective: What is scored.
        max_steps: Gradient steps of each run.
        prune: Called with a count of gradient steps over all seeds and the running mean, after each evaluation: the
            mean of the final scores of earlier seeds and the present score of this one. True gives the trial up.
        tick: Called several times a second while a run lasts; what it raises stops the run cleanly and is passed on.
        inherited: File descriptors that stay open in the runs.
    """
    scores: list[float] = []
    for index, run in enumerate(runs):
        watched = _Watched(objective, scores, index * max_steps, prune)
        if not run.finished:
            code, pruned = _fit(run, lambda watched=watched, run=run: watched(run), tick, inherited)  # type: ignore[misc]
            if pruned:
                return Outcome(pruned=True)
            if code:
                return Outcome(failure=_reason(code, run.log), bad_input=code == 2)
        score = mean_of_last(run.values(objective.metric), objective.last)
        if score is None:
            logged = [name for name in run.metrics() if not name.startswith("time/")]
            return Outcome(failure=f"no {objective.metric} was logged; there are {', '.join(logged)}")
        if not math.isfinite(score):
            return Outcome(failure=f"{objective.metric} became {score}")
        scores.append(score)
        last = index == len(runs) - 1
        if watched(run) and not last:
            return Outcome(pruned=True)
    return Outcome(score=sum(scores) / len(scores))


def mean_of_last(values: Sequence[tuple[int, float]], last: int) -> float | None:
    """Return the mean of the last so many values, or of all where there are fewer; None where there are none."""
    some = [value for _, value in values[-last:]]
    return sum(some) / len(some) if some else None


class _Watched:
    """Passes on what a growing metrics.csv says, each evaluation once."""

    def __init__(self, objective: Objective, earlier: Sequence[float], offset: int, prune: Watch) -> None:
        self.objective = objective
        self.earlier = tuple(earlier)
        self.offset = offset
        self.prune = prune
        self.passed_on = 0

    def __call__(self, run: SeedRun) -> bool:
        """Return whether the trial is to be given up."""
        values = run.values(self.objective.metric)
        every = 1 if self.objective.evaluates else self.objective.last
        give_up = False
        for count in range(self.passed_on + every, len(values) + 1, every):
            self.passed_on = count
            present = mean_of_last(values[:count], self.objective.last)
            assert present is not None
            running = (sum(self.earlier) + present) / (len(self.earlier) + 1)
            give_up = math.isfinite(running) and self.prune(self.offset + values[count - 1][0], running)
            if give_up:
                break
        return give_up


def _fit(
    run: SeedRun, give_up: Callable[[], bool], tick: Callable[[], None], inherited: Sequence[int]
) -> tuple[int, bool]:
    """Run a training; return its exit code and whether it was given up."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        # `auto` continues a run that ended with an earlier search.
        process = start_detached(["fit", *run.words, "--ckpt_path=auto"], log, inherited)
    changed, pause = None, POLL_S
    try:
        while process.poll() is None:
            tick()
            if (now := _changed(run)) != changed:
                changed, started = now, time.perf_counter()
                if give_up():
                    stop(process)
                    return process.returncode, True
                pause = max(POLL_S, (time.perf_counter() - started) / READING_SHARE)
            time.sleep(pause)
    finally:
        stop(process)
    return process.returncode, False


def _changed(run: SeedRun) -> tuple[int, int] | None:
    """Return what differs once metrics.csv has grown."""
    try:
        state = (run.folder / "metrics.csv").stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def _reason(code: int, log: Path) -> str:
    """Return why a run failed, in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    if code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}; see {log}"
    return f"{lines[-1] if lines else 'no output'} (exit code {code}; see {log})"
