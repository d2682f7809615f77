"""The `sweep` subcommand."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from lit_offrl.cli.configs import find_config, flatten
from lit_offrl.cli.parser import CommandParser
from lit_offrl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

    from lit_offrl.search.space import Search
    from lit_offrl.search.trial import Outcome, SeedRun

BEST_SEEDS = "0,1,2,3,4"
TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, with an exit code of its own."""


def run_sweep(words: list[str]) -> int:
    """Run `sweep --config FILE`; return the exit code."""
    options = _parser().parse_args(words)
    from lit_offrl.search.space import read_search

    search = read_search(find_config(options.config), _changes(options))
    try:
        with _sigterm_interrupts():
            return _sweep(search)
    except Terminated:
        sys.stderr.write("stopped\n")
        return TERMINATED


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m lit_offrl sweep",
        description="Search hyper-parameters. The same command again goes on where it was stopped or killed, and "
        "joins in where it runs already.",
    )
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="a search, by file or name: search/dtql_antmaze"
    )
    parser.add_argument("--trials", type=int, metavar="N", help="end with N finished trials, over all workers")
    parser.add_argument("--hours", type=float, metavar="H", help="begin no trial after H hours of trials")
    parser.add_argument("--seeds", metavar="0,1", help="train each trial with these seeds; its score is the mean")
    parser.add_argument("--sampler", help="tpe, random, qmc or grid")
    parser.add_argument("--pruner", help="none, median, percentile or hyperband")
    parser.add_argument(
        "--storage", help="x.db (SQLite), x.log (journal file) or a database URL; by default study.db in the folder"
    )
    parser.add_argument("--folder", metavar="DIR", help="where everything goes; by default runs/search/NAME")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a config key for all trials; repeatable"
    )
    return parser


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return what flags put in the place of the file's entries."""
    names = ("trials", "hours", "sampler", "pruner", "storage", "folder")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.seeds is not None:
        try:
            changes["seeds"] = [int(seed) for seed in options.seeds.strip("[] ").split(",")]
        except ValueError:
            raise UserError(f"--seeds: must be whole numbers, e.g. 0,1,2, not {options.seeds}") from None
    pairs = [pair.partition("=") for pair in options.set]
    if wrong := [key for key, sign, _ in pairs if not sign or not key]:
        raise UserError(f"--set: must be KEY=VALUE, not {wrong[0]}")
    changes["overrides"] = {key.lstrip("-"): value for key, _, value in pairs}
    return changes


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


# -------------------------------------------------------------------------------------------------- the search


def _sweep(search: Search) -> int:
    from lit_offrl.search import study as studies

    plan = Plan(search)
    # Whatever is wrong with these is said before the storage is touched.
    pruner = studies.make_pruner(search, plan.max_steps * len(search.seeds))
    studies.make_sampler(search, trial=0)
    if search.sampler["name"] == "grid":
        search.grid(plan.distributions)
    study = studies.open_study(search, plan.distributions, plan.own_values, plan.fingerprint)
    study.pruner = pruner
    for line in plan.lines(study):
        print(line, flush=True)
    said = Said(study, plan)
    worker = studies.Worker(search, study, plan.distributions, plan.train, said.trial, said.line)
    worker.work()
    return _conclude(search, study, plan)


class Plan:
    """A search whose every key has been checked against the real config.

    Args:
        search: What is searched.

    Attributes:
        config: The config of a trial with the config's own values, resolved.
        distributions: The space.
        own_values: The config's own values of what is searched; None where they lie outside of the space.
        outside: The keys whose own values do.

    Raises:
        UserError: A key or value is wrong.
    """

    def __init__(self, search: Search) -> None:
        from lit_offrl.search.space import look_up

        self.search = search
        self.config = self._resolve({})
        defaults = {key: look_up(self.config, key) for key in search.space}
        for key, parameter in search.space.items():
            if defaults[key] is None:  # a wrong key, about which the parser knows best; or one that has no value yet
                self._resolve({key: (parameter.choices or [parameter.low])[0]})
        self.distributions: dict[str, BaseDistribution] = {
            key: parameter.distribution(defaults[key]) for key, parameter in search.space.items()
        }
        self._check_points()
        self._check_objective()
        values = {key: search.space[key].value(defaults[key], each) for key, each in self.distributions.items()}
        self.outside = [key for key, value in values.items() if value is None]
        self.own_values = None if self.outside else values
        self.max_steps = int(look_up(self.config, "trainer.max_steps"))

    def _resolve(self, *changes: Mapping[str, Any]) -> dict[str, Any]:
        from lit_offrl.cli.training import resolved_config

        return resolved_config([*self.search.flags(*changes), f"--seed_everything={self.search.seeds[0]}"])

    def _check_points(self) -> None:
        extremes = {key: self.search.space[key].extremes(each) for key, each in self.distributions.items()}
        for i in range(max(map(len, extremes.values()))):
            self._resolve({key: values[i % len(values)] for key, values in extremes.items()})

    def _check_objective(self) -> None:
        from lit_offrl.callbacks.bandit import BanditScores
        from lit_offrl.callbacks.rollout import Scores
        from lit_offrl.search.space import look_up

        metric = self.search.objective.metric
        if metric.startswith("eval/"):
            scores = BanditScores(0, 0, 0, 0, 0, 0) if self.is_bandit else Scores(0, 0, 0, 0, 0, 0)
            known = list(scores.logged("eval"))
            if metric not in known:
                raise UserError(
                    f"objective.metric: no '{metric}'{did_you_mean(metric, known)}; evaluations have {', '.join(known)}"
                )
        elif not metric.startswith(("eval_", "train/", "val/")):
            raise UserError(f"objective.metric: '{metric}' is none of eval/..., train/... and val/...")
        fraction = look_up(self.config, "data.validation_fraction")
        if metric.startswith("val/") and not fraction:
            raise UserError("objective.metric: val/... needs held-out episodes: set data.validation_fraction, e.g. 0.1")
        if self.search.objective.evaluates and not self.is_bandit and not look_up(self.config, "evaluation.enabled"):
            raise UserError(f"objective.metric: {metric} needs evaluations, but evaluation.enabled is false")

    @property
    def is_bandit(self) -> bool:
        """Whether the dataset is a 2-D set."""
        from lit_offrl.search.space import look_up

        return str(look_up(self.config, "data.dataset")).startswith("bandit/")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What trials have to have in common to be compared."""
        space = {key: str(each) for key, each in self.distributions.items()}
        objective = self.search.objective
        return {
            **{f"space.{key}": value for key, value in space.items()},
            "objective": f"{objective.direction} {objective.metric}, last {objective.last}",
            "seeds": list(self.search.seeds),
            **{key: value for key, value in flatten(self.config) if key not in space},
        }

    def lines(self, study: optuna.Study) -> Iterator[str]:
        """Yield what is said at the start."""
        from lit_offrl.search.space import look_up

        search, objective = self.search, self.search.objective
        model = str(look_up(self.config, "model.class_path")).rpartition(".")[2]
        limits = [] if search.trials is None else [f"{search.trials} trials"]
        if search.hours is not None:
            limits.append(f"{search.hours:g} hours of trials")
        many = f"{len(self.distributions)} parameter{'s' * (len(self.distributions) != 1)}"
        yield (
            f"searching {many} of {model} on {look_up(self.config, 'data.dataset')}: "
            f"{' or '.join(limits) or 'the grid'}, {self.max_steps:,} gradient steps with "
            f"seed{'s' * (len(search.seeds) > 1)} {', '.join(map(str, search.seeds))} each; "
            f"sampler {search.sampler['name']}, pruner {search.pruner['name']}"
        )
        which = f"mean of the last {objective.last} values" if objective.last > 1 else "last value"
        yield f"{objective.direction}s {objective.metric}, the {which} of a run, {self._meaning()}"
        if self.outside:
            keys = ", ".join(self.outside)
            yield f"note: the config's own values are not tried: {keys} lies outside of the space"
        if done := len([trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]):
            yield f"going on with a study of {done} ended trials"
        yield f"everything goes to {search.folder}"

    def _meaning(self) -> str:
        if self.search.objective.evaluates:
            if self.is_bandit:
                return "which needs no environment: samples are measured against the 2-D set"
            return "which plays episodes in the environment"
        if self.search.objective.metric.startswith("val/"):
            return "which needs no environment: a loss on held-out episodes"
        return "which needs no environment: it is logged in training, on the data that is trained on"

    # ---------------------------------------------------------------- a trial

    def train(self, trial: Trial, origin: int, tick: Callable[[], None], inherited: Sequence[int]) -> Outcome:
        """Train one trial; see `Worker`."""
        from lit_offrl.search.trial import run_trial

        if trial.params == self.own_values:
            trial.set_user_attr("own_values", True)

        def prune(step: int, value: float) -> bool:
            trial.report(value, step)
            return step < self.max_steps * len(self.search.seeds) and trial.should_prune()

        return run_trial(self.runs(trial.params, origin), self.search.objective, self.max_steps, prune, tick, inherited)

    def runs(self, parameters: Mapping[str, Any], origin: int) -> list[SeedRun]:
        """Return the runs of the trial that began with number `origin`."""
        from lit_offrl.search.trial import SeedRun

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
            SeedRun(
                seed,
                tuple(self.search.flags(parameters, quiet, {"seed_everything": seed})),
                root,
                root / f"seed_{seed}.txt",
            )
            for seed in self.search.seeds
        ]


# -------------------------------------------------------------------------------------------------- what is printed


class Said:
    """Prints a line per trial.

    Args:
        study: The study.
        plan: What is searched.
    """

    def __init__(self, study: optuna.Study, plan: Plan) -> None:
        self.study = study
        self.plan = plan

    def line(self, text: str) -> None:
        """Print something else."""
        print(text, flush=True)

    def trial(self, trial: FrozenTrial) -> None:
        """Print what came of a trial."""
        from optuna.trial import TrialState

        from lit_offrl.search.study import FAILURE, best_trial

        if trial.state == TrialState.FAIL:
            what = f"failed: {trial.user_attrs.get(FAILURE)};"
        elif trial.state == TrialState.PRUNED:
            reported = trial.intermediate_values
            step = max(reported) if reported else 0
            what = f"pruned at step {step:,}, {reported.get(step, float('nan')):.5g};"
        else:
            best = best_trial(self.study)
            assert best is not None
            standing = "the best so far" if best.number == trial.number else f"best {best.value:.5g} of {best.number}"
            what = f"{trial.value:.5g} ({standing});"
        seconds = trial.duration.total_seconds() if trial.duration else 0.0
        own = ", the config's own values" if trial.user_attrs.get("own_values") else ""
        self.line(f"trial {trial.number}: {what} {_shown(trial.params)}{own}; {_duration(seconds)}")


def _shown(parameters: Mapping[str, Any]) -> str:
    from lit_offrl.search.space import short_names

    names = short_names(list(parameters))
    return ", ".join(
        f"{names[key]} {value:.4g}" if isinstance(value, float) else f"{names[key]} {value}"
        for key, value in parameters.items()
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _conclude(search: Search, study: optuna.Study, plan: Plan) -> int:
    """Write and print what the search has found; return the exit code."""
    from collections import Counter

    import yaml
    from optuna.trial import TrialState

    from lit_offrl.report.plots import png
    from lit_offrl.search.pictures import pictures
    from lit_offrl.search.study import best_trial
    from lit_offrl.system.files import write_atomically

    states = Counter(trial.state for trial in study.get_trials(deepcopy=False))
    complete, pruned, failed = (states[each] for each in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    print(f"{complete + pruned} finished trials: {complete} complete, {pruned} pruned; {failed} failed or broken off")
    best = best_trial(study)
    if best is None:
        raise UserError("no trial is complete: give the search more trials or hours")
    print(f"best: {search.objective.metric} {best.value:.5g} of trial {best.number}: {_shown(best.params)}")
    config = plan._resolve(best.params, {"trainer.default_root_dir": str(search.folder / "best")})
    score = f"# {search.objective.metric} {best.value:.6g}: trial {best.number} of the search in {search.folder}\n"
    files: dict[str, bytes] = {
        "best.yaml": (score + yaml.safe_dump(config, sort_keys=False)).encode(),
        "trials.csv": _table(study).encode(),
        **{name: png(figure) for name, figure in pictures(study, search.objective.metric).items()},
    }
    for name, content in files.items():
        write_atomically(search.folder / name, lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]
    print(f"wrote {', '.join(str(search.folder / name) for name in files)}")
    if "importances.png" not in files:
        print("too few trials, or too much alike, for importances")
    print("its score is the best of many, so optimistic; train it with 5 seeds:")
    print(f"python -m lit_offrl fit --config {search.folder / 'best.yaml'} --seeds {BEST_SEEDS}", flush=True)
    return 0


def _table(study: optuna.Study) -> str:
    """Return all trials as CSV."""
    import csv
    import io

    from lit_offrl.search.study import FAILURE, ORIGIN

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
                f"trials/{trial.user_attrs.get(ORIGIN, trial.number):04d}",
                *(trial.params.get(key, "") for key in keys),
                trial.user_attrs.get(FAILURE, ""),
            ]
        )
    return file.getvalue()
