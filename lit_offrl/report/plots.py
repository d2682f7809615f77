"""The pictures of a report, without pyplot: they need no display and change no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lit_offrl.report.rows import Comparison, Report, Selection, Task
from lit_offrl.report.statistics import expected_best, intervals_of_means, performance_profile, selection_curve
from lit_offrl.report.tables import BUDGETS

# Okabe and Ito (2008): a palette that color-blind readers can distinguish.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
DATA_COLOR = "0.45"
BAND_ALPHA = 0.18
DPI = 130
THRESHOLDS = 301
CHOICES = 8  # policies to choose from in the curve of policy selection, as in its authors' figures
MOST_MARKERS = 20  # on one curve
MOST_COMPARED = 12  # algorithms with bands and other actors in one picture, or in one of all pairs; the tables have all
MOST_LEGEND_ENTRIES = 4  # for the other actors, e.g. behavior models; above it they share one entry
LEGEND_ROW_INCHES = 0.19


def colors_of(algorithms: Sequence[str]) -> dict[str, str]:
    """Return one color per algorithm, which all pictures of a report share."""
    colors = COLORS if len(algorithms) <= len(COLORS) else [to_hex(colormaps["tab20"](i)) for i in range(20)]
    return {name: colors[i % len(colors)] for i, name in enumerate(algorithms)}


def learning_curves(report: Report, task: Task, colors: Mapping[str, str]) -> Figure | None:
    """Return the scores during training, with means and 95% intervals over seeds; None where no run was evaluated.

    A curve has the gradient steps at which all seeds were evaluated. Of more than `MOST_COMPARED` algorithms only means
    are drawn. Dashed: the dataset's mean. Dotted: the final score of the first other actor of an algorithm, e.g. its
    behavior model.
    """
    figure, axis = titled_figure(task.dataset)
    has_curves = False
    rows = report.rows_of(task)
    is_crowded = len({row.algorithm for row in rows}) > MOST_COMPARED
    others = {row.algorithm: row for row in reversed(rows) if row.actor != "policy" and not is_crowded}
    for i, (algorithm, row) in enumerate(sorted(others.items())):
        label: str | None = row.name
        if len(others) > MOST_LEGEND_ENTRIES:  # one entry for all; the color is the algorithm's
            label = f"dotted: {row.actor}" if i == 0 else None
        axis.axhline(row.summary.mean, color=colors[algorithm], linestyle=":", linewidth=1.4, label=label)
    for row in (each for each in rows if each.actor == "policy"):
        color = colors[row.algorithm]
        curves = [dict(run.evaluations) for run in row.runs]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        if not steps:
            continue
        has_curves = True
        scores = np.array([[curve[step] for curve in curves] for step in steps])
        label = f"{row.name} ({len(curves)} seed{'s' * (len(curves) > 1)})"
        marker = "o" if len(steps) <= MOST_MARKERS else None
        axis.plot(steps, scores.mean(axis=1), color=color, marker=marker, markersize=3.5, label=label)
        if not is_crowded and (band := intervals_of_means(scores)) is not None:
            axis.fill_between(steps, *band, color=color, alpha=BAND_ALPHA, linewidth=0)
    if not has_curves:
        return None
    if (data := report.data_score(task)) is not None:
        axis.axhline(data, color=DATA_COLOR, linestyle="--", linewidth=1.2, label="dataset")
    axis.set(xlabel="gradient steps", ylabel=task.unit)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_major_locator(MaxNLocator(6))
    _legend(figure)
    return figure


def profiles(comparison: Comparison, colors: Mapping[str, str]) -> Figure:
    """Return the performance profiles: the share of runs above each score, with 95% intervals."""
    figure, axis = titled_figure("Performance profiles")
    scores = np.concatenate([task for tasks in comparison.scores.values() for task in tasks])
    margin = 0.03 * max(np.ptp(scores), 1.0)
    thresholds = np.linspace(scores.min() - margin, scores.max() + margin, THRESHOLDS)
    for name, tasks in comparison.scores.items():
        share, band = performance_profile(tasks, thresholds)
        axis.plot(thresholds, share, color=colors[name], drawstyle="steps-post", label=name)
        if band is not None:
            axis.fill_between(
                thresholds, band[0], band[1], color=colors[name], alpha=BAND_ALPHA, linewidth=0, step="post"
            )
    axis.set(xlabel=rf"normalized score $\tau$ ({comparison.scale})", ylabel=r"share of runs with score > $\tau$")
    axis.set(xlim=(thresholds[0], thresholds[-1]), ylim=(-0.02, 1.02))
    _legend(figure)
    return figure


def improvement(comparison: Comparison) -> Figure:
    """Return the probability of improvement for each pair of algorithms, with 95% intervals."""
    pairs = comparison.improvements
    figure, axis = titled_figure("Probability of improvement", height=1.3 + 0.42 * len(pairs))
    axis.plot([probability for _, _, probability, _ in pairs], range(len(pairs)), "o", color=COLORS[0], markersize=6)
    if bands := [(i, *interval) for i, (_, _, _, interval) in enumerate(pairs) if interval is not None]:
        axis.hlines(*zip(*bands, strict=True), color=COLORS[0], linewidth=2.5, alpha=0.5)
    axis.axvline(0.5, color=DATA_COLOR, linestyle="--", linewidth=1.2)
    axis.set_yticks(range(len(pairs)), [f"{x} > {y}" for x, y, _, _ in pairs])
    axis.set(xlim=(-0.02, 1.02), ylim=(len(pairs) - 0.5, -0.5), xlabel="P(a run of the first scores higher)")
    return figure


def policy_selection(selections: Sequence[Selection]) -> Figure:
    """Return the score of the best of some policies over the episodes by which it is chosen, one curve per algorithm.

    The bands hold 95% of the draws. Dashed: the score if the choice was perfect.
    """
    task = selections[0].task
    figure, axis = titled_figure(f"{task.dataset}: choosing a policy")
    for color, each in zip(colors_of([each.algorithm for each in selections]).values(), selections, strict=True):
        k = min(CHOICES, len(each.policies))
        curve, (low, high) = selection_curve(each.policies, k, BUDGETS[-1])
        episodes = np.arange(1, len(curve) + 1)
        axis.plot(episodes, curve, color=color, label=f"{each.algorithm}, best of {k}")
        axis.fill_between(episodes, low, high, color=color, alpha=BAND_ALPHA, linewidth=0)
        axis.axhline(expected_best(each.means, k), color=color, linestyle="--", linewidth=1.2)
    axis.set(xlabel="episodes of online evaluation", ylabel=task.unit, xlim=(0, BUDGETS[-1]))
    _legend(figure)
    return figure


def png(figure: Figure) -> bytes:
    """Return the figure as the content of a PNG file."""
    file = BytesIO()
    # `savefig` would draw twice, once of it to find the layout.
    FigureCanvasAgg(figure).print_png(file)  # type: ignore[no-untyped-call]
    return file.getvalue()


def titled_figure(title: str, height: float = 3.7) -> tuple[Figure, Axes]:
    """Return an empty figure of `height` inches and its axes, in the style of all pictures."""
    figure = Figure(figsize=(6.4, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.set_title(title)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _legend(figure: Figure) -> None:
    """Add a legend below the axes, and make the figure higher by its rows."""
    labels = figure.axes[0].get_legend_handles_labels()[1]
    longest = max(map(len, labels))
    columns = max(1, min(len(labels), 80 // (longest + 8)))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LEGEND_ROW_INCHES * -(-len(labels) // columns))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
