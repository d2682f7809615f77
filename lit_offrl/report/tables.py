"""The tables of a report; cells are text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_offrl.report.rows import NO_Q, Comparison, PublishedFigure, Report, Row, Selection, Task
from lit_offrl.report.runs import Run
from lit_offrl.report.statistics import (
    SELECTIONS,
    Interval,
    bootstrap_interval,
    expected_best,
    interquartile_mean,
    selection_curve,
)

UNFINISHED = " *: with unfinished runs."
BANDIT_MEASURES = ("mean_label", "target_mean_label", "energy_distance", "off_mode_fraction")
BUDGETS = (10, 50, 200)  # episodes; the last is the authors' longest
MOST_COLUMNS = 6  # of algorithms; with more of them than of datasets, algorithms are rows


@dataclass(frozen=True)
class Table:
    """A table: headers, cells, and a caption below. The first `text_columns` columns hold words, the others numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    text_columns: int = 1


def overview(report: Report) -> Table:
    """Return the final scores of every algorithm on every dataset, and the published ones of the same algorithms."""
    rows = {(row.task, row.algorithm): row for row in report.policies}
    published: dict[tuple[Task, str], PublishedFigure] = {}
    for task, printed in report.published.items():
        for figure in sorted(printed, key=lambda each: each.algorithm != each.paper):  # a method's own paper first
            published.setdefault((task, figure.name), figure)
    caption = "Final scores, mean ± standard deviation over seeds."
    tasks = report.tasks
    columns = [["dataset", *(task.dataset for task in tasks)], ["score", *(task.scale for task in tasks)]]
    for name in report.algorithms:
        ours = [rows.get((task, name)) for task in tasks]
        columns.append([name, *("" if row is None else _mean(row) + "*" * bool(row.unfinished) for row in ours)])
        figures = [published.get((task, name)) for task in tasks]
        if known := [each for each in figures if each is not None]:
            columns.append([f"{name}, published", *("" if each is None else _published(each) for each in figures)])
            papers = " and ".join(dict.fromkeys(each.arxiv for each in known))
            spreads = " or ".join(dict.fromkeys(each.spread_kind for each in known if each.spread_kind))
            caption += f" {name}, published: as printed in arXiv {papers}" + (f", ± {spreads}." if spreads else ".")
    columns.append(["dataset's mean", *(_number(report.data_score(t), _digits(report.rows_of(t))) for t in tasks)])
    caption += UNFINISHED if any(row.unfinished for row in report.rows) else ""
    if len(columns) - 3 <= max(MOST_COLUMNS, len(tasks)):
        header, *lines = zip(*columns, strict=True)
        return Table(header, lines, caption, text_columns=2)
    return Table(columns[0], columns[1:], caption)


def controls(report: Report) -> Table | None:
    """Return each policy beside what it is to beat; None where no run gives anything but the dataset's mean."""
    names = {NO_Q: "without its Q", "behavior": "behavior model"}
    others = {row.actor for row in report.rows if row.actor.startswith("behavior_best_of_")}
    names |= {name: f"behavior, {name.removeprefix('behavior_').replace('_', ' ')}" for name in sorted(others)}
    rows = {(row.task, row.algorithm, row.actor): row for row in report.rows}
    shown = [name for name in names if any(actor == name for _, _, actor in rows)]
    if not shown:
        return None
    lines = []
    for row in report.policies:
        cells = [rows.get((row.task, row.algorithm, name)) for name in shown]
        if any(cells):
            data = _number(report.data_score(row.task), _digits([row]))
            beside = ["" if cell is None else _mean(cell) for cell in cells]
            lines.append([row.task.dataset, row.algorithm, _mean(row), *beside, data])
    caption = (
        "Each policy beside its controls: the same policy trained and chosen without its Q (--ablation no_q), the "
        "behavior model of the same runs, the best of several of its actions by the policy's Q, and the dataset's mean."
    )
    columns = ["dataset", "", "policy", *(names[name] for name in shown), "dataset's mean"]
    return Table(columns, lines, caption, text_columns=2)


def details(report: Report, task: Task) -> Table:
    """Return all statistics on one task, of every actor of every algorithm and of the dataset."""
    rows = report.rows_of(task)
    digits = _digits(rows)
    columns = ["", "mean ± SD", "SE", "IQM [95%]", f"last {report.last}", *["best (optimistic)"] * report.best]
    lines = [
        [
            row.name,
            _mean(row),
            _number(row.summary.standard_error, digits),
            _number(row.summary.iqm, digits) + _bounds(row.summary.interval, digits) if row.summary.seeds > 1 else "",
            _number(row.mean_of_last(report.last), digits),
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
        what = "success rate" if task.reference.measure == "success" else "return"
        caption = f"Normalized score, reference {task.scale}: a {what} of {low:g} scores 0, of {high:g} scores 100."
    return Table([*columns, "seeds", "episodes", "steps"], lines, caption)


def costs(report: Report, task: Task) -> Table | None:
    """Return what training and acting took, by algorithm; None where no run says so."""
    lines = []
    for row in report.rows_of(task):
        if row.actor != "policy" or row.mean_time("train_s_per_1k_steps") is None:
            continue
        hours = ((row.mean_time("train_s") or 0.0) + (row.mean_time("eval_s") or 0.0)) / 3600
        milliseconds = row.mean_time("act_ms"), row.mean_time("act_ms_p99")
        figures = (row.mean_time("train_s_per_1k_steps"), hours, *milliseconds)
        devices = ", ".join(sorted({run.device for run in row.runs if run.device}))
        lines.append([row.algorithm, *("" if each is None else f"{each:.3g}" for each in figures), devices])
    caption = (
        "Wall time: of 1,000 gradient steps; of the run with its evaluations; and of one action at one state, median "
        "and 99th percentile. Compare runs of an otherwise idle machine only."
    )
    columns = ["", "s per 1,000 steps", "hours", "action ms", "99%", "device"]
    return Table(columns, lines, caption) if lines else None


def selection_table(selections: Sequence[Selection]) -> Table:
    """Return the score of the best of k policies by online evaluation, for some k and some budgets of episodes."""
    lines = []
    for each in selections:
        n = len(each.policies)
        for k in sorted({*(2**i for i in range(n.bit_length())), n}):
            curve, _ = selection_curve(each.policies, k, BUDGETS[-1])
            scores = [curve[budget - 1] for budget in BUDGETS] + [expected_best(each.means, k)]
            digits = 1 if each.task.reference is not None else 3
            lines.append([each.algorithm, f"{k} of {n}", *(_number(float(score), digits) for score in scores)])
    caption = (
        "What tuning costs: the expected score of the best of k policies (configurations with their seeds), chosen by "
        f"so many episodes in the environment in all, over {SELECTIONS:,} draws of policies and of episodes of their "
        "last evaluations (Jackson et al. 2025, arXiv 2504.11453). k of them take k trainings; 1 is an untuned run. "
        "perfect: chosen by the scores themselves, the optimistic figure of a search."
    )
    return Table(["", "k", *(f"{each} episodes" for each in BUDGETS), "perfect"], lines, caption, text_columns=2)


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
    """Return the statistics of each algorithm over all shared datasets."""
    lines = []
    for name, tasks in comparison.scores.items():
        iqm = float(interquartile_mean(np.concatenate(tasks)))
        interval = bootstrap_interval(tasks, interquartile_mean)
        mean = float(np.mean([task.mean() for task in tasks]))
        lines.append([name, f"{iqm:.1f}{_bounds(interval, 1)}", f"{mean:.1f}", _range([len(task) for task in tasks])])
    shared = ", ".join(task.dataset for task in comparison.tasks)
    return Table(["", "IQM [95%]", "mean", "seeds"], lines, f"Over {shared} (reference {comparison.scale}).")


def improvement_table(comparison: Comparison) -> Table:
    """Return P(x > y) for each pair of algorithms."""
    lines = [[f"{x} > {y}", f"{p:.2f}{_bounds(interval, 2)}"] for x, y, p, interval in comparison.improvements]
    return Table(["", "P [95%]"], lines, "Probability that a run of the first scores higher than one of the second.")


def bandits(runs: Sequence[Run]) -> Table:
    """Return the measures of runs on 2-D bandits, of every actor of every algorithm."""
    grouped: dict[tuple[str, float, str, bool, str], list[Run]] = defaultdict(list)
    for run in runs:
        for actor in run.bandit:
            algorithm = f"{run.algorithm} ({run.ablation})" if run.ablation else run.algorithm
            grouped[run.dataset, run.beta or 0.0, algorithm, actor != "policy", actor].append(run)
    lines = []
    for (dataset, beta, algorithm, is_other, actor), each in sorted(grouped.items(), key=lambda item: item[0]):
        label, exact, distance, off_mode = ([run.bandit[actor].get(m) for run in each] for m in BANDIT_MEASURES)
        name = f"{actor} of {algorithm}" if is_other else algorithm
        measures = [_measure(values, ".3f") for values in (label, exact[:1], distance)] + [_measure(off_mode, ".1%")]
        seeds = f"{len(each)}" + "*" * any(not run.finished for run in each)
        lines.append([dataset, name, f"{beta:.4g}", *measures, seeds, _range([run.step for run in each])])
    header = ["dataset", "", "beta", "mean label", "exact", "energy distance", "off-mode", "seeds", "steps"]
    caption = "Means ± standard deviations over seeds. exact: mean label of the target q(x) exp(beta label(x))."
    caption += UNFINISHED if any(not run.finished for run in runs) else ""
    return Table(header, lines, caption, text_columns=2)


def flat_rows(report: Report) -> list[dict[str, Any]]:
    """Return the rows of the CSV file, with all digits: actors on datasets, published figures, and bandit runs."""
    flat: list[dict[str, Any]] = []
    values: dict[str, Any]
    for row in report.rows:
        summary = row.summary
        values = {"dataset": row.task.dataset, "score": row.task.scale, "algorithm": row.algorithm, "actor": row.actor}
        values |= {"mean": summary.mean, "std": summary.std, "standard_error": summary.standard_error}
        values["iqm"] = summary.iqm if summary.seeds > 1 else None
        values["iqm_low"], values["iqm_high"] = summary.interval or (None, None)
        values[f"last_{report.last}"] = row.mean_of_last(report.last)
        if report.best:
            values["best_optimistic"] = row.best
        values |= {"seeds": summary.seeds, "unfinished": row.unfinished}
        values["episodes_total"] = sum(filter(None, row.episodes)) if all(row.episodes) else None
        values["steps_min"], values["steps_max"] = _span(row.steps) or (None, None)
        values["dataset_mean"] = report.data_score(row.task)
        flat.append(values)
    for task, figures in report.published.items():
        for figure in figures:
            values = {"dataset": task.dataset, "score": task.scale, "algorithm": figure.algorithm}
            values |= {"source": f"arXiv {figure.arxiv}, {figure.table}", "mean": figure.mean}
            if figure.spread_kind is not None:
                values["std" if figure.spread_kind == "standard deviation" else "standard_error"] = figure.spread
            flat.append(values)
    for run in report.bandits:
        for actor, measures in run.bandit.items():
            values = {"dataset": run.dataset, "algorithm": run.algorithm, "actor": actor, "seed": run.seed}
            values |= {"beta": run.beta, "steps_max": run.step}
            flat.append(values | {name: measures.get(name) for name in BANDIT_MEASURES})
    return flat


# ---------------------------------------------------------------- cells


def _digits(rows: Sequence[Row]) -> int:
    """Return the number of decimals: 1 for normalized scores; for returns about four digits in all."""
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


def _measure(values: Sequence[float | None], format_spec: str) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return ""
    return f"{np.mean(known):{format_spec}}" + (f" ± {np.std(known, ddof=1):{format_spec}}" if len(known) > 1 else "")


def _span(values: Sequence[int | None]) -> tuple[int, int] | None:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known and len(known) == len(values) else None


def _range(values: Sequence[int | None]) -> str:
    span = _span(values)
    return "" if span is None else f"{span[0]:,}" if span[0] == span[1] else f"{span[0]:,} to {span[1]:,}"
