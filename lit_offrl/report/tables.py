"""The tables of a report, as text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_offrl.report.rows import Comparison, PublishedFigure, Report, Row, Task
from lit_offrl.report.runs import Run
from lit_offrl.report.statistics import Interval, bootstrap_interval, interquartile_mean

BANDIT_MEASURES = ("mean_label", "target_mean_label", "energy_distance", "off_mode_fraction")
MOST_ALGORITHMS = 6  # as columns; more of them make rows


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        columns: Heads of the columns.
        rows: Cells.
        caption: What it shows.
        text_columns: Number of leading columns of words; the others hold numbers.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    text_columns: int = 1


def overview(report: Report) -> Table:
    """Final scores of every algorithm on every dataset, as papers print it, with their own figures beside."""
    cells = {(row.task, row.algorithm): row for row in report.policies}
    published = {
        (task, figure.algorithm.lower()): figure
        for task, figures in report.published.items()
        for figure in figures
        if figure.algorithm == figure.paper
    }
    caption = "Final scores, mean ± standard deviation over seeds."
    columns = [["dataset", *(task.dataset for task in report.tasks)], ["score", *(t.scale for t in report.tasks)]]
    for name in report.algorithms:
        ours = [cells.get((task, name)) for task in report.tasks]
        columns.append([name, *("" if row is None else _mean(row) + "*" * bool(row.unfinished) for row in ours)])
        theirs = [published.get((task, name)) for task in report.tasks]
        if first := next(filter(None, theirs), None):
            columns.append([f"{name}, published", *("" if each is None else _published(each) for each in theirs)])
            caption += f" {name}, published: as printed in arXiv {first.arxiv}, ± {first.spread_kind}."
    columns.append(["dataset's mean", *(_number(report.data_score(t), _digits(report.of(t))) for t in report.tasks)])
    across = len(columns) - 3 <= max(MOST_ALGORITHMS, len(report.tasks))
    grid = list(zip(*columns, strict=True)) if across else columns
    caption += " *: with unfinished runs." if any(row.unfinished for row in report.rows) else ""
    return Table(grid[0], grid[1:], caption, text_columns=2 if across else 1)


def details(report: Report, task: Task) -> Table:
    """All statistics of one dataset: each algorithm, actors evaluated beside it, and the dataset itself."""
    rows = report.of(task)
    digits = _digits(rows)
    columns = ["", "mean ± SD", "SE", "IQM [95%]", f"last {report.last}", *["best (optimistic)"] * report.best]
    lines = [
        [
            row.name,
            _mean(row),
            _number(row.summary.standard_error, digits),
            _number(row.summary.iqm, digits) + _bounds(row.summary.interval, digits) if row.summary.seeds > 1 else "",
            _number(row.last(report.last), digits),
            *[_number(row.best, digits)] * report.best,
            f"{row.summary.seeds}" + (f" ({row.unfinished} unfinished)" if row.unfinished else ""),
            _range(row.episodes),
            _range(row.steps),
        ]
        for row in rows
    ]
    if (data := report.data_score(task)) is not None:
        lines.append(["dataset", _number(data, digits), *[""] * (len(columns) + 1)])
    if task.reference is None:
        caption = "Mean return of an episode; no reference is known, so there is no normalized score."
    else:
        low, high = task.reference.minimum, task.reference.maximum
        caption = f"Normalized score, reference {task.scale}: a return of {low:g} scores 0, of {high:g} scores 100."
    return Table([*columns, "seeds", "episodes", "steps"], lines, caption)


def published_lines(figures: Sequence[PublishedFigure]) -> list[str]:
    """Return one line for each table of a paper."""
    tables: dict[tuple[str, str], list[PublishedFigure]] = defaultdict(list)
    for figure in figures:
        tables[figure.arxiv, figure.table].append(figure)
    return [
        f"Published in arXiv {arxiv}, {table}"
        + "".join(f" (± {kind})" for kind in sorted({each.spread_kind for each in found if each.spread_kind}))
        + f": {', '.join(f'{each.algorithm} {_published(each)}' for each in found)}."
        for (arxiv, table), found in tables.items()
    ]


def aggregates(comparison: Comparison) -> Table:
    """Each algorithm over all shared datasets."""
    lines = []
    for name, tasks in comparison.scores.items():
        iqm = float(interquartile_mean(np.concatenate(tasks)))
        interval = bootstrap_interval(tasks, interquartile_mean)
        mean = float(np.mean([task.mean() for task in tasks]))
        lines.append([name, f"{iqm:.1f}{_bounds(interval, 1)}", f"{mean:.1f}", _range([len(task) for task in tasks])])
    shared = ", ".join(task.dataset for task in comparison.tasks)
    return Table(["", "IQM [95%]", "mean", "seeds"], lines, f"Over {shared} (reference {comparison.scale}).")


def improvement_table(comparison: Comparison) -> Table:
    """P(x > y) for each pair of algorithms."""
    lines = [[f"{x} > {y}", f"{p:.2f}{_bounds(interval, 2)}"] for x, y, p, interval in comparison.improvements]
    return Table(["", "P [95%]"], lines, "Probability that a run of the first scores higher than one of the second.")


def bandits(runs: Sequence[Run]) -> Table:
    """The measures of runs on 2-D bandits, with the actors evaluated beside the policy."""
    grouped: dict[tuple[str, float, str, bool, str], list[Run]] = defaultdict(list)
    for run in runs:
        for actor in run.bandit:
            grouped[run.dataset, run.beta or 0.0, run.algorithm, actor != "policy", actor].append(run)
    lines = []
    for (dataset, beta, algorithm, beside, actor), each in sorted(grouped.items(), key=lambda item: item[0]):
        label, exact, distance, off_mode = ([run.bandit[actor].get(m) for run in each] for m in BANDIT_MEASURES)
        name = f"{actor} of {algorithm}" if beside else algorithm
        measures = [
            _measure(label, ".3f"),
            _measure(exact[:1], ".3f"),
            _measure(distance, ".3f"),
            _measure(off_mode, ".1%"),
        ]
        seeds = f"{len(each)}" + "*" * any(not run.finished for run in each)
        lines.append([dataset, name, f"{beta:.4g}", *measures, seeds, _range([run.step for run in each])])
    heads = ["dataset", "", "beta", "mean label", "exact", "energy distance", "off-mode", "seeds", "steps"]
    caption = "Means ± standard deviations over seeds. exact: mean label of the target q(x) exp(beta label(x))."
    caption += " *: with unfinished runs." if any(not run.finished for run in runs) else ""
    return Table(heads, lines, caption, text_columns=2)


def flat_rows(report: Report) -> list[dict[str, Any]]:
    """Return what CSV holds, with all digits: one row per actor on a dataset, published figure, and bandit run."""
    flat: list[dict[str, Any]] = []
    for row in report.rows:
        summary = row.summary
        low, high = summary.interval or (None, None)
        flat.append(
            {
                **{
                    "dataset": row.task.dataset,
                    "score": row.task.scale,
                    "algorithm": row.algorithm,
                    "actor": row.actor,
                },
                **{"mean": summary.mean, "std": summary.std, "standard_error": summary.standard_error},
                **{"iqm": summary.iqm if summary.seeds > 1 else None, "iqm_low": low, "iqm_high": high},
                f"last_{report.last}": row.last(report.last),
                **({"best_optimistic": row.best} if report.best else {}),
                **{"seeds": summary.seeds, "unfinished": row.unfinished},
                "episodes_total": sum(filter(None, row.episodes)) if all(row.episodes) else None,
                **dict(zip(("steps_min", "steps_max"), _span(row.steps) or (None, None), strict=True)),
                "dataset_mean": report.data_score(row.task),
            }
        )
    for task, figures in report.published.items():
        for figure in figures:
            source = f"arXiv {figure.arxiv}, {figure.table}"
            flat.append({"dataset": task.dataset, "score": task.scale, "algorithm": figure.algorithm, "source": source})
            flat[-1] |= {"mean": figure.mean}
            if figure.spread_kind is not None:
                flat[-1][{"standard deviation": "std"}.get(figure.spread_kind, "standard_error")] = figure.spread
    for run in report.bandits:
        for actor, measures in run.bandit.items():
            named = {"dataset": run.dataset, "algorithm": run.algorithm, "actor": actor, "seed": run.seed}
            flat.append(
                named | {"beta": run.beta, "steps_max": run.step} | {m: measures.get(m) for m in BANDIT_MEASURES}
            )
    return flat


# ---------------------------------------------------------------- cells


def _digits(rows: Sequence[Row]) -> int:
    """Return the decimals: 1 of normalized scores, and of returns as many as leave about four digits."""
    largest = max(abs(row.summary.mean) for row in rows)
    return 1 if rows[0].task.reference is not None else 3 if largest < 10 else 1 if largest < 1000 else 0


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _bounds(interval: Interval | None, digits: int) -> str:
    return "" if interval is None else f" [{interval[0]:,.{digits}f}, {interval[1]:,.{digits}f}]"


def _mean(row: Row) -> str:
    digits, std = _digits([row]), row.summary.std
    return _number(row.summary.mean, digits) + (" (1 seed)" if std is None else f" ± {_number(std, digits)}")


def _published(figure: PublishedFigure) -> str:
    return f"{figure.mean:.1f}" + ("" if figure.spread is None else f" ± {figure.spread:.1f}")


def _measure(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return ""
    return f"{np.mean(known):{form}}" + (f" ± {np.std(known, ddof=1):{form}}" if len(known) > 1 else "")


def _span(values: Sequence[int | None]) -> tuple[int, int] | None:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known and len(known) == len(values) else None


def _range(values: Sequence[int | None]) -> str:
    span = _span(values)
    return "" if span is None else f"{span[0]:,}" if span[0] == span[1] else f"{span[0]:,} to {span[1]:,}"
