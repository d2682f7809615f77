"""The study of a search: its storage, and the workers that run its trials until there are enough.

Any number of workers, on one or several machines, share a study and the search's folder. Two rules give exactly the
requested number of finished trials, also if workers are killed:

* A worker claims a trial under the lock of the folder, while fewer than enough trials count. A trial counts from its
  claim until it fails.
* A worker holds a lock on its own file while it lives, or one of its runs. The operating system, or the server of a
  network file system, releases it when it dies. A trial of a dead worker is recorded as failed and queued again with
  the same parameters; it continues from its last checkpoint.

Optuna's own heartbeat does not serve: it needs a database, and writes into it without end. Its callback that tries a
trial again does not, either: it counts a trial that was stopped, e.g. preempted, like one that killed its worker.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import optuna
from filelock import FileLock, lock_descriptor
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PercentilePruner
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from lit_offrl.errors import RunFailure, UserError, did_you_mean, one_line
from lit_offrl.search.space import Distribution, Search
from lit_offrl.search.trial import Outcome

T = TypeVar("T")

WAIT_S = 1.0
DATABASE_TIMEOUT_S = 60.0
MOST_RETRIES = 3  # of a trial whose worker died
FAILURES_IN_A_ROW = 5  # end the search: the parameters are not their cause
# Without CMA-ES: Optuna stores its state in the study as a pickle, and loads it.
SAMPLERS: dict[str, type[BaseSampler]] = {
    "tpe": TPESampler,
    "random": RandomSampler,
    "qmc": QMCSampler,
    "grid": RandomSampler,  # unused: all points are queued when the study is made
}
# Parameters of an algorithm depend on each other; the liar avoids points that other workers are trying.
SAMPLER_DEFAULTS = {"tpe": {"multivariate": True, "constant_liar": True}, "qmc": {"scramble": True}}
SAMPLER_NEEDS = {"qmc": "scipy"}
PRUNERS: dict[str, type[BasePruner]] = {
    "none": NopPruner,
    "median": MedianPruner,
    "percentile": PercentilePruner,
    "hyperband": HyperbandPruner,
}
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# Attributes of a trial
WORKER, FAILURE, STOPPED, ORIGIN, RETRIES = ("worker", "failure", "stopped", "origin", "retries")


def open_study(
    search: Search,
    distributions: Mapping[str, Distribution],
    own_values: Mapping[str, Any] | None,
    fingerprint: Mapping[str, Any],
) -> optuna.Study:
    """Return the study; make it if it does not exist.

    Args:
        search: The search.
        distributions: The space.
        own_values: The values of the config, for the first trial; None if they lie outside the space.
        fingerprint: Everything that comparable trials have in common, in plain values.

    Raises:
        UserError: The storage cannot be opened, or holds a study of this name with another fingerprint.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    common = json.loads(json.dumps(fingerprint))  # as it is read from the storage
    with folder_lock(search.folder):
        try:
            storage = _storage(search)
            study = _create_or_load(search, storage)
            if study.user_attrs.get("search") not in (None, common):
                trials = study.get_trials(deepcopy=False)
                # The search may change if all trials failed, e.g. because the config was refused.
                if trials and all(trial.state == TrialState.FAIL for trial in trials):
                    optuna.delete_study(study_name=search.name, storage=storage)
                    study = _create_or_load(search, storage)
        except UserError:
            raise
        except ImportError as error:
            drivers = "its driver for Python is not installed (postgresql: psycopg2-binary; mysql+pymysql: pymysql)"
            raise UserError(f"storage: {_storage_name(search)} cannot be opened: {drivers}") from error
        except Exception as error:  # of a database driver
            raise UserError(f"storage: {_storage_name(search)} cannot be opened ({one_line(error)[:200]})") from error
        _check_same(study, common, search)
        if not study.get_trials(deepcopy=False):
            # The sampler knows nothing yet, and the best trial cannot be worse than the config.
            if own_values is not None:
                study.enqueue_trial(dict(own_values))
            if search.sampler["name"] == "grid":
                for point in search.grid(distributions):
                    study.enqueue_trial(point, skip_if_exists=own_values is not None and point == own_values)
    return study


def _create_or_load(search: Search, storage: BaseStorage) -> optuna.Study:
    direction = search.objective.direction
    return optuna.create_study(study_name=search.name, storage=storage, direction=direction, load_if_exists=True)


def _storage(search: Search) -> BaseStorage:
    name = _location(search)
    if "://" not in name:
        path = Path(name)
        if path.suffix not in (".db", ".sqlite", ".sqlite3", ".log", ".journal"):
            raise UserError(f"storage: {name} is neither a .db file (SQLite), a .log file (journal) nor a database URL")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".log", ".journal"):
            return JournalStorage(JournalFileBackend(name))
        name = f"sqlite:///{path}"
    # Workers wait for each other; a short timeout would make them fail.
    arguments = {"timeout": DATABASE_TIMEOUT_S} if name.startswith("sqlite") else {}
    return RDBStorage(name, engine_kwargs={"connect_args": arguments})


def _location(search: Search) -> str:
    """Return the name of the storage: a journal, unless the search has another, or began with the former default."""
    before = search.folder / "study.db"
    return search.storage or str(before if before.is_file() else search.folder / "study.log")


def _storage_name(search: Search) -> str:
    """Return the name of the storage without the password."""
    name = _location(search)
    scheme, separator, rest = name.partition("://")
    # Drivers also take user and password as options behind the question mark.
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}" if separator else name


def _check_same(study: optuna.Study, common: Mapping[str, Any], search: Search) -> None:
    known = study.user_attrs.get("search")
    if known is None:  # the worker that made the study died before it set this
        study.set_user_attr("search", common)
        return
    for key in sorted({*known, *common}):
        # An option that only one side has is new in one version of the package, and has its default value.
        comparable = key in known and key in common
        if known.get(key) != common.get(key) and (comparable or key.startswith("space.")):
            raise UserError(
                f"study '{search.name}' in {_storage_name(search)} was begun with {key} {known.get(key)}, not "
                f"{common.get(key)}: trials could not be compared; choose another folder"
            )


def folder_lock(folder: Path) -> FileLock:
    """Return the lock of a search folder; the operating system releases it when its process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".lock")


def make_sampler(search: Search, trial: int) -> BaseSampler:
    """Return the sampler for a trial.

    Its seed depends on the trial, so that workers draw different points; except for `qmc`, whose trials are points of
    one sequence.

    Raises:
        UserError: The name or an option is unknown, or a package is missing.
    """
    name = search.sampler["name"]
    package = SAMPLER_NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"sampler: {name} needs the package {package}: pip install {package}")
    seed = int(np.random.SeedSequence((search.seed, trial)).generate_state(1)[0]) if name != "qmc" else search.seed
    return _build("sampler", SAMPLERS, search.sampler, {**SAMPLER_DEFAULTS.get(name, {}), "seed": seed})


def make_pruner(search: Search, max_steps: int) -> BasePruner:
    """Return the pruner.

    Args:
        search: The search.
        max_steps: Gradient steps of a trial, over all seeds.

    Raises:
        UserError: The name or an option is unknown.
    """
    defaults: dict[str, dict[str, Any]] = {
        "percentile": {"percentile": 50.0},
        # Resources are gradient steps; with the default reduction factor of 3 the shortest trials have 1/27 of them.
        "hyperband": {"min_resource": max(max_steps // 27, 1), "max_resource": max_steps},
    }
    return _build("pruner", PRUNERS, search.pruner, defaults.get(search.pruner["name"], {}))


def _build(option: str, classes: Mapping[str, type[T]], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> T:
    name = given["name"]
    if name not in classes:
        raise UserError(f"{option}: no '{name}'{did_you_mean(str(name), classes)}; there are {', '.join(classes)}")
    cls = classes[name]
    options = {key: value for key, value in given.items() if key != "name"}
    known = list(inspect.signature(cls).parameters)
    for key in options:
        if key not in known:
            raise UserError(f"{option}.{key}: {name} has no such option{did_you_mean(key, known)}")
    try:
        return cls(**{**{key: value for key, value in defaults.items() if key in known}, **options})
    except (TypeError, ValueError) as error:
        raise UserError(f"{option}: {error}") from error


@dataclass(eq=False)
class Worker:
    """Runs trials of a study until the study is complete.

    Attributes:
        train: Trains one trial. Arguments: the trial, the number of its first attempt, and file descriptors that its
            processes keep open.
        report_trial: Called with each trial that ends.
        report: Called with every other message.
        name: Name of the worker.
    """

    search: Search
    study: optuna.Study
    distributions: Mapping[str, Distribution]
    train: Callable[[Trial, int, Sequence[int]], Outcome]
    report_trial: Callable[[FrozenTrial], None]
    report: Callable[[str], None]
    name: str = field(default_factory=lambda: f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}")

    def __post_init__(self) -> None:
        self.limit = math.inf if self.search.trials is None else self.search.trials
        self.failures = 0

    @property
    def locks(self) -> Path:
        """Folder with a file per worker, which is locked while the worker or one of its runs lives."""
        return self.search.folder / "workers"

    def work(self) -> None:
        """Run trials until there are enough.

        Raises:
            RunFailure: `FAILURES_IN_A_ROW` trials failed in a row.
            UserError: The first trial, with the config's own values, was refused.
        """
        self.locks.mkdir(parents=True, exist_ok=True)
        path = self.locks / self.name
        waiting = False
        with path.open("w") as lock:
            lock_descriptor(lock.fileno())  # a descriptor, unlike a FileLock, can be handed to the runs
            try:
                while True:
                    self.revive()
                    trial = self.claim()
                    if trial is not None:
                        self._run(trial, lock.fileno())
                        waiting = False
                        continue
                    others = len(self._trials(TrialState.RUNNING))
                    whole_grid = self.is_grid and not self._trials(TrialState.WAITING)
                    if self.finished >= self.limit or (not others and (self.time_is_up or whole_grid)):
                        return
                    if others and not waiting:
                        self.report(f"no more trials to begin; waiting for {others} of other workers (Ctrl-C leaves)")
                        waiting = True
                    time.sleep(WAIT_S)
            finally:
                path.unlink(missing_ok=True)

    @property
    def finished(self) -> int:
        """Number of trials that are complete or pruned."""
        return len(self._trials(*FINISHED))

    @property
    def time_is_up(self) -> bool:
        """Whether trials have been running for `hours`."""
        return self.search.hours is not None and busy_hours(self._trials()) >= self.search.hours

    @property
    def is_grid(self) -> bool:
        """Whether all trials were queued when the study was made."""
        return bool(self.search.sampler["name"] == "grid")

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def claim(self) -> Trial | None:
        """Return a trial to run, with parameters; None if there are enough, or time is up."""
        with folder_lock(self.search.folder):
            trials = self._trials()
            if self.time_is_up:
                return None
            queued = any(trial.state == TrialState.WAITING for trial in trials)
            full = self.is_grid or sum(trial.state != TrialState.FAIL for trial in trials) >= self.limit
            if (full and not queued) or self.finished >= self.limit:
                return None
            # A new sampler for each trial, so that a restarted search continues like an uninterrupted one.
            self.study.sampler = make_sampler(self.search, trial=len(trials))
            trial = self.study.ask(dict(self.distributions))
            trial.set_user_attr(WORKER, self.name)
            return trial

    def _run(self, trial: Trial, lock: int) -> None:
        origin = trial.user_attrs.get(ORIGIN, trial.number)
        try:
            outcome = self.train(trial, origin, [lock])
            if outcome.failure is not None:
                trial.set_user_attr(FAILURE, outcome.failure)
                self.study.tell(trial, state=TrialState.FAIL)
            elif outcome.pruned:
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.study.tell(trial, outcome.score)
        except UpdateFinishedTrialError:  # e.g. this machine was suspended
            self.report(f"trial {trial.number}: taken over by another worker, which thought this one dead")
            return
        except BaseException:  # stopped: another worker, or a restart, continues the trial
            with suppress(UpdateFinishedTrialError):
                trial.set_user_attr(STOPPED, True)
            self._give_back(self.study.trials[trial.number], deaths=0)
            raise
        self.report_trial(self.study.trials[trial.number])
        self.failures = self.failures + 1 if outcome.failure is not None else 0
        if outcome.bad_input and origin == 0:
            raise UserError(str(outcome.failure))
        if self.failures >= FAILURES_IN_A_ROW:
            raise RunFailure(f"{self.failures} trials in a row failed, the last one: {outcome.failure}")

    def revive(self) -> None:
        """Record trials of dead workers as failed, and queue them again."""
        with folder_lock(self.search.folder):  # a trial without a worker is then none that is just claimed
            for trial in self._trials(TrialState.RUNNING):
                if trial.user_attrs.get(WORKER) != self.name and self._is_dead(trial):
                    again = self._give_back(trial, deaths=1)
                    if again is not None:
                        then = "it is tried again" if again else "not again: it has taken too many with it"
                        self.report(f"trial {trial.number}: its worker is dead; {then}")

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Return whether nobody holds the lock of the trial's worker."""
        path = self.locks / str(trial.user_attrs.get(WORKER, ""))
        try:
            with path.open("r+") as file:
                dead = lock_descriptor(file.fileno(), blocking=False)
        except OSError:  # the worker ended
            return True
        if dead:
            path.unlink(missing_ok=True)
        return dead

    def _give_back(self, trial: FrozenTrial, deaths: int) -> bool | None:
        """Record a trial as failed and queue it again.

        Returns:
            Whether it is queued; None if another worker was faster.
        """
        try:
            self.study.tell(trial.number, state=TrialState.FAIL)
        except (UpdateFinishedTrialError, ValueError):
            return None
        retries = trial.user_attrs.get(RETRIES, 0) + deaths
        if retries > MOST_RETRIES:
            return False
        origin = trial.user_attrs.get(ORIGIN, trial.number)
        self.study.enqueue_trial(trial.params, user_attrs={ORIGIN: origin, RETRIES: retries})
        return True


def busy_hours(trials: Sequence[FrozenTrial]) -> float:
    """Return the hours in which at least one trial was running: the age of a study without its pauses.

    Nobody knows when a worker died: the trial that it had does not count, the one that continues it does.
    """
    spans = [
        (trial.datetime_start, trial.datetime_complete or datetime.now())
        for trial in trials
        if trial.datetime_start is not None
        and (trial.state != TrialState.FAIL or {FAILURE, STOPPED} & set(trial.user_attrs))
    ]
    seconds, covered = 0.0, datetime.min
    for start, until in sorted(spans):
        seconds += max((until - max(start, covered)).total_seconds(), 0.0)
        covered = max(covered, until)
    return seconds / 3600
