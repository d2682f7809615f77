"""The study: where it is kept, who takes which trial, when it ends, and what becomes of the trials of the dead.

Any number of workers, on one machine or many, share a study through its storage and nothing else. Two rules make them
end with exactly as many finished trials as were asked for, whoever is killed and whenever:

* A trial counts from the moment that a worker has taken it until it fails. A worker that finds as many others with
  smaller numbers as there are to be trials has come too late, and withdraws: numbers are given once and never change,
  so that all workers agree, without a lock that a dead one might hold.
* A trial whose worker is dead is recorded as failed and queued again with the same parameters. It goes on from its last
  checkpoint. A worker on this machine is dead when the operating system has dropped the lock on its file; one elsewhere
  when its heartbeat has not changed for `GRACE_S` on the clock of who looks. Optuna's own heartbeat knows databases
  only, runs only inside `optimize`, and takes minutes to notice even on the same machine; this one is for all storages.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import optuna
from filelock import FileLock, lock_descriptor
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PercentilePruner
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from lit_offrl.errors import RunFailure, UserError, did_you_mean, one_line
from lit_offrl.search.space import Search
from lit_offrl.search.trial import Outcome

T = TypeVar("T")

HEARTBEAT_S = 20.0
GRACE_S = 180.0
WAIT_S = 1.0
DATABASE_TIMEOUT_S = 60.0
# A trial that took so many workers with it is not tried again.
MOST_RETRIES = 3
# So many failures one after another are no accident of the parameters.
FAILURES_IN_A_ROW = 5
# Not CMA-ES: Optuna keeps its state in the study as a pickle, and loads that.
SAMPLERS: dict[str, type[BaseSampler]] = {
    "tpe": TPESampler,
    "random": RandomSampler,
    "qmc": QMCSampler,
    "grid": RandomSampler,  # it has nothing to say: all points are queued when the study is made
}
SAMPLER_DEFAULTS: dict[str, dict[str, Any]] = {
    # Parameters of one algorithm go together; and running trials of other workers are kept away from.
    "tpe": {"multivariate": True, "constant_liar": True},
    "qmc": {"scramble": True},
}
SAMPLER_NEEDS = {"qmc": "scipy"}
PRUNERS: dict[str, type[BasePruner]] = {
    "none": NopPruner,
    "median": MedianPruner,
    "percentile": PercentilePruner,
    "hyperband": HyperbandPruner,
}
PRUNER_DEFAULTS: dict[str, dict[str, Any]] = {"percentile": {"percentile": 50.0}}
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# Attributes of a trial
WORKER, HEARTBEAT, FAILURE, WITHDRAWN, ORIGIN, RETRIES = (
    "worker", "heartbeat", "failure", "withdrawn", "origin", "retries",
)  # fmt: skip


class LostTrialError(Exception):
    """Others have taken this worker for dead, e.g. because its machine was suspended, and its trial from it."""


# ---------------------------------------------------------------------------------------------------------- the storage


def open_study(
    search: Search,
    distributions: Mapping[str, BaseDistribution],
    own_values: Mapping[str, Any] | None,
    fingerprint: Mapping[str, Any],
) -> optuna.Study:
    """Return the study, made where there is none yet.

    Args:
        search: What is searched.
        distributions: The space.
        own_values: The config's own values, for the first trial; None where they lie outside of the space.
        fingerprint: What trials have to have in common to be compared; values are plain.

    Raises:
        UserError: The storage cannot be opened, or holds a study of this name that differs in this.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    common = json.loads(json.dumps(fingerprint))  # as it will be read again
    with folder_lock(search.folder):
        try:
            storage = _storage(search)
            direction = search.objective.direction
            try:
                study = optuna.create_study(study_name=search.name, storage=storage, direction=direction)
                study.set_user_attr("search", common)
            except DuplicatedStudyError:
                study = optuna.load_study(study_name=search.name, storage=storage)
                if study.user_attrs.get("search") != common and _is_void(study):
                    optuna.delete_study(study_name=search.name, storage=storage)
                    study = optuna.create_study(study_name=search.name, storage=storage, direction=direction)
                    study.set_user_attr("search", common)
        except UserError:
            raise
        except ImportError as error:
            drivers = "its driver for Python is not installed (postgresql: psycopg2-binary; mysql+pymysql: pymysql)"
            raise UserError(f"storage: {_shown(search)} cannot be opened: {drivers}") from error
        except Exception as error:  # of a database driver
            raise UserError(f"storage: {_shown(search)} cannot be opened ({one_line(error)[:200]})") from error
        _check_same(study, common, search)
        if not study.get_trials(deepcopy=False):
            # The sampler knows nothing yet; and so the best trial is never worse than the config.
            if own_values is not None:
                study.enqueue_trial(dict(own_values))
            if search.sampler["name"] == "grid":
                for point in search.grid(distributions):
                    study.enqueue_trial(point, skip_if_exists=own_values is not None and point == own_values)
    return study


def _storage(search: Search) -> BaseStorage:
    name = search.storage or str(search.folder / "study.db")
    path = Path(name)
    if "://" not in name and path.suffix in (".log", ".journal"):
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path)))
    if "://" not in name:
        if path.suffix not in (".db", ".sqlite", ".sqlite3"):
            raise UserError(f"storage: {name} is neither a .db file (SQLite), a .log file (journal) nor a database URL")
        path.parent.mkdir(parents=True, exist_ok=True)
        name = f"sqlite:///{path}"
    # A short timeout would let a worker fail that only has to wait for the others.
    arguments = {"timeout": DATABASE_TIMEOUT_S} if name.startswith("sqlite") else {}
    return RDBStorage(name, engine_kwargs={"connect_args": arguments})


def _is_void(study: optuna.Study) -> bool:
    """Whether no trial has come or will come to anything, as after a config that was refused: then it may change."""
    trials = study.get_trials(deepcopy=False)  # none at all: another worker is making the study just now
    return bool(trials) and all(trial.state == TrialState.FAIL for trial in trials)


def _shown(search: Search) -> str:
    """Return the storage without its password."""
    name = search.storage or str(search.folder / "study.db")
    scheme, separator, rest = name.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if separator else name


def _check_same(study: optuna.Study, common: Mapping[str, Any], search: Search) -> None:
    known = study.user_attrs.get("search")
    if known is None:  # whoever made it has died just then
        study.set_user_attr("search", common)
        return
    for key in sorted({*known, *common}):
        # An option that one side does not know came with another version of the package, and has its default here.
        comparable = key in known and key in common
        if known.get(key) != common.get(key) and (comparable or key.startswith("space.")):
            raise UserError(
                f"study '{search.name}' in {_shown(search)} was begun with {key} {known.get(key)}, not "
                f"{common.get(key)}: trials could not be compared; choose another folder"
            )


def folder_lock(folder: Path) -> FileLock:
    """Return the lock of a search folder; the operating system releases it when its process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".lock")


# ------------------------------------------------------------------------------------------------- sampler and pruner


def make_sampler(search: Search, trial: int) -> BaseSampler:
    """Return the sampler for a trial.

    It has a seed of the trial's own, so that several workers do not all draw the same; but for `qmc`, whose trials are
    points of one sequence.

    Raises:
        UserError: There is none of this name, an option is wrong, or it needs a package that is not there.
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
        search: What is searched.
        max_steps: Gradient steps of a trial, over all seeds.

    Raises:
        UserError: There is none of this name, or an option is wrong.
    """
    name = search.pruner["name"]
    defaults = dict(PRUNER_DEFAULTS.get(name, {}))
    if name == "hyperband":
        # Resources are gradient steps; with the usual reduction by 3 the shortest trials have a 27th of them.
        defaults |= {"min_resource": max(max_steps // 27, 1), "max_resource": max_steps}
    return _build("pruner", PRUNERS, search.pruner, defaults)


def _build(option: str, classes: Mapping[str, type[T]], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> T:
    name = given["name"]
    if name not in classes:
        raise UserError(f"{option}: no '{name}'{did_you_mean(str(name), classes)}; there are {', '.join(classes)}")
    cls = classes[name]
    options = {key: value for key, value in given.items() if key != "name"}
    known = [key for key in inspect.signature(cls.__init__).parameters if key != "self"]
    for key in options:
        if key not in known:
            raise UserError(f"{option}.{key}: {name} has no such option{did_you_mean(key, known)}")
    try:
        return cls(**{**{key: value for key, value in defaults.items() if key in known}, **options})
    except (TypeError, ValueError) as error:
        raise UserError(f"{option}: {error}") from error


# ---------------------------------------------------------------------------------------------------------- the workers


class Worker:
    """Takes trials of a study and runs them until the study is complete.

    Args:
        search: What is searched.
        study: The study.
        distributions: The space.
        train: Trains one trial; called with it, its first number over all retries, a function to call all the time,
            and the file descriptors that its processes are to keep open.
        say: Told about every trial that ends: the trial as recorded.
        tell: Told everything else worth a line.
    """

    def __init__(
        self,
        search: Search,
        study: optuna.Study,
        distributions: Mapping[str, BaseDistribution],
        train: Callable[[Trial, int, Callable[[], None], Sequence[int]], Outcome],
        say: Callable[[FrozenTrial], None],
        tell: Callable[[str], None],
    ) -> None:
        self.search = search
        self.study = study
        self.distributions = dict(distributions)
        self.train = train
        self.say = say
        self.tell = tell
        self.limit = search.trials if search.trials is not None else float("inf")
        self.failures = 0
        self.name = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        self._seen: dict[int, tuple[object, float]] = {}

    @property
    def locks(self) -> Path:
        """Folder of a file per worker, locked as long as it or a run of its lives."""
        return self.search.folder / "workers"

    def work(self) -> None:
        """Run trials until there are enough.

        Raises:
            RunFailure: One after another fails.
            UserError: The config's own values are refused.
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
                    if self.finished >= self.limit or (not others and self.nothing_to_begin):
                        return
                    if others and not waiting:
                        self.tell(f"no more trials to begin; waiting for {others} of other workers (Ctrl-C leaves)")
                        waiting = True
                    time.sleep(WAIT_S)
            finally:
                path.unlink(missing_ok=True)

    # ---------------------------------------------------------------- who takes which

    @property
    def finished(self) -> int:
        """Number of trials that are complete or pruned."""
        return len(self._trials(*FINISHED))

    @property
    def time_is_up(self) -> bool:
        """Whether trials have been running for as long as they may."""
        return self.search.hours is not None and busy_hours(self._trials()) >= self.search.hours

    @property
    def nothing_to_begin(self) -> bool:
        """Whether no trial will be begun again, unless one that is running fails."""
        whole_grid = self.search.sampler["name"] == "grid" and not self._trials(TrialState.WAITING)
        return self.time_is_up or whole_grid

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def claim(self) -> Trial | None:
        """Return a trial to run, with parameters; None where there are enough, or time is up."""
        with folder_lock(self.search.folder):
            trials = self._trials()
            if self.time_is_up:
                return None
            counted = [trial for trial in trials if trial.state != TrialState.FAIL]
            queued = any(trial.state == TrialState.WAITING for trial in trials)
            full = len(counted) >= self.limit or self.search.sampler["name"] == "grid"
            if (full and not queued) or self.finished >= self.limit:
                return None
            # Made anew: a search goes on after a restart as it would have without.
            self.study.sampler = make_sampler(self.search, trial=len(trials))
            trial = self.study.ask(self.distributions)
            trial.set_user_attr(WORKER, self.name)
        smaller = [each for each in self._trials() if each.number < trial.number and each.state != TrialState.FAIL]
        if len(smaller) >= self.limit:
            self._fail(trial, WITHDRAWN, True)
            return None
        return trial

    # ---------------------------------------------------------------- a trial

    def _run(self, trial: Trial, lock: int) -> None:
        origin = trial.user_attrs.get(ORIGIN, trial.number)
        beaten = -HEARTBEAT_S

        def tick() -> None:
            nonlocal beaten
            if time.monotonic() - beaten >= HEARTBEAT_S:
                beaten = time.monotonic()
                try:
                    trial.set_user_attr(HEARTBEAT, time.time())
                except UpdateFinishedTrialError as error:
                    raise LostTrialError from error

        try:
            outcome = self.train(trial, origin, tick, [lock])
            if outcome.failure is not None:
                self._fail(trial, FAILURE, outcome.failure)
            elif outcome.pruned:
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.study.tell(trial, outcome.score)
        except (LostTrialError, UpdateFinishedTrialError):
            self.tell(f"trial {trial.number}: taken over by another worker, which thought this one dead")
            return
        except BaseException:  # stopped: others, or a restart, go on with it
            with suppress(UpdateFinishedTrialError):
                trial.set_user_attr(HEARTBEAT, time.time())
            self._give_back(self.study.trials[trial.number], deaths=0)
            raise
        self.say(self.study.trials[trial.number])
        self.failures = self.failures + 1 if outcome.failure is not None else 0
        if outcome.bad_input and origin == 0:
            raise UserError(str(outcome.failure))
        if self.failures >= FAILURES_IN_A_ROW:
            raise RunFailure(f"{self.failures} trials in a row failed, the last one: {outcome.failure}")

    def _fail(self, trial: Trial, attribute: str, value: object) -> None:
        trial.set_user_attr(attribute, value)
        self.study.tell(trial, state=TrialState.FAIL)

    # ---------------------------------------------------------------- the dead

    def revive(self) -> None:
        """Record the trials of dead workers as failed, and queue them again."""
        for trial in self._trials(TrialState.RUNNING):
            if trial.user_attrs.get(WORKER) != self.name and self._is_dead(trial):
                again = self._give_back(trial, deaths=1)
                if again is not None:
                    then = "it is tried again" if again else "not again: it has taken too many with it"
                    self.tell(f"trial {trial.number}: its worker is dead; {then}")

    def _is_dead(self, trial: FrozenTrial) -> bool:
        worker = str(trial.user_attrs.get(WORKER, ""))
        if worker.rpartition("-")[0] == socket.gethostname():
            path = self.locks / worker
            try:
                with path.open("r+") as file:
                    dead = lock_descriptor(file.fileno(), blocking=False)
                if dead:  # else the worker lives, or one of its runs, which is about to stop
                    path.unlink(missing_ok=True)
                return dead
            except OSError:  # no such file: e.g. the other worker has another folder
                pass
        beat, now = trial.user_attrs.get(HEARTBEAT), time.monotonic()
        known, since = self._seen.setdefault(trial.number, (beat, now))
        if known != beat:
            self._seen[trial.number] = (beat, now)
            return False
        return now - since > GRACE_S

    def _give_back(self, trial: FrozenTrial, deaths: int) -> bool | None:
        """Record a trial as failed and queue it again.

        Returns:
            Whether it is queued, or None where another worker has been faster.
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
    """Return for how long at least one trial has been running, in hours: a study's age without its pauses."""
    spans = []
    for trial in trials:
        if trial.datetime_start is not None:
            until = trial.datetime_complete or datetime.now()
            if trial.state == TrialState.FAIL and FAILURE not in trial.user_attrs:  # recorded when it was noticed
                until = datetime.fromtimestamp(trial.user_attrs.get(HEARTBEAT, 0))
            spans.append((trial.datetime_start, max(until, trial.datetime_start)))
    seconds, covered = 0.0, datetime.min
    for start, until in sorted(spans):
        seconds += max((until - max(start, covered)).total_seconds(), 0.0)
        covered = max(covered, until)
    return seconds / 3600


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the best complete trial, the earliest of equals; None where there is none."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = 1 if study.direction == StudyDirection.MAXIMIZE else -1
    return max(complete, key=lambda trial: (sign * (trial.value or 0.0), -trial.number), default=None)
