"""Groups runs: rows of one actor on one dataset, and comparisons of algorithms over datasets."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lit_offrl.data.info import ScoreReference
from lit_offrl.data.sources.ogbench import with_task_number
from lit_offrl.envs.protocol import D4RL_RULES, OGBENCH_RULES
from lit_offrl.report.runs import Run, differing_settings, distinguish_runs
from lit_offrl.report.statistics import Array, Interval, Summary, probability_of_improvement

NO_Q = "no_q"  # the ablation of `conf/ablations/no_q.yaml`


@dataclass(frozen=True)
class Task:
    """A dataset with one scale of scores (None: mean returns). Only scores of the same task are comparable."""

    dataset: str
    reference: ScoreReference | None

    @property
    def scale(self) -> str:
        """Name of the scale."""
        return "return" if self.reference is None else self.reference.name

    @property
    def unit(self) -> str:
        """Label of an axis of scores."""
        return "mean return" if self.reference is None else f"normalized score ({self.reference.name})"


@dataclass(frozen=True)
class Row:
    """One actor of one algorithm on one task, with a run per seed.

    Attributes:
        actor: `policy`, another one such as `behavior`, or the name of an ablation: the policy of runs that trained it.
    """

    task: Task
    algorithm: str
    actor: str
    runs: Sequence[Run]

    @property
    def name(self) -> str:
        """Name of the row."""
        if self.is_ablation:
            return f"{self.algorithm} without its Q" if self.actor == NO_Q else f"{self.algorithm} ({self.actor})"
        return self.algorithm if self.actor == "policy" else f"{self.actor} of {self.algorithm}"

    @property
    def is_ablation(self) -> bool:
        """Whether the runs trained an ablation of the algorithm."""
        return self.runs[0].ablation is not None

    @property
    def scored(self) -> str:
        """The actor by its name in the runs."""
        return "policy" if self.is_ablation else self.actor

    @cached_property
    def scores(self) -> Array:
        """Final scores, `[seeds]`."""
        return np.array([run.scores[self.scored].value for run in self.runs])

    @cached_property
    def summary(self) -> Summary:
        """Statistics of the final scores over seeds."""
        return Summary.of(self.scores.tolist())

    @property
    def unfinished(self) -> int:
        """Number of unfinished runs."""
        return sum(not run.finished for run in self.runs)

    @property
    def steps(self) -> list[int | None]:
        """Gradient steps of the checkpoint that was scored, per run."""
        return [run.step for run in self.runs]

    @property
    def episodes(self) -> list[int | None]:
        """Number of episodes of the final score, per run."""
        return [run.scores[self.scored].episodes for run in self.runs]

    def mean_time(self, name: str) -> float | None:
        """Return the mean over the runs that have this entry of results.json's `time`; None where none has."""
        values = [value for run in self.runs if (value := run.time.get(name)) is not None]
        return float(np.mean(values)) if values else None

    def mean_of_last(self, k: int) -> float | None:
        """Return the mean over seeds and over the last k evaluations; None where a run has fewer."""
        if self.scored != "policy" or any(len(run.evaluations) < k for run in self.runs):
            return None
        return float(np.mean([[score for _, score in run.evaluations[-k:]] for run in self.runs]))

    @property
    def best(self) -> float | None:
        """Mean over seeds of each run's best evaluation. It is too high: the maximum selects lucky evaluations."""
        if self.scored != "policy" or not all(run.evaluations for run in self.runs):
            return None
        return float(np.mean([max(score for _, score in run.evaluations) for run in self.runs]))


@dataclass(frozen=True)
class Comparison:
    """Scores of several algorithms on the tasks of one scale that all of them share.

    Attributes:
        scale: Name of the scale.
        scores: One array of scores per shared task, by algorithm.
        tasks: The shared tasks.
        left_out: Tasks without runs of some algorithm.
    """

    scale: str
    scores: dict[str, list[Array]]
    tasks: Sequence[Task]
    left_out: Sequence[Task]

    @cached_property
    def improvements(self) -> list[tuple[str, str, float, Interval | None]]:
        """(x, y, P(x > y), its interval) for each pair of algorithms, where P(x > y) is at least 1/2."""
        pairs = []
        for x, y in combinations(self.scores, 2):
            probability, interval = probability_of_improvement(self.scores[x], self.scores[y])
            if probability < 0.5:  # a tie counts half to both
                x, y, probability = y, x, 1 - probability
                interval = None if interval is None else (1 - interval[1], 1 - interval[0])
            pairs.append((x, y, probability, interval))
        return pairs


@dataclass(frozen=True)
class Selection:
    """The policies of several configurations of one algorithm on one task, from which a user would choose.

    Attributes:
        configurations: Number of configurations.
        policies: Scores of the episodes of each run's last evaluation during training.
    """

    task: Task
    algorithm: str
    configurations: int
    policies: Sequence[Array]

    @property
    def means(self) -> Array:
        """Scores of the policies, `[policies]`."""
        return np.array([each.mean() for each in self.policies])


RULES = {"d4rl": D4RL_RULES, "ogbench": OGBENCH_RULES}  # of each benchmark with published scores

# Algorithms that papers print under another name. Not IDQL-A, whose settings were tuned for each task.
NAMES_HERE = {"TD3+BC": "td3bc", "Diffusion-QL": "dql", "DT": "decisiontransformer"}


@dataclass(frozen=True)
class PublishedFigure:
    """A score that a paper prints, on the scale of D4RL or OGBench. The notes of published.json list what is left out.

    Attributes:
        paper: Name of the paper's own algorithm.
        algorithm: Name of the algorithm, as printed.
        dataset: Id of the dataset.
        spread: The number after the ±; None where none is printed.
        spread_kind: `standard error` or `standard deviation`.
    """

    paper: str
    table: str
    algorithm: str
    dataset: str
    mean: float
    spread: float | None
    spread_kind: str | None
    arxiv: str

    @property
    def name(self) -> str:
        """Name of the algorithm in this package, in small letters, as in reports."""
        return NAMES_HERE.get(self.algorithm, self.algorithm.lower())


class Report:
    """The content of a report.

    Args:
        runs: Runs to report.
        last: Number of evaluations in the mean over the last evaluations.
        best: Whether to show the best evaluation.
        notes: Notes for the reader; notes on the rows are added.

    Attributes:
        rows: All rows, sorted by scale, dataset and algorithm, the policy before other actors.
        tasks: The tasks of the rows, in the same order.
        bandits: Runs on 2-D bandits, which have measures instead of scores.
    """

    def __init__(self, runs: Sequence[Run], last: int = 5, best: bool = False, notes: Sequence[str] = ()) -> None:
        self.last, self.best = last, best
        runs = distinguish_runs(runs)
        self.bandits = [run for run in runs if run.bandit]
        grouped: dict[tuple[Task, str, str], list[Run]] = defaultdict(list)
        for run in runs:
            for actor in () if run.bandit else run.scores:
                if run.ablation is None or actor == "policy":
                    grouped[Task(run.dataset, run.reference), run.algorithm, run.ablation or actor].append(run)
        self.rows = sorted(
            (Row(*key, runs=each) for key, each in grouped.items()),
            key=lambda row: (row.task.scale, row.task.dataset, row.algorithm, row.actor != "policy", row.actor),
        )
        self._rows_by_task: dict[Task, list[Row]] = defaultdict(list)
        for row in self.rows:
            self._rows_by_task[row.task].append(row)
        self.tasks = list(self._rows_by_task)
        self.notes = [*notes, *self._notes([run for run in runs if not run.bandit and "policy" not in run.scores])]

    def rows_of(self, task: Task) -> list[Row]:
        """Return the rows of a task."""
        return self._rows_by_task[task]

    @property
    def policies(self) -> list[Row]:
        """Rows of the algorithms' own policies."""
        return [row for row in self.rows if row.actor == "policy"]

    @cached_property
    def selections(self) -> list[Selection]:
        """One for each algorithm with several rows on a task, e.g. the labels of a grid or the trials of a search."""
        grouped: dict[tuple[Task, str], list[Row]] = defaultdict(list)
        for row in self.policies:
            if any(run.episodes for run in row.runs):
                grouped[row.task, row.runs[0].algorithm_id].append(row)
        return [
            Selection(*key, len(rows), [np.array(run.episodes) for row in rows for run in row.runs if run.episodes])
            for key, rows in grouped.items()
            if len(rows) > 1
        ]

    def selections_of(self, task: Task) -> list[Selection]:
        """Return the selections of a task."""
        return [each for each in self.selections if each.task == task]

    @property
    def algorithms(self) -> list[str]:
        """Names of all algorithms with a score."""
        return sorted({row.algorithm for row in self.rows})

    def data_score(self, task: Task) -> float | None:
        """Return the dataset's mean on the task's scale; None where no run gives it."""
        return next((r.data_score for row in self.rows_of(task) for r in row.runs if r.data_score is not None), None)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """One comparison for each scale of normalized scores with several rows."""
        comparisons = []
        for scale in dict.fromkeys(task.scale for task in self.tasks if task.reference is not None):
            scores = {(row.task, row.algorithm): row.scores for row in self.policies if row.task.scale == scale}
            tasks = list(dict.fromkeys(task for task, _ in scores))
            algorithms = sorted({algorithm for _, algorithm in scores})
            shared = [task for task in tasks if all((task, algorithm) in scores for algorithm in algorithms)]
            if len(scores) > 1:
                by_algorithm = {name: [scores[task, name] for task in shared] for name in algorithms}
                left_out = [task for task in tasks if task not in shared]
                comparisons.append(Comparison(scale, by_algorithm, shared, left_out))
        return comparisons

    @cached_property
    def published(self) -> dict[Task, list[PublishedFigure]]:
        """Published figures by task: only for the benchmark's own file of the same id, played by its own rules."""
        content: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text())
        originals = {
            row.task: with_task_number(row.runs[0].dataset_id)
            for row in self.rows
            if all(run.source == row.task.scale and run.rules == RULES.get(row.task.scale) for run in row.runs)
        }
        figures: dict[Task, list[PublishedFigure]] = {task: [] for task in self.tasks}
        for task in self.tasks:
            for each in content["figures"]:
                if with_task_number(each["dataset"]) == originals.get(task):
                    figures[task].append(PublishedFigure(**each, arxiv=content["papers"][each["paper"]]["arxiv"]))
        return figures

    def _notes(self, scoreless: Sequence[Run]) -> list[str]:
        notes = []
        if scoreless:
            more = f" and {len(scoreless) - 3} more" if len(scoreless) > 3 else ""
            notes.append(f"Without a score: {', '.join(str(run.path) for run in scoreless[:3])}{more}.")
        for row in self.policies:
            name = f"{row.algorithm} on {row.task.dataset}"
            if early := [run for run in row.runs if run.step is not None and run.step < run.trained_until]:
                where = ", ".join(f"seed {run.seed} at {run.step:,} of {run.trained_until:,}" for run in early)
                notes.append(f"{name}: the scored checkpoint is not the last one ({where} gradient steps).")
            elif len(set(row.steps)) > 1:
                notes.append(f"{name}: the seeds were scored after different numbers of gradient steps.")
            elif settings := differing_settings(row.runs):
                notes.append(f"{name}: the seeds differ in their config.yaml: {', '.join(settings)}.")
        if short := [row for row in self.policies if row.mean_of_last(self.last) is None]:
            fewest = min(len(run.evaluations) for row in short for run in row.runs)
            hint = f"; --last {fewest} averages what all have" if fewest > 1 else ""
            where = f"{len(short)} of {len(self.policies)} rows"
            notes.append(f"last {self.last} is empty in {where}, where a run has fewer evaluations{hint}.")
        notes += [
            f"Over datasets ({each.scale}): the number of seeds differs; a dataset with more weighs more in the IQM."
            for each in self.comparisons
            if any(len({len(task) for task in tasks}) > 1 for tasks in each.scores.values())
        ]
        return notes
