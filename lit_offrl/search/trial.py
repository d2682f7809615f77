"""One trial of a search: a `fit` per seed, each in a process of its own, observed through its metrics.csv.

Where trials are scored by fitted Q evaluation, an `evaluate` follows each `fit`.

The reasons: a trial can crash its process (out of memory, a driver), its memory is freed at the end, and all ranks of a
DDP run need the same command line, which holds the parameters as flags.
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
from lit_offrl.system.processes import start, stop

POLL_S = 0.2
READING_SHARE = 0.05  # largest share of the time for reading metrics.csv

Watch = Callable[[int, float], bool]


@dataclass(frozen=True)
class SeedRun:
    """A training with one seed.

    Attributes:
        seed: The seed.
        words: Options of `fit`, without `--ckpt_path`.
        root: Folder that contains the run folder.
    """

    seed: int
    words: tuple[str, ...]
    root: Path

    @property
    def log(self) -> Path:
        """File for everything that the run prints."""
        return self.root / f"seed_{self.seed}.txt"

    @property
    def folder(self) -> Path:
        """The run folder; `root` before the run folder exists."""
        return next((path for path in sorted(self.root.rglob(f"seed_{self.seed}")) if path.is_dir()), self.root)

    @property
    def finished(self) -> bool:
        """Whether the training is finished, e.g. before a restart of the search."""
        try:
            results = json.loads((self.folder / "results.json").read_text())
        except (OSError, json.JSONDecodeError):
            return False
        return bool((results["stage"], results["status"]) == ("fit", "finished"))

    @property
    def fqe_value(self) -> float | None:
        """The value by fitted Q evaluation; None before it."""
        try:
            return float(json.loads((self.folder / "fqe.json").read_text())["value"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def metrics(self) -> Path:
        """The file of the logged metrics."""
        return self.folder / "metrics.csv"

    def values(self, metric: str) -> list[tuple[int, float]]:
        """Return the gradient steps and values at which a metric was logged."""
        try:
            with self.metrics.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row.get(metric)]
            return [(int(float(row["step"])), float(row[metric])) for row in rows]
        except (OSError, ValueError):  # the file does not exist yet, or its last row is incomplete
            return []

    def logged(self) -> list[str]:
        """Return the names of the logged metrics."""
        if not self.metrics.is_file():
            return []
        with self.metrics.open(newline="") as file:
            return sorted(name for name in next(csv.reader(file), []) if name != "step" and name[:5] != "time/")


@dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    Attributes:
        score: Mean over the seeds; None if the trial was pruned or failed.
        pruned: Whether the trial was pruned.
        failure: Why the trial failed, in one line; None if it did not.
        bad_input: Whether `fit` refused the input.
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
    inherited: Sequence[int] = (),
) -> Outcome:
    """Train with each seed, one after another, and return the score.

    Args:
        runs: One per seed.
        objective: The metric.
        max_steps: Gradient steps of each run.
        prune: Called after each evaluation with the gradient steps over all seeds and the running mean: the mean of the
            final scores of earlier seeds and the current score of this one. True prunes the trial.
        inherited: File descriptors that stay open in the runs.
    """
    scores: list[float] = []
    for index, run in enumerate(runs):
        watcher = _Watcher(run, objective, tuple(scores), index * max_steps, prune)
        if not run.finished:
            # `auto` continues a run that ended with an earlier search.
            code, pruned = _run_command(run, ["fit", *run.words, "--ckpt_path=auto"], watcher, inherited)
            if pruned:
                return Outcome(pruned=True)
            if code:
                return Outcome(failure=_reason(code, run.log), bad_input=code == 2)
        if objective.is_fqe and run.fqe_value is None:
            code, _ = _run_command(run, _evaluation(run, objective), lambda: False, inherited)
            if code:
                return Outcome(failure=_reason(code, run.log), bad_input=code == 2)
        score = run.fqe_value if objective.is_fqe else mean_of_last(run.values(objective.metric), objective.last)
        if score is None:
            return Outcome(failure=f"no {objective.metric} was logged; there are {', '.join(run.logged())}")
        if not math.isfinite(score):
            return Outcome(failure=f"{objective.metric} became {score}")
        scores.append(score)
        if watcher() and index < len(runs) - 1:
            return Outcome(pruned=True)
    return Outcome(score=sum(scores) / len(scores))


def mean_of_last(values: Sequence[tuple[int, float]], last: int) -> float | None:
    """Return the mean of the last `last` values, or of all if there are fewer; None if there are none."""
    some = [value for _, value in values[-last:]]
    return sum(some) / len(some) if some else None


@dataclass
class _Watcher:
    """Reports each evaluation in the growing metrics.csv of a run once; returns whether to prune the trial."""

    run: SeedRun
    objective: Objective
    earlier: tuple[float, ...]
    offset: int
    prune: Watch
    reported: int = 0

    def __call__(self) -> bool:
        values = self.run.values(self.objective.metric)
        every = 1 if self.objective.evaluates else self.objective.last
        for count in range(self.reported + every, len(values) + 1, every):
            self.reported = count
            present = mean_of_last(values[:count], self.objective.last)
            assert present is not None
            running = (sum(self.earlier) + present) / (len(self.earlier) + 1)
            if math.isfinite(running) and self.prune(self.offset + values[count - 1][0], running):
                return True
        return False


def _evaluation(run: SeedRun, objective: Objective) -> list[str]:
    """Return the command that writes the run's fqe.json."""
    steps = [] if objective.fqe_steps is None else [f"--steps={objective.fqe_steps}"]
    return ["evaluate", "--method=fqe", f"--ckpt_path={run.folder / 'checkpoints' / 'last.ckpt'}", *steps]


def _run_command(
    run: SeedRun, words: Sequence[str], should_prune: Callable[[], bool], inherited: Sequence[int]
) -> tuple[int, bool]:
    """Run a command of the run, e.g. its training; return its exit code and whether it was pruned."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        process = start(words, log, inherited=inherited, detached=True)
    size, pause = 0, POLL_S
    try:
        while process.poll() is None:
            if run.metrics.is_file() and (now := run.metrics.stat().st_size) != size:
                size, started = now, time.perf_counter()
                if should_prune():
                    stop(process)
                    return process.returncode, True
                pause = max(POLL_S, (time.perf_counter() - started) / READING_SHARE)
            time.sleep(pause)
    finally:
        stop(process)
    return process.returncode, False


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
