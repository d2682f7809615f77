"""The pictures of a search, drawn by Optuna: the scores of its trials, and the importance of its parameters."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.figure import Figure
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState
from optuna.visualization.matplotlib import plot_optimization_history, plot_param_importances, plot_slice

from lit_offrl.search.space import short_names

FEWEST_FOR_IMPORTANCES = 4  # complete trials; with fewer, importances are noise


def pictures(study: optuna.Study, metric: str) -> dict[str, Figure]:
    """Return the figures for which the study has enough trials, by file name.

    The importances are for a score in the better half of the trials, by PED-ANOVA (Watanabe et al., 2023).
    """
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        return {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=0.5, region_quantile=1.0)
    figures: dict[str, Figure] = {}
    with plt.style.context("default"):  # Optuna changes the style of all later figures
        figures["history.png"] = _finish(plot_optimization_history(study, target_name=metric))
        _add_other_trials(study, figures["history.png"])
        figures["parameters.png"] = _finish(plot_slice(study, target_name=metric))
        enough = len(complete) >= FEWEST_FOR_IMPORTANCES and len({trial.value for trial in complete}) > 1
        if enough and all(map(math.isfinite, get_param_importances(study, evaluator=evaluator).values())):
            axis = plot_param_importances(study, evaluator=evaluator, target_name=metric)
            axis.set_ylim(-1, len(complete[0].params))  # also a single bar is thin
            figures["importances.png"] = _finish(axis)
            figures["importances.png"].set_layout_engine("constrained")  # room for the names
    return figures


def _add_other_trials(study: optuna.Study, figure: Figure) -> None:
    """Add the pruned and the failed trials, and the score of the config's own values, to the history."""
    axis, trials = figure.axes[0], study.get_trials(deepcopy=False)
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED and trial.value is not None]
    failed = [trial.number for trial in trials if trial.state == TrialState.FAIL]
    own = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.user_attrs.get("own_values")]
    if pruned:
        numbers, scores = zip(*((trial.number, trial.value) for trial in pruned), strict=True)
        axis.plot(numbers, scores, "v", color="tab:orange", mfc="none", label="pruned, with the score at that step")
    if failed:
        bottom = axis.get_xaxis_transform()
        axis.plot(failed, [0.02] * len(failed), "x", color="0.45", transform=bottom, label="failed or stopped")
    if own and own[0].value is not None:
        axis.axhline(own[0].value, color="0.45", linestyle="--", label="values of the config")
    axis.legend(fontsize="small")


def _finish(axes: Any) -> Figure:
    """Return the figure of Optuna's axes: white, with short names of the parameters, and unknown to pyplot."""
    figure: Figure = np.ravel(axes)[0].figure
    names = short_names([axis.get_xlabel() for axis in figure.axes])
    for axis in figure.axes:
        axis.set_facecolor("white")
        axis.grid(color="0.92")
        axis.set_xlabel(names[axis.get_xlabel()])
    plt.close(figure)
    return figure
