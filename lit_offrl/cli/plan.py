"""A search as it runs: every key checked against the real config, a line for each trial, the files at the end."""

from __future__ import annotations

import csv
import functools
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
import yaml
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from lit_offrl.algorithms import ALGORITHMS
from lit_offrl.cli.configs import flatten
from lit_offrl.cli.metrics import check_metric
from lit_offrl.cli.training import resolved_config
from lit_offrl.errors import UserError
from lit_offrl.report.plots import png
from lit_offrl.search import study as studies
from lit_offrl.search.pictures import pictures
from lit_offrl.search.space import FQE_VALUE, Search, look_up, short_names
from lit_offrl.search.trial import Outcome, SeedRun, run_trial
from lit_offrl.system.files import write_bytes


def run_search(search: Search) -> None:
    """Run a search, or join one that runs; then write and print its results.

    Raises:
        UserError: An entry is wrong; nothing is written then. Or no trial is complete.
        RunFailure: Several trials in a row failed.
    """
    plan = Plan(search)
    pruner = studies.make_pruner(search, plan.max_steps * len(search.seeds))
    studies.make_sampler(search, trial=0)
    if search.sampler["name"] == "grid":
        search.grid(plan.distributions)
    study = studies.open_study(search, plan.distributions, plan.own_values, plan.fingerprint)
    study.pruner = pruner

    report = functools.partial(print, flush=True)
    for line in plan.lines(study):
        report(line)

    def report_trial(trial: FrozenTrial) -> None:
        report(_trial_line(trial, study))

    studies.Worker(search, study, plan.distributions, plan.train, report_trial, report).work()
    _write_results(search, study, plan)


class Plan:
    """A search whose every key has been checked against the real config.

    Attributes:
        config: The config of a trial with the config's own values, resolved.
        distributions: The space.
        own_values: The config's own values of the searched keys; None if one lies outside the space.
        keys_outside: The keys whose own values lie outside the space.
        max_steps: Gradient steps of the run of one seed.

    Raises:
        UserError: A key or value is wrong.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.config = self.resolve({})
        defaults = {key: look_up(self.config, key) for key in search.space}
        for key, parameter in search.space.items():
            if defaults[key] is None:  # a wrong key, which the parser explains; or a key without a value
                self.resolve({key: (parameter.choices or [parameter.low])[0]})
        self.distributions = {key: each.distribution(defaults[key]) for key, each in search.space.items()}
        # All choices, and both ends of the ranges.
        extremes = {
            key: each.choices if isinstance(each, CategoricalDistribution) else (each.low, each.high)
            for key, each in self.distributions.items()
        }
        for i in range(max(map(len, extremes.values()))):
            self.resolve({key: values[i % len(values)] for key, values in extremes.items()})
        self._check_objective()
        values = {key: search.space[key].value(defaults[key], each) for key, each in self.distributions.items()}
        self.keys_outside = [key for key, value in values.items() if value is None]
        self.own_values = None if self.keys_outside else values
        self.max_steps = int(look_up(self.config, "trainer.max_steps"))

    def resolve(self, *changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config of a trial with these values."""
        return resolved_config([*self.search.flags(*changes), f"--seed_everything={self.search.seeds[0]}"])

    def _check_objective(self) -> None:
        metric = self.search.objective.metric
        fraction = float(look_up(self.config, "data.validation_fraction"))
        if self.search.objective.is_fqe:
            self._check_fqe(fraction)
        elif not metric.startswith("train/"):
            check_metric("objective.metric", metric, self.is_bandit, fraction, f"train/..., {FQE_VALUE}")
        if self.search.objective.evaluates and not self.is_bandit and not look_up(self.config, "evaluation.enabled"):
            raise UserError(f"objective.metric: {metric} needs evaluations, but evaluation.enabled is false")

    def _check_fqe(self, fraction: float) -> None:
        if not fraction:
            raise UserError(
                f"objective.metric: {FQE_VALUE} needs episodes that training does not see: set "
                "data.validation_fraction, e.g. 0.1"
            )
        model = str(look_up(self.config, "model.class_path")).rpartition(".")[2]
        if model in ALGORITHMS and ALGORITHMS[model].has_memory:
            raise UserError(
                f"objective.metric: {FQE_VALUE} values no policy of {model}, which acts by what happened earlier in "
                "the episode"
            )

    @property
    def is_bandit(self) -> bool:
        """Whether the dataset is a 2-D set."""
        return str(look_up(self.config, "data.dataset")).startswith("bandit/")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that comparable trials have in common."""
        space = {key: str(each) for key, each in self.distributions.items()}
        objective = self.search.objective
        return {
            **{f"space.{key}": value for key, value in space.items()},
            "objective": f"{objective.direction} {objective.metric}, last {objective.last}"
            + ("" if objective.fqe_steps is None else f", {objective.fqe_steps} steps of FQE"),
            "seeds": list(self.search.seeds),
            **{key: value for key, value in flatten(self.config) if key not in space},
        }

    def lines(self, study: optuna.Study) -> Iterator[str]:
        """Yield the lines that are printed at the start."""
        search, objective = self.search, self.search.objective
        model = str(look_up(self.config, "model.class_path")).rpartition(".")[2]
        limits = [f"{search.trials} trials"] if search.trials is not None else []
        limits += [f"{search.hours:g} hours of trials"] if search.hours is not None else []
        many = f"{len(self.distributions)} parameter{'s' * (len(self.distributions) != 1)}"
        yield (
            f"searching {many} of {model} on {look_up(self.config, 'data.dataset')}: "
            f"{' or '.join(limits) or 'the grid'}, {self.max_steps:,} gradient steps with "
            f"seed{'s' * (len(search.seeds) > 1)} {', '.join(map(str, search.seeds))} each; "
            f"sampler {search.sampler['name']}, pruner {search.pruner['name']}"
        )
        which = f"mean of the last {objective.last} values" if objective.last > 1 else "last value"
        yield f"{objective.direction}s {objective.metric}, the {which} of a run, {self._meaning}"
        if self.keys_outside:
            keys = ", ".join(self.keys_outside)
            yield f"note: the config's own values are not tried: {keys} lies outside of the space"
        if done := len([trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]):
            yield f"going on with a study of {done} ended trials"
        yield f"everything goes to {search.folder}"

    @property
    def _meaning(self) -> str:
        """A clause about the metric."""
        if self.search.objective.is_fqe:
            return "which needs no environment: fitted Q evaluation on held-out episodes when a run is finished"
        if not self.search.objective.evaluates:
            held_out = self.search.objective.metric.startswith("val/")
            kind = "a loss on held-out episodes" if held_out else "it is logged in training, on the training data"
            return f"which needs no environment: {kind}"
        if self.is_bandit:
            return "which needs no environment: samples are measured against the 2-D set"
        return "which plays episodes in the environment"

    def train(self, trial: Trial, origin: int, inherited: Sequence[int]) -> Outcome:
        """Train one trial; see `Worker`."""
        if trial.params == self.own_values:
            trial.set_user_attr("own_values", True)

        def prune(step: int, value: float) -> bool:
            trial.report(value, step)
            return step < self.max_steps * len(self.search.seeds) and trial.should_prune()

        return run_trial(self.runs(trial.params, origin), self.search.objective, self.max_steps, prune, inherited)

    def runs(self, parameters: Mapping[str, Any], origin: int) -> list[SeedRun]:
        """Return the runs of the trial that began with number `origin`."""
        root = self.search.folder / "trials" / f"{origin:04d}"
        quiet: dict[str, Any] = {
            "trainer.default_root_dir": str(root),
            "trainer.enable_progress_bar": False,
            "checkpoint.keep_every_n_epochs": 0,  # of all trials they would fill the disk
        }
        if not self.search.objective.evaluates:
            quiet["evaluation.enabled"] = False
        quiet = {key: value for key, value in quiet.items() if key not in self.search.overrides}
        return [
            SeedRun(seed, tuple(self.search.flags(parameters, quiet, {"seed_everything": seed})), root)
            for seed in self.search.seeds
        ]


def _trial_line(trial: FrozenTrial, study: optuna.Study) -> str:
    """Return the line about a trial that has ended."""
    if trial.state == TrialState.FAIL:
        what = f"failed: {trial.user_attrs.get(studies.FAILURE)};"
    elif trial.state == TrialState.PRUNED:
        reported = trial.intermediate_values
        step = max(reported) if reported else 0
        what = f"pruned at step {step:,}, {reported.get(step, float('nan')):.5g};"
    else:
        best = study.best_trial
        standing = "the best so far" if best.number == trial.number else f"best {best.value:.5g} of {best.number}"
        what = f"{trial.value:.5g} ({standing});"
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    own = ", the config's own values" if trial.user_attrs.get("own_values") else ""
    return f"trial {trial.number}: {what} {_in_words(trial.params)}{own}; {_duration(seconds)}"


def _in_words(parameters: Mapping[str, Any]) -> str:
    names = short_names(list(parameters))
    return ", ".join(f"{names[key]} {f'{v:.4g}' if isinstance(v, float) else v}" for key, v in parameters.items())


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _write_results(search: Search, study: optuna.Study, plan: Plan) -> None:
    """Write the results of the search, and print them."""
    states = Counter(trial.state for trial in study.get_trials(deepcopy=False))
    complete, pruned, failed = (states[each] for each in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    print(f"{complete + pruned} finished trials: {complete} complete, {pruned} pruned; {failed} failed or broken off")
    if not complete:
        raise UserError("no trial is complete: give the search more trials or hours")
    best = study.best_trial
    print(f"best: {search.objective.metric} {best.value:.5g} of trial {best.number}: {_in_words(best.params)}")
    config = plan.resolve(best.params, {"trainer.default_root_dir": str(search.folder / "best")})
    score = f"# {search.objective.metric} {best.value:.6g}: trial {best.number} of the search in {search.folder}\n"
    files = {
        "best.yaml": (score + yaml.safe_dump(config, sort_keys=False)).encode(),
        "trials.csv": _table(study).encode(),
        **{name: png(figure) for name, figure in pictures(study, search.objective.metric).items()},
    }
    for name, content in files.items():
        write_bytes(search.folder / name, content)
    print(f"wrote {', '.join(str(search.folder / name) for name in files)}")
    if "importances.png" not in files:
        print("too few trials, or too much alike, for importances")
    print("its score is the best of many, so optimistic; train it with 5 seeds:")
    print(f"python -m lit_offrl fit --config {search.folder / 'best.yaml'} --seeds 0,1,2,3,4", flush=True)


def _table(study: optuna.Study) -> str:
    """Return all trials as CSV."""
    trials = study.get_trials(deepcopy=False)
    keys = sorted({key for trial in trials for key in trial.params})
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["trial", "state", "value", "seconds", "folder", *keys, "failure"])
    for trial in trials:
        writer.writerow(
            [
                trial.number,
                trial.state.name.lower(),
                "" if trial.value is None else trial.value,
                "" if trial.duration is None else round(trial.duration.total_seconds(), 1),
                f"trials/{trial.user_attrs.get(studies.ORIGIN, trial.number):04d}",
                *(trial.params.get(key, "") for key in keys),
                trial.user_attrs.get(studies.FAILURE, ""),
            ]
        )
    return file.getvalue()
