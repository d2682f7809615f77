"""The description of a search: a YAML file with an objective and ranges of dotted config keys, checked when read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lit_offrl.errors import UserError, did_you_mean, require

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
RANGE_KEYS = ("low", "high", "log", "step", "choices")
OBJECTIVE_KEYS = ("metric", "direction", "last", "fqe_steps")
FQE_VALUE = "ope/fqe_value"
# The loss of one block of updates is noisy, so the score of a training loss is a mean over several blocks.
BLOCKS_PER_SCORE = 20
LARGEST_GRID = 10_000  # points
STEP_TOLERANCE = 1e-8  # of a step: 0.3 is not exactly 3 steps of 0.1 in binary


@dataclass(frozen=True)
class Objective:
    """How a trial is scored.

    Attributes:
        metric: A column of metrics.csv, e.g. `eval/normalized_score` or `train/behavior_loss`; or `ope/fqe_value`, the
            value by fitted Q evaluation at the end of a run.
        direction: `maximize` or `minimize`.
        last: The score of a run is the mean of this many last values of the metric.
        fqe_steps: Gradient steps of the fitted Q evaluation; None for the default of `evaluate`.
    """

    metric: str
    direction: Literal["maximize", "minimize"]
    last: int
    fqe_steps: int | None = None

    @property
    def evaluates(self) -> bool:
        """Whether the metric comes from an evaluation of the policy and not from a loss."""
        return self.metric.startswith("eval")

    @property
    def is_fqe(self) -> bool:
        """Whether a run is scored by fitted Q evaluation when it is finished."""
        return self.metric == FQE_VALUE

    @classmethod
    def of(cls, content: object) -> Objective:
        """Read the `objective` entry.

        Raises:
            UserError: A key is unknown or missing, or a value is out of range.
        """
        entries = _mapping(content, "objective", OBJECTIVE_KEYS)
        for name in ("metric", "direction"):
            if name not in entries:
                raise UserError(f"objective.{name} is missing, e.g. {{metric: eval/return_mean, direction: maximize}}")
        metric, direction = str(entries["metric"]), entries["direction"]
        if direction not in ("maximize", "minimize"):
            raise UserError(f"objective.direction: no '{direction}'; there are maximize and minimize")
        last = entries.get("last", 1 if metric.startswith(("eval", "val/", "ope/")) else BLOCKS_PER_SCORE)
        last, steps = _whole_number(last, "objective.last", minimum=1), entries.get("fqe_steps")
        require(steps is None or metric == FQE_VALUE, "objective.fqe_steps", f"left out without {FQE_VALUE}", steps)
        steps = None if steps is None else _whole_number(steps, "objective.fqe_steps", minimum=1)
        return cls(metric, direction, last, steps)


@dataclass(frozen=True)
class Parameter:
    """A dotted config key and its possible values: one of `choices`, or a number from `low` to `high`.

    Attributes:
        key: The key, e.g. `model.init_args.alpha`.
        choices: The possible values; None for a range.
        low: Smallest value of a range.
        high: Largest value of a range.
        log: Whether a range is searched on a logarithmic scale.
        step: Distance between the values of a range, starting at `low`; None for a continuous range.
    """

    key: str
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None

    @classmethod
    def of(cls, key: str, content: object) -> Parameter:
        """Read an entry of `space`: a list of choices, or `{low, high}` with `log: true` or `step`.

        Raises:
            UserError: A key is unknown or missing, or a value is out of range.
        """
        name = f"space.{key}"
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = {"choices": content}
        entries = _mapping(content, name, RANGE_KEYS, expected="a list of choices or {low, high}")
        if "choices" in entries:
            if len(entries) > 1 or not isinstance(entries["choices"], list) or not entries["choices"]:
                raise UserError(f"{name}: give a list of choices, or low and high")
            return cls(key, choices=tuple(entries["choices"]))
        if not {"low", "high"} <= set(entries):
            raise UserError(f"{name}: low and high are needed, e.g. {{low: 0.1, high: 10, log: true}}")
        low, high = _number(entries["low"], f"{name}.low"), _number(entries["high"], f"{name}.high")
        log = entries.get("log", False)
        require(isinstance(log, bool), f"{name}.log", "true or false", log)
        step = None if entries.get("step") is None else _number(entries["step"], f"{name}.step")
        require(low < high, f"{name}.low", f"below high ({high:g})", low)
        require(not log or low > 0, f"{name}.low", "positive where log is true", low)
        require(step is None or (step > 0 and not log), f"{name}.step", "positive, and without log", step)
        return cls(key, None, low, high, log, step)

    def distribution(self, default: object) -> Distribution:
        """Return Optuna's distribution for this parameter.

        Args:
            default: The value in the config, which determines the type.

        Raises:
            UserError: The parameter is a range, but `default` is no number; or `default` is a whole number, but the
                range is not of whole numbers.
        """
        if self.choices is not None:
            return CategoricalDistribution([self._typed(choice, default) for choice in self.choices])
        if isinstance(default, (bool, str, list, dict)):
            raise UserError(f"space.{self.key}: is {default!r} in the config: give a list of choices, not a range")
        if not _is_int(default):
            return FloatDistribution(self.low, self.high, log=self.log, step=self.step)
        for name, value in (("low", self.low), ("high", self.high), ("step", self.step or 1)):
            require(float(value).is_integer(), f"space.{self.key}.{name}", "a whole number, as in the config", value)
        return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))

    def points(self, distribution: Distribution) -> list[Any]:
        """Return all values of the parameter, for a grid.

        Raises:
            UserError: The range is continuous.
        """
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        if distribution.step is None or distribution.log:
            raise UserError(f"space.{self.key}: a grid needs a list of choices or a step")
        count = math.floor((distribution.high - distribution.low) / distribution.step + STEP_TOLERANCE) + 1
        return [distribution.low + i * distribution.step for i in range(count)]

    def value(self, default: object, distribution: Distribution) -> Any:
        """Return the value in the config in the form of the distribution, or None if it lies outside of the space."""
        value = self._typed(default, default)
        if isinstance(distribution, CategoricalDistribution):
            return next((choice for choice in distribution.choices if choice == value), None)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        steps = 0.0 if distribution.step is None else (value - distribution.low) / distribution.step
        inside = distribution.low <= value <= distribution.high and abs(steps - round(steps)) < STEP_TOLERANCE
        return value if inside else None

    @staticmethod
    def _typed(value: Any, default: object) -> Any:
        """Return a choice as the type of the value in the config; lists and mappings as JSON."""
        if isinstance(value, (list, dict)):
            return json.dumps(value)
        if isinstance(default, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
            with suppress(ValueError):
                return float(value)  # YAML reads 1e-4, which has no point, as a string
        return value


@dataclass(frozen=True)
class Search:
    """A search, as described by its YAML file and the flags of the command.

    Attributes:
        configs: Config files of `fit`; later files override earlier ones.
        space: The searched parameters by their keys.
        objective: How a trial is scored.
        overrides: Dotted keys and their values for all trials; they override the config files.
        trials: Number of finished trials at which the search ends; None for no limit.
        hours: Time in hours, over all restarts, after which no trial starts; None for no limit.
        seeds: Seeds of the runs of each trial; the trial's score is the mean over them.
        sampler: `name` of the sampler, and options of Optuna's class.
        pruner: `name` of the pruner, and options of Optuna's class.
        storage: Storage of the study; None for a SQLite file in the folder.
        folder: Folder of all files; its last part is the name of the study.
        seed: Seed of the sampler.
    """

    configs: tuple[str, ...]
    space: Mapping[str, Parameter]
    objective: Objective
    overrides: Mapping[str, Any]
    trials: int | None
    hours: float | None
    seeds: tuple[int, ...]
    sampler: Mapping[str, Any]
    pruner: Mapping[str, Any]
    storage: str | None
    folder: Path
    seed: int

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.folder.name

    def flags(self, *changes: Mapping[str, Any]) -> list[str]:
        """Return the arguments of `fit` for the configs and the overrides; `changes` override both, in order."""
        values = dict(self.overrides)
        for change in changes:
            values |= change
        # A class must come before its arguments.
        keys = sorted(values, key=lambda key: key.count("."))
        return [*(f"--config={path}" for path in self.configs), *(f"--{key}={as_text(values[key])}" for key in keys)]

    def grid(self, distributions: Mapping[str, Distribution]) -> Iterator[dict[str, Any]]:
        """Yield all points of the grid.

        Raises:
            UserError: A range is continuous, or the grid has more than `LARGEST_GRID` points.
        """
        points = [self.space[key].points(distribution) for key, distribution in distributions.items()]
        size = math.prod(map(len, points))
        require(size <= LARGEST_GRID, "sampler: grid", f"of at most {LARGEST_GRID:,} points", f"{size:,}")
        return (dict(zip(distributions, values, strict=True)) for values in product(*points))


def read_search(path: str | Path, changes: Mapping[str, Any]) -> Search:
    """Read a search from its YAML file.

    Args:
        path: The file.
        changes: Entries that replace those of the file; `overrides` are merged with the file's.

    Raises:
        UserError: The file does not exist, a key is unknown or missing, or a value is out of range.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"config: no file {path}") from error
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"config: {path} cannot be read: {error}") from error
    entries = _mapping(content, "", [field.name for field in fields(Search)])
    overrides = _mapping(entries.get("overrides") or {}, "overrides") | dict(changes.get("overrides", {}))
    entries = {**entries, **changes}
    for name in ("configs", "space", "objective"):
        if not entries.get(name):
            raise UserError(f"{name} is missing in {path}")
    configs = entries["configs"] if isinstance(entries["configs"], list) else [entries["configs"]]
    space = {key: Parameter.of(key, value) for key, value in _mapping(entries["space"], "space").items()}
    if both := sorted(set(space) & set(overrides)):
        raise UserError(f"{both[0]} is both searched and set: leave it out of one of space and overrides")
    if own := sorted({"seed_everything", "trainer.default_root_dir", "ckpt_path"} & {*space, *overrides}):
        raise UserError(f"{own[0]} is set by the search: use seeds and folder")
    seeds = entries.get("seeds", [0])
    valid = isinstance(seeds, list) and bool(seeds) and all(map(_is_int, seeds)) and len({*seeds}) == len(seeds)
    require(valid, "seeds", "a list of different whole numbers", seeds)
    trials, hours = entries.get("trials"), entries.get("hours")
    trials = None if trials is None else _whole_number(trials, "trials", minimum=1)
    hours = None if hours is None else _number(hours, "hours")
    require(hours is None or hours > 0, "hours", "positive", hours)
    sampler, pruner = _named(entries.get("sampler", "tpe"), "sampler"), _named(entries.get("pruner", "none"), "pruner")
    if trials is None and hours is None and sampler["name"] != "grid":
        raise UserError(f"trials or hours is missing in {path}: give at least one, e.g. trials: 30")
    storage = entries.get("storage")
    return Search(
        configs=tuple(map(str, configs)),
        space=space,
        objective=Objective.of(entries["objective"]),
        overrides=overrides,
        trials=trials,
        hours=hours,
        seeds=tuple(seeds),
        sampler=sampler,
        pruner=pruner,
        storage=None if storage is None else str(storage),
        folder=Path(entries.get("folder") or Path("runs") / "search" / Path(path).stem),
        seed=_whole_number(entries.get("seed", 0), "seed", minimum=0),
    )


def as_text(value: Any) -> str:
    """Return a value as text for the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def look_up(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key in a nested config; None if there is no such key."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each dotted key, or the whole key if two keys have the same last part."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: name if list(last.values()).count(name) == 1 else key for key, name in last.items()}


def _named(content: object, option: str) -> dict[str, Any]:
    """Return an entry `name` or `{name: ..., option: ...}` as a mapping."""
    if isinstance(content, str):
        return {"name": content}
    if content is None or content is False:
        return {"name": "none"}
    entries = _mapping(content, option)
    if "name" not in entries:
        raise UserError(f"{option}.name is missing, e.g. {option}: {{name: median, n_startup_trials: 5}}")
    return entries


def _mapping(
    content: object, option: str, allowed: Sequence[str] | None = None, expected: str = "keys and values"
) -> dict[str, Any]:
    """Return `content` after a check that it is a mapping from strings and has only `allowed` keys."""
    where = f"{option}: " if option else ""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{where or 'a search: '}must be {expected}, not {content!r}")
    for key in content:
        if allowed is not None and key not in allowed:
            raise UserError(f"{where}no key '{key}'{did_you_mean(key, allowed)}; there are {', '.join(allowed)}")
    return content


def _number(value: object, option: str) -> float:
    try:
        number = float(str(value))
    except ValueError:
        raise UserError(f"{option}: must be a number, not {value!r}") from None
    require(math.isfinite(number), option, "finite", value)
    return number


def _whole_number(value: Any, option: str, minimum: int) -> int:
    require(_is_int(value) and value >= minimum, option, f"a whole number from {minimum}", value)
    return int(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
