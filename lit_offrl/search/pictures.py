"""The pictures of a search: the scores of its trials, and the importance of its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lit_offrl.report.plots import COLORS, DATA_COLOR, DPI, titled_figure
from lit_offrl.search.space import short_names

FEWEST_FOR_IMPORTANCES = 4  # complete trials; with fewer, importances are noise
COLUMNS = 3
PANEL_INCHES = (3.0, 2.6)
MARGIN = 0.06  # on both sides of a range, as a share of it
PRUNED_COLOR = COLORS[1]


def pictures(study: optuna.Study, metric: str) -> dict[str, Figure]:
    """Return the figures for which the study has enough trials, by file name."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        return {}
    figures = {"history.png": history_figure(study, metric)}
    if importances := parameter_importances(study):
        figures["importances.png"] = importances_figure(importances, metric, len(complete))
    pruned = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    figures["parameters.png"] = parameters_figure(complete, pruned, metric, list(importances))
    return figures


def history_figure(study: optuna.Study, metric: str) -> Figure:
    """Return the scores of the trials over their numbers, and the best score so far; at least one trial is complete."""
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED and trial.value is not None]
    failed = [trial.number for trial in trials if trial.state == TrialState.FAIL]
    figure, axis = titled_figure(f"Search {study.study_name}: {len(complete)} complete trials, {len(pruned)} pruned")
    numbers, scores = _numbers(complete), _values(complete)
    best = list(accumulate(scores, max if study.direction == StudyDirection.MAXIMIZE else min))
    last = trials[-1].number
    axis.plot([*numbers, last], [*best, best[-1]], color=COLORS[0], drawstyle="steps-post", label="best so far")
    axis.plot(numbers, scores, "o", color=COLORS[0], alpha=0.55, label="complete")
    if pruned:
        label = "pruned, with the score at that step"
        axis.plot(_numbers(pruned), _values(pruned), "v", color=PRUNED_COLOR, mfc="none", label=label)
    if failed:
        bottom = axis.get_xaxis_transform()
        axis.plot(failed, [0.02] * len(failed), "x", color=DATA_COLOR, transform=bottom, label="failed or stopped")
    first = next((trial for trial in complete if trial.user_attrs.get("own_values")), None)
    if first is not None and first.value is not None:
        axis.axhline(first.value, color=DATA_COLOR, linestyle="--", linewidth=1.2, label="values of the config")
    axis.set(xlabel="trial", ylabel=metric)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def parameter_importances(study: optuna.Study) -> dict[str, float]:
    """Return the importance of each parameter for a score in the better half of the trials, sorted, with sum 1.

    The method is PED-ANOVA (Watanabe et al., 2023). The result is empty if there are too few complete trials, or if all
    have the same score.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < FEWEST_FOR_IMPORTANCES or len({trial.value for trial in complete}) < 2:
        return {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=0.5, region_quantile=1.0)
    importances = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return dict(importances) if all(map(math.isfinite, importances.values())) else {}


def importances_figure(importances: Mapping[str, float], metric: str, trials: int) -> Figure:
    """Return the importances as horizontal bars."""
    title = f"Importance for {metric} ({trials} complete trials)"
    figure, axis = titled_figure(title, height=1.4 + 0.42 * len(importances))
    names = short_names(list(importances))
    shares = list(importances.values())
    bars = axis.barh(range(len(shares)), shares, color=COLORS[0], height=0.6, tick_label=list(names.values()))
    axis.bar_label(bars, labels=[f"{share:.0%}" for share in shares], padding=3)
    axis.set(xlim=(0, 1.12 * max(shares)), xlabel="importance (PED-ANOVA; the sum is 1)")
    axis.invert_yaxis()
    return figure


def parameters_figure(
    complete: Sequence[FrozenTrial], pruned: Sequence[FrozenTrial], metric: str, order: Sequence[str]
) -> Figure:
    """Return the scores over the values of each parameter; the parameters of `order` come first."""
    keys = [*order, *sorted({key for trial in complete for key in trial.params} - set(order))]
    pruned = [trial for trial in pruned if trial.value is not None]
    names = short_names(keys)
    rows, columns = -(-len(keys) // COLUMNS), min(len(keys), COLUMNS)
    figure = Figure(figsize=(columns * PANEL_INCHES[0] + 0.6, rows * PANEL_INCHES[1]), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for key, axis in zip(keys, axes.flat, strict=False):
        distribution = complete[0].distributions[key]
        if isinstance(distribution, CategoricalDistribution):
            choices = [str(choice) for choice in distribution.choices]
            axis.set_xticks(range(len(choices)), choices, rotation=30 if max(map(len, choices)) > 4 else 0)
            axis.set_xlim(-0.5, len(choices) - 0.5)
        else:
            _show_range(axis, distribution)
        # The internal representation of a choice is its number.
        values, pruned_values = (
            [distribution.to_internal_repr(trial.params[key]) for trial in trials] for trials in (complete, pruned)
        )
        axis.scatter(pruned_values, _values(pruned), s=22, marker="v", edgecolors=PRUNED_COLOR, facecolors="none")
        axis.scatter(values, _values(complete), s=22, c=_numbers(complete), cmap="viridis")
        axis.set_xlabel(names[key])
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supylabel(metric, fontsize="medium")
    triangles = "; triangles: pruned trials, with the score at that step" if pruned else ""
    figure.suptitle(f"Dots: complete trials, darker is earlier{triangles}", fontsize="medium")
    return figure


def _show_range(axis: Axes, distribution: BaseDistribution) -> None:
    """Set the limits of an axis to the range of a parameter, with ticks at both ends and in the middle."""
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    low, high = distribution.low, distribution.high
    middle = math.sqrt(low * high) if distribution.log else (low + high) / 2
    if distribution.log:
        axis.set_xscale("log")
        axis.set_xlim(low / (high / low) ** MARGIN, high * (high / low) ** MARGIN)
    else:
        axis.set_xlim(low - MARGIN * (high - low), high + MARGIN * (high - low))
    axis.set_xticks([low, middle, high], [f"{value:.3g}" for value in (low, middle, high)])
    axis.minorticks_off()


def _numbers(trials: Sequence[FrozenTrial]) -> list[int]:
    return [trial.number for trial in trials]


def _values(trials: Sequence[FrozenTrial]) -> list[float]:
    return [trial.value for trial in trials if trial.value is not None]
