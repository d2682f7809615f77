"""The search: what it refuses, that it ends with exactly as many trials as asked for, and what it leaves behind."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import optuna
import pytest
import yaml
from conftest import REPOSITORY
from filelock import lock_descriptor
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from test_cli import failure

from lit_offrl.cli import main
from lit_offrl.cli.plan import Plan
from lit_offrl.errors import RunFailure, UserError
from lit_offrl.search import study as studies
from lit_offrl.search.pictures import pictures
from lit_offrl.search.space import Objective, Parameter, Search, read_search
from lit_offrl.search.trial import Outcome, SeedRun, mean_of_last, run_trial

ALPHA = "model.init_args.alpha"
SEARCH: dict[str, Any] = {
    "configs": ["conf/dtql_bandit.yaml"],
    "space": {ALPHA: {"low": 0.1, "high": 10, "log": True}},
    "objective": {"metric": "eval/mean_label", "direction": "maximize"},
    "trials": 4,
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a search; keyword arguments change its entries."""
    monkeypatch.chdir(REPOSITORY)

    def write_search(**changes: Any) -> Path:
        path = tmp_path / "search.yaml"
        content = {**SEARCH, "folder": str(tmp_path / "search"), **changes}
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return path

    return write_search


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spcae": {}}, ["no key 'spcae'", "did you mean 'space'?"]),
        ({"space": None}, ["space is missing"]),
        ({"trials": None}, ["trials or hours is missing"]),
        ({"trials": 0}, ["trials: must be a whole number from 1"]),
        ({"seeds": [0, 0]}, ["seeds: must be a list of different whole numbers"]),
        ({"space": {ALPHA: {"low": 0.1, "hihg": 1}}}, [f"space.{ALPHA}", "did you mean 'high'?"]),
        ({"space": {ALPHA: {"low": 2, "high": 1}}}, [f"space.{ALPHA}.low: must be below high"]),
        ({"space": {ALPHA: {"low": 0, "high": 1, "log": True}}}, ["positive where log is true"]),
        ({"space": {ALPHA: "0.1 to 1"}}, ["a list of choices or {low, high}"]),
        ({"space": {"model.init_args.alfa": [1, 2]}}, ["model.init_args.alfa", "did you mean 'alpha'?"]),
        ({"space": {"data.batchsize": [1, 2]}}, ["data.batchsize", "did you mean 'data.batch_size'?"]),
        ({"space": {"data.batch_size": {"low": 1.5, "high": 9}}}, ["data.batch_size.low: must be a whole number"]),
        ({"space": {"model.init_args.cosine_decay": {"low": 0, "high": 1}}}, ["give a list of choices"]),
        ({"space": {ALPHA: [1.0, "much"]}}, ["model.init_args.alpha: must be float, not much"]),
        ({"overrides": {ALPHA: 1}}, ["both searched and set"]),
        ({"overrides": {"trainer.maxsteps": 1}}, ["trainer.maxsteps", "did you mean 'trainer.max_steps'?"]),
        ({"space": {"seed_everything": [0, 1]}}, ["use seeds and folder"]),
        ({"configs": ["nowhere.yaml"]}, ["nowhere.yaml"]),
        ({"objective": {"metric": "eval/mean_label"}}, ["objective.direction is missing"]),
        ({"objective": {"metric": "eval/mean_label", "direction": "max"}}, ["no 'max'", "maximize"]),
        ({"objective": {"metric": "eval/mean_lable", "direction": "maximize"}}, ["did you mean 'eval/mean_label'?"]),
        ({"objective": {"metric": "eval/return_mean", "direction": "maximize"}}, ["evaluations have eval/mean_label"]),
        (
            {"objective": {"metric": "loss", "direction": "minimize"}},
            ["none of eval/..., train/..., ope/fqe_value and val/..."],
        ),
        ({"objective": {"metric": "val/x", "direction": "minimize"}}, ["set data.validation_fraction"]),
        ({"objective": {"metric": "ope/fqe_value", "direction": "maximize"}}, ["set data.validation_fraction"]),
        ({"objective": {"metric": "ope/fqe", "direction": "maximize"}}, ["none of eval/...", "ope/fqe_value"]),
        (
            {
                "objective": {"metric": "ope/fqe_value", "direction": "maximize"},
                "configs": ["conf/qc_pointmaze.yaml"],
                "overrides": {"data.validation_fraction": 0.1},
                "space": {"data.batch_size": [8, 16]},
            },
            ["values no policy of QC"],
        ),
        (
            {"objective": {"metric": "eval/mean_label", "direction": "maximize", "fqe_steps": 5}},
            ["objective.fqe_steps: must be left out without ope/fqe_value, not 5"],
        ),
        ({"sampler": "tpee"}, ["sampler: no 'tpee'", "did you mean 'tpe'?"]),
        ({"sampler": {"name": "tpe", "n_startup": 3}}, ["did you mean 'n_startup_trials'?"]),
        ({"sampler": "grid"}, ["a grid needs a list of choices or a step"]),
        ({"pruner": "medain"}, ["pruner: no 'medain'", "did you mean 'median'?"]),
        ({"storage": "study.txt"}, ["neither a .db file"]),
        (
            {"storage": "mysql://me:secret@host/x"},
            ["mysql://host/x cannot be opened", "driver for Python is not installed"],
        ),
        ({"storage": "nosuchbase://me:secret@host/x"}, ["nosuchbase://host/x cannot be opened"]),
    ],
)
def test_bad_input_gets_one_line(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
):
    line = failure(capsys, ["sweep", f"--config={write(**changes)}"])
    for word in words:
        assert word in line
    assert "secret" not in line
    assert not (tmp_path / "search" / "trials").exists()


def test_bad_flags_get_one_line(write: Write, capsys: pytest.CaptureFixture[str]):
    path = write()
    assert "KEY=VALUE" in failure(capsys, ["sweep", f"--config={path}", "--set", "alpha"])
    assert "whole numbers" in failure(capsys, ["sweep", f"--config={path}", "--seeds", "a,b"])
    assert "no file nowhere.yaml" in failure(capsys, ["sweep", "--config=nowhere.yaml"])
    assert "--config" in failure(capsys, ["sweep"])
    assert "unrecognized arguments: --trails" in failure(capsys, ["sweep", f"--config={path}", "--trails=3"])


@pytest.mark.parametrize("sampler", sorted(studies.SAMPLER_NEEDS))
def test_a_sampler_without_its_package_says_what_to_install(
    write: Write, monkeypatch: pytest.MonkeyPatch, sampler: str
):
    monkeypatch.setattr(studies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {studies.SAMPLER_NEEDS[sampler]}"):
        studies.make_sampler(read_search(write(sampler=sampler), {}), trial=0)


# ----------------------------------------------------------------------------------------------------------- the space


def test_the_configs_value_tells_the_type():
    numbers = Parameter.of("x", {"low": 1, "high": "1e3"})  # which YAML takes for a word
    assert numbers.distribution(5) == IntDistribution(1, 1000)
    assert numbers.distribution(5.0) == FloatDistribution(1, 1000)
    assert Parameter.of("x", [1, "1e-4"]).distribution(3.0) == CategoricalDistribution([1.0, 1e-4])
    assert Parameter.of("x", [1, None]).distribution(3) == CategoricalDistribution([1, None])
    assert Parameter.of("x", {"choices": [[1, 2], []]}).distribution([]) == CategoricalDistribution(["[1, 2]", "[]"])


@pytest.mark.parametrize(
    ("content", "default", "expected"),
    [
        ({"low": 0, "high": 1}, 0.3, 0.3),
        ({"low": 0, "high": 1}, 1.3, None),
        ({"low": 0, "high": 1, "step": 0.1}, 0.3, 0.3),  # 0.3 is no multiple of 0.1 in binary
        ({"low": 0, "high": 1, "step": 0.1}, 0.35, None),
        ({"low": 0, "high": 1}, None, None),
        ([1, 3], 3.0, 3.0),
        ([1, 3], 2.0, None),
        ([[], [1]], [1], "[1]"),
    ],
)
def test_the_configs_own_value_is_tried_where_it_lies_in_the_space(content: object, default: object, expected: object):
    parameter = Parameter.of("x", content)
    assert parameter.value(default, parameter.distribution(default)) == expected


def test_a_grid_has_all_points(write: Write):
    space = {ALPHA: {"low": 0, "high": 0.3, "step": 0.1}, "data.batch_size": [1, 2]}
    search = read_search(write(space=space, sampler="grid"), {})
    grid = [*search.grid({key: parameter.distribution(1.0) for key, parameter in search.space.items()})]
    assert len(grid) == 8
    np.testing.assert_allclose(sorted({point[ALPHA] for point in grid}), [0, 0.1, 0.2, 0.3])


def test_flags_win(write: Write):
    changes = {"trials": 7, "overrides": {"data.batch_size": "9"}}
    search = read_search(write(overrides={"data.batch_size": 3, "model": "DTQL", "trainer.max_steps": 5}), changes)
    assert search.trials == 7
    words = search.flags({ALPHA: 0.5, "model.init_args.cosine_decay": True})
    assert words[:2] == ["--config=conf/dtql_bandit.yaml", "--model=DTQL"]  # a class before its arguments
    assert {"--data.batch_size=9", f"--{ALPHA}=0.5", "--model.init_args.cosine_decay=true"} <= set(words)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "conf" / "search").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_search_that_comes_along_begins_with_the_configs_own_values(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    plan = Plan(read_search(path, {}))
    assert plan.keys_outside == []
    studies.make_pruner(plan.search, plan.max_steps)


# ----------------------------------------------------------------------------------------------------------- the study

X = {"x": FloatDistribution(0.0, 1.0)}
WORKER = """
import sys, time
from pathlib import Path
from lit_offrl.search import study as studies
from lit_offrl.search.space import read_search
from lit_offrl.search.trial import Outcome
from optuna.distributions import FloatDistribution

search = read_search(sys.argv[1], {})
space = {"x": FloatDistribution(0.0, 1.0)}

def train(trial, origin, inherited):
    for step in range(4):
        trial.report(trial.params["x"], step)
        time.sleep(0.1)
    if trial.number % 7 == 3:
        return Outcome(failure="made up")
    return Outcome(pruned=True) if trial.number % 5 == 2 else Outcome(score=trial.params["x"])

study = studies.open_study(search, space, {"x": 0.5}, {"a": 1})
studies.Worker(search, study, space, train, lambda trial: None, lambda line: None).work()
"""


@pytest.fixture
def search(write: Write) -> Search:
    return read_search(write(), {})


def worker(search: Search, study: optuna.Study, train: Callable[..., Outcome]) -> studies.Worker:
    return studies.Worker(search, study, X, train, lambda trial: None, lambda line: None)


def scored(trial: optuna.Trial, *_: object) -> Outcome:
    return Outcome(score=trial.params["x"])


def states(study: optuna.Study) -> Counter[TrialState]:
    return Counter(trial.state for trial in study.get_trials(deepcopy=False))


@pytest.mark.parametrize("storage", ["study.log", pytest.param("study.db", marks=pytest.mark.slow)])
def test_two_processes_killed_twice_end_with_exactly_as_many_trials(write: Write, tmp_path: Path, storage: str):
    path = write(trials=30, storage=str(tmp_path / storage))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def start() -> list[subprocess.Popen[bytes]]:
        return [subprocess.Popen([sys.executable, "-c", WORKER, str(path)], env=environment) for _ in range(2)]

    def study() -> optuna.Study:
        return studies.open_study(read_search(path, {}), X, None, {"a": 1})

    started: list[subprocess.Popen[bytes]] = []
    running = 0
    try:
        for kills, enough in enumerate((4, 10, 16, 22)):
            if kills >= 2 and running:
                break  # more often only if both were between two trials each time
            started = start()
            deadline = time.monotonic() + 60
            while sum(trial.state in studies.FINISHED for trial in study().get_trials(deepcopy=False)) < enough:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            for process in started:
                process.kill()
            for process in started:
                process.wait()
            running += states(study())[TrialState.RUNNING]
        assert running, "killed amid trials"
        started = start()
        assert [process.wait(60) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    trials = study().get_trials(deepcopy=False)
    counts = Counter(trial.state for trial in trials)
    assert counts[TrialState.COMPLETE] + counts[TrialState.PRUNED] == 30
    assert counts[TrialState.PRUNED] > 0
    assert set(counts) == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}, "nothing is left running or queued"
    assert trials[0].params == {"x": 0.5}
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    made_up = [trial for trial in failed if studies.FAILURE in trial.user_attrs]
    assert made_up
    assert all(trial.number % 7 == 3 for trial in made_up)
    dead = [trial for trial in failed if studies.FAILURE not in trial.user_attrs]
    assert len(dead) >= running
    for trial in dead:  # tried again with the same parameters
        again = [each for each in trials if each.user_attrs.get(studies.ORIGIN) == trial.number]
        assert all(each.params == trial.params for each in again)
        assert again or studies.ORIGIN in trial.user_attrs


def test_failures_are_recorded_and_passed_over(search: Search):
    study = studies.open_study(search, X, {"x": 0.5}, {})

    def train(trial: optuna.Trial, *_: object) -> Outcome:
        return Outcome(failure="out of memory") if trial.number in (1, 2) else Outcome(score=1.0)

    worker(search, study, train).work()
    assert [trial.state.name[0] for trial in study.trials] == ["C", "F", "F", "C", "C", "C"]
    assert study.trials[1].user_attrs[studies.FAILURE] == "out of memory"


def test_many_failures_in_a_row_stop_the_search(search: Search):
    study = studies.open_study(search, X, None, {})
    with pytest.raises(RunFailure, match="5 trials in a row failed, the last one: no memory"):
        worker(search, study, lambda *_: Outcome(failure="no memory")).work()


def test_a_refused_config_ends_the_search_and_may_be_corrected(search: Search):
    study = studies.open_study(search, X, {"x": 0.5}, {"data.dataset": "no such thing"})
    with pytest.raises(UserError, match="no dataset id"):
        worker(search, study, lambda *_: Outcome(failure="no dataset id", bad_input=True)).work()
    corrected = studies.open_study(search, X, {"x": 0.5}, {"data.dataset": "bandit/rings"})
    assert states(corrected) == {TrialState.WAITING: 1}


def test_a_stopped_trial_is_queued_again_without_end(search: Search):
    study = studies.open_study(search, X, {"x": 0.5}, {})

    def interrupted(*_: object) -> Outcome:
        raise KeyboardInterrupt

    for _ in range(studies.MOST_RETRIES + 2):
        with pytest.raises(KeyboardInterrupt):
            worker(search, study, interrupted).work()
    worker(search, study, scored).work()
    assert states(study)[TrialState.COMPLETE] == 4
    assert next(trial for trial in study.trials if trial.state == TrialState.COMPLETE).params == {"x": 0.5}


def test_a_trial_that_takes_its_workers_with_it_is_given_up(search: Search):
    study = studies.open_study(search, X, {"x": 0.5}, {})
    for _ in range(studies.MOST_RETRIES + 1):
        dead = worker(search, study, scored)
        dead.locks.mkdir(exist_ok=True)
        (dead.locks / dead.name).touch()  # without a lock
        assert dead.claim() is not None
        worker(search, study, scored).revive()
    assert states(study) == {TrialState.FAIL: studies.MOST_RETRIES + 1}
    assert {trial.params["x"] for trial in study.trials} == {0.5}


def test_a_worker_is_dead_when_its_lock_is_free(search: Search):
    study = studies.open_study(search, X, None, {})
    other, own = worker(search, study, scored), worker(search, study, scored)
    other.name = "elsewhere-0123"
    other.locks.mkdir()
    with (other.locks / other.name).open("w") as lock:
        lock_descriptor(lock.fileno())
        assert other.claim() is not None
        own.revive()
        assert states(study) == {TrialState.RUNNING: 1}
    own.revive()
    assert states(study) == {TrialState.FAIL: 1, TrialState.WAITING: 1}
    assert not (other.locks / other.name).exists()


def test_the_study_is_a_journal_or_what_it_was_before(search: Search):
    studies.open_study(search, X, None, {})
    assert (search.folder / "study.log").is_file()
    assert not (search.folder / "study.db").exists()
    (search.folder / "study.db").touch()
    studies.open_study(search, X, None, {})
    assert (search.folder / "study.db").stat().st_size > 0


def test_a_grid_is_searched_once(write: Write):
    search = read_search(write(space={ALPHA: [0.1, 0.2, 0.3]}, sampler="grid", trials=None), {})
    space = {ALPHA: CategoricalDistribution([0.1, 0.2, 0.3])}
    study = studies.open_study(search, space, {ALPHA: 0.2}, {})

    def train(trial: optuna.Trial, *_: object) -> Outcome:
        return Outcome(failure="bad") if trial.params[ALPHA] == 0.1 else Outcome(score=1.0)

    studies.Worker(search, study, space, train, lambda trial: None, lambda line: None).work()
    assert [trial.params[ALPHA] for trial in study.trials] == [0.2, 0.1, 0.3]


def test_hours_count_while_trials_run():
    begin = datetime(2024, 1, 1)

    def trial(start: float, end: float, **options: Any) -> optuna.trial.FrozenTrial:
        made = create_trial(state=TrialState.COMPLETE, value=0.0)
        made.datetime_start, made.datetime_complete = (begin + timedelta(hours=hours) for hours in (start, end))
        return made

    assert studies.busy_hours([trial(0, 2), trial(1, 3), trial(1.5, 2), trial(10, 11)]) == pytest.approx(4)
    for attributes, hours in (({}, 0), ({studies.STOPPED: True}, 5), ({studies.FAILURE: "x"}, 5)):
        ended = create_trial(state=TrialState.FAIL, user_attrs=attributes)
        ended.datetime_start, ended.datetime_complete = begin, begin + timedelta(hours=5)
        assert studies.busy_hours([ended]) == pytest.approx(hours)  # nobody knows when a worker died


def test_time_is_up(search: Search):
    hours = replace(search, trials=None, hours=0.3 / 3600)
    study = studies.open_study(hours, X, None, {})

    def train(trial: optuna.Trial, *_: object) -> Outcome:
        time.sleep(0.1)
        return Outcome(score=1.0)

    worker(hours, study, train).work()
    assert 1 <= states(study)[TrialState.COMPLETE] <= 3


def test_another_search_does_not_mix_in(search: Search):
    study = studies.open_study(search, X, None, {"data.batch_size": 3})
    worker(search, study, scored).work()
    with pytest.raises(UserError, match=r"begun with data.batch_size 3, not 4.*choose another folder"):
        studies.open_study(search, X, None, {"data.batch_size": 4})
    studies.open_study(search, X, None, {"data.batch_size": 3, "data.option_of_a_later_version": 1})


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_repeats_itself_also_after_a_restart(write: Write, tmp_path: Path, sampler: str):
    found = []
    for name, parts in (("whole", (14,)), ("parts", (5, 14))):
        for trials in parts:
            search = read_search(write(folder=str(tmp_path / name), sampler=sampler), {"trials": trials})
            study = studies.open_study(search, X, None, {})
            worker(search, study, scored).work()
        found.append([trial.params["x"] for trial in study.trials])
    assert found[0] == found[1]
    assert len(set(found[0])) == 14


def test_hyperband_and_median_prune_what_is_worse(write: Write):
    for pruner in ({"name": "median", "n_startup_trials": 2}, "hyperband", "percentile"):
        folder = str(write().parent / str(pruner)[:12].strip("{':"))
        search = read_search(write(pruner=pruner, trials=14, folder=folder), {})
        study = studies.open_study(search, X, None, {})
        study.pruner = studies.make_pruner(search, 27)

        def train(trial: optuna.Trial, *_: object) -> Outcome:
            for step in (1, 3, 9, 27):
                trial.report(-trial.number, step)
                if trial.should_prune():
                    return Outcome(pruned=True)
            return Outcome(score=-trial.number)

        worker(search, study, train).work()
        counts = states(study)
        assert counts[TrialState.COMPLETE] + counts[TrialState.PRUNED] == 14
        assert counts[TrialState.PRUNED] >= 4, pruner


def assert_is_drawn(path: Path) -> None:
    pixels = matplotlib.image.imread(path)[..., :3]
    assert 0.005 < (pixels < 0.9).any(-1).mean() < 0.6, f"{path.name} is blank or black"


def test_pictures_of_a_search(search: Search, tmp_path: Path):
    study = studies.open_study(search, X, {"x": 0.5}, {})
    worker(search, study, scored).work()
    figures = pictures(study, "score")
    assert set(figures) == {"history.png", "importances.png", "parameters.png"}
    for name, figure in figures.items():
        figure.savefig(tmp_path / name)
        assert_is_drawn(tmp_path / name)


# --------------------------------------------------------------------------------------------------------- real trials


def tiny_search(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    """Return entries of a search over tiny trainings on data of one's own, in ten episodes."""
    some = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz",
        observations=some.normal(size=(60, 3)),
        actions=some.uniform(-1, 1, (60, 2)),
        rewards=some.normal(size=60),
        terminals=np.arange(60) % 6 == 5,
        timeouts=np.zeros(60, bool),
    )
    defaults = {
        "data.dataset": str(tmp_path / "data.npz"),
        "data.batch_size": 8,
        "data.block_size": 5,
        "data.steps_per_epoch": 10,
        "data.validation_fraction": 0.2,
        "model.init_args.hidden_dim": 16,
        "model.init_args.pretrain_steps": 10,
        "trainer.max_steps": 30,
        "trainer.check_val_every_n_epoch": 1,
        "trainer.accelerator": "cpu",
        "compile": False,
    }
    return {
        "configs": ["conf/dtql_pointmaze.yaml"],
        "overrides": {**defaults, **overrides},
        "space": {"model.init_args.learning_rate": [1e-2, 3e-4, 1e30]},
        "objective": {"metric": "val/behavior_loss", "direction": "minimize"},
        "sampler": "grid",
        "trials": None,
    }


@pytest.mark.slow
def test_a_search_without_an_environment(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sweep", f"--config={write(**tiny_search(tmp_path))}"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "search"
    assert "minimizes val/behavior_loss" in out
    assert "needs no environment: a loss on held-out episodes" in out
    assert "2 finished trials: 2 complete, 0 pruned; 1 failed" in out
    assert "lower the learning rates" in out
    assert f"python -m lit_offrl fit --config {folder}/best.yaml --seeds 0,1,2,3,4" in out

    with (folder / "trials.csv").open(newline="") as file:
        trials = list(csv.DictReader(file))
    rates = [float(trial["model.init_args.learning_rate"]) for trial in trials]
    assert rates == [3e-4, 1e-2, 1e30], "the config's own first"
    assert [trial["state"] for trial in trials] == ["complete"] * 2 + ["fail"]
    best = min((trial for trial in trials if trial["value"]), key=lambda trial: float(trial["value"]))
    (metrics,) = (folder / best["folder"]).rglob("metrics.csv")
    with metrics.open(newline="") as file:
        losses = [row["val/behavior_loss"] for row in csv.DictReader(file) if row["val/behavior_loss"]]
    assert len(losses) == 3
    assert float(best["value"]) == float(losses[-1])

    for name in ("history.png", "parameters.png"):
        assert_is_drawn(folder / name)
    assert "too few trials, or too much alike, for importances" in out

    config = yaml.safe_load((folder / "best.yaml").read_text())
    assert config["model"]["init_args"]["learning_rate"] == float(best["model.init_args.learning_rate"])
    assert main(["fit", f"--config={folder}/best.yaml", "--evaluation.enabled=false", "--seed_everything=0"]) == 0
    (results,) = (folder / "best").rglob("results.json")
    assert json.loads(results.read_text())["status"] == "finished"
    (again,) = (folder / "best").rglob("metrics.csv")
    with again.open(newline="") as file:
        rows = [row["val/behavior_loss"] for row in csv.DictReader(file) if row["val/behavior_loss"]]
    assert rows == losses, "the configuration is the trial's"


@pytest.mark.slow
def test_a_search_by_fitted_q_evaluation(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    objective = {"metric": "ope/fqe_value", "direction": "maximize", "fqe_steps": 30}
    space = {"model.init_args.learning_rate": [1e-2, 3e-4]}
    search = write(**{**tiny_search(tmp_path), "objective": objective, "space": space, "seeds": [0, 1]})
    assert main(["sweep", f"--config={search}"]) == 0
    out = capsys.readouterr().out
    assert "maximizes ope/fqe_value, the last value of a run, which needs no environment: fitted Q evaluation" in out
    with (tmp_path / "search" / "trials.csv").open(newline="") as file:
        for trial in csv.DictReader(file):
            files = [*(tmp_path / "search" / trial["folder"]).rglob("fqe.json")]
            results = [json.loads(file.read_text()) for file in files]
            assert [result["options"]["steps"] for result in results] == [30, 30]
            assert all("that the policy's training held out" in result["held_out"] for result in results)
            assert float(trial["value"]) == pytest.approx(np.mean([result["value"] for result in results]))
    assert main(["sweep", f"--config={search}"]) == 0
    assert "2 finished trials: 2 complete" in capsys.readouterr().out


def seed_run(search: Search, root: Path) -> SeedRun:
    words = search.flags({"trainer.default_root_dir": str(root), "trainer.enable_progress_bar": False})
    return SeedRun(0, (*words, "--evaluation.enabled=false"), root)


def test_a_pruned_run_stops_at_the_end_of_a_block(write: Write, tmp_path: Path):
    many = {"trainer.max_steps": 10**6, "trainer.check_val_every_n_epoch": 2, "model.init_args.pretrain_steps": 10**5}
    search = read_search(write(**tiny_search(tmp_path, **many)), {})
    run = seed_run(search, tmp_path / "trial")
    reported: list[tuple[int, float]] = []

    def prune(step: int, value: float) -> bool:
        reported.append((step, value))
        return True

    outcome = run_trial([run, replace(run, seed=1)], search.objective, 10**6, prune)
    assert outcome == Outcome(pruned=True)
    assert len(reported) == 1
    assert reported[0] == run.values("val/behavior_loss")[0]
    results = json.loads((run.folder / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert 20 <= results["gradient_steps"] < 10**6
    assert results["gradient_steps"] % 5 == 0
    assert (run.folder / "checkpoints" / "last.ckpt").is_file()


def test_the_running_mean_is_over_seeds(tmp_path: Path):
    """Runs that are done already, as after a restart: their scores are read, nothing is trained."""
    objective = Objective("eval/x", "maximize", last=2)
    runs = []
    for seed, values in enumerate(([1, 2, 4], [5, 7, 9])):
        folder = tmp_path / f"seed_{seed}"
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"stage": "fit", "status": "finished"}))
        rows = "".join(f"{10 * (i + 1)},{value}\n{10 * (i + 1)},\n" for i, value in enumerate(values))
        (folder / "metrics.csv").write_text(f"step,eval/x\n{rows}")
        runs.append(SeedRun(seed, (), tmp_path))
    reported: dict[int, float] = {}

    def watch(step: int, value: float) -> bool:
        reported[step] = value
        return False

    outcome = run_trial(runs, objective, 30, watch)
    assert outcome.score == (3 + 8) / 2
    assert reported == {10: 1, 20: 1.5, 30: 3, 40: (3 + 5) / 2, 50: (3 + 6) / 2, 60: (3 + 8) / 2}
    assert run_trial(runs, replace(objective, metric="eval/y"), 30, watch).failure == (
        "no eval/y was logged; there are eval/x"
    )
    assert mean_of_last([], 3) is None


@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_run_that_it_was_in(write: Write, tmp_path: Path):
    epochs = {"data.steps_per_epoch": 50, "trainer.check_val_every_n_epoch": 10}
    entries = tiny_search(tmp_path, **{"trainer.max_steps": 500, **epochs})
    entries |= {
        "space": {"model.init_args.learning_rate": [3e-4]},
        "objective": {"metric": "train/behavior_loss", "direction": "minimize"},
    }
    path = write(**entries)
    command = [sys.executable, "-m", "lit_offrl", "sweep", f"--config={path}"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    folder = tmp_path / "search"
    first = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.rglob("last.ckpt")):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200)
    assert second.returncode == 0, second.stderr
    assert "trial 0: its worker is dead; it is tried again" in second.stdout
    assert "1 finished trials: 1 complete, 0 pruned; 1 failed or broken off" in second.stdout
    assert [path.name for path in (folder / "trials").iterdir()] == ["0000"]
    log = (folder / "trials" / "0000" / "seed_0.txt").read_text()
    assert log.count("run folder") == 2
    assert log.count("finished 500 gradient steps") == 1
    stopped = int(log.partition("stopped at gradient step ")[2].partition(";")[0].replace(",", ""))
    assert 50 <= stopped < 500, "what it left behind has stopped with it, and cleanly"
    (metrics,) = folder.rglob("metrics.csv")
    with metrics.open(newline="") as file:
        steps = [int(float(row["step"])) for row in csv.DictReader(file) if row["train/behavior_loss"]]
    assert steps == list(range(5, 501, 5)), "no block was trained twice, none left out"
