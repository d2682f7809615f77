"""Config files by name, from any folder; the papers' values for single tasks; and the values of ablations."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import lit_offrl
from lit_offrl.cli.config_lines import check_config
from lit_offrl.cli.parser import CONFIG, split_options
from lit_offrl.errors import UserError, did_you_mean
from lit_offrl.run_folder import RunFolder

PACKAGE = Path(lit_offrl.__file__).parent
TRUST = "--trust"
ABLATION = "--ablation"
# Their values are classes where they hold a dot, else plain names.
CLASS_OPTIONS = ("class_path", "model", "logger", "callbacks", "profiler", "strategy", "accelerator", "plugins")
# In the repository `conf/` lies beside the package, in a wheel inside of it.
CONF = next((folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir()), PACKAGE / "conf")


def config_names(folder: str = "") -> list[str]:
    """Return the names of the packaged config files below a folder of `conf/`, without their suffix."""
    root = CONF / folder
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find_config(name: str, folder: str = "", option: str = "config") -> Path:
    """Return the path of a config file.

    Args:
        name: Path of a file, or the name of a packaged config, e.g. `dtql_antmaze`, `quick/dtql_antmaze` or
            `conf/dtql_antmaze.yaml`. A file that exists wins over a packaged config.
        folder: Folder of `conf/` that the names begin in.
        option: The option's name in the error message.

    Raises:
        UserError: There is neither such a file nor such a packaged config.
    """
    if Path(name).is_file():
        return Path(name)
    short = name.removeprefix("conf/").removeprefix(f"{folder}/").removesuffix(".yaml")
    path = CONF / folder / f"{short}.yaml"
    if not path.is_file():
        suggestion = did_you_mean(short, config_names(folder))
        raise UserError(f"{option}: no file {name}, and no config of this name comes with the package{suggestion}")
    return path


def read_config(name: str, folder: str = "", option: str = "config") -> dict[str, Any]:
    """Return the content of a config file.

    Raises:
        UserError: There is no such file, or it is not a YAML file of keys and values.
    """
    path = find_config(name, folder, option)
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{option}: {path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{option}: {path} must hold keys and values")
    return content


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and the values of a nested config."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def algorithm_of(config: Mapping[str, Any]) -> str | None:
    """Return the name of the algorithm that a config sets, or None where it sets none."""
    model = config.get("model")
    path = model.get("class_path") if isinstance(model, dict) else model
    return path.rpartition(".")[2] if isinstance(path, str) else None


@dataclass(frozen=True)
class TaskTable:
    """The values that a paper gives for single tasks, read from `conf/tasks/<algorithm>.yaml`.

    Attributes:
        model: Name of the algorithm.
        variants: Names of the variants, e.g. `paper` and `authors`, each with the values that all tasks have in
            common. The first variant is the default.
        keys: Config key of each column.
        tasks: The tasks of each base config: a row of column names under `columns`, and a row of values per task. The
            values of a column such as `eta.paper` belong to one variant only.
    """

    model: str
    variants: Mapping[str, Mapping[str, Any]]
    keys: Mapping[str, str]
    tasks: Mapping[str, Mapping[str, Sequence[Any]]]

    @classmethod
    @functools.cache  # reading one takes 40 ms, and a grid asks for every row
    def of(cls, algorithm: str) -> TaskTable:
        """Return the table of an algorithm.

        Raises:
            UserError: The algorithm has no table.
        """
        names = config_names("tasks")
        if algorithm.lower() not in names:
            raise UserError(f"--task: no values for tasks of {algorithm}; there are some of {', '.join(names)}")
        return cls(**read_config(algorithm.lower(), "tasks", "--task"))

    @property
    def names(self) -> list[str]:
        """Ids of the tasks."""
        return [task for rows in self.tasks.values() for task in rows if task != "columns"]

    def base_config(self, task: str) -> str:
        """Return the name of the config that the values of a task belong to.

        Raises:
            UserError: The table has no such task.
        """
        for base, rows in self.tasks.items():
            if task in rows and task != "columns":
                return base
        raise UserError(f"--task: no values of {self.model} for '{task}'{did_you_mean(task, self.names)}")

    def values(self, task: str, variant: str | None = None) -> dict[str, Any]:
        """Return the config keys and values of a task, the dataset included.

        Args:
            task: Id of the task, e.g. `hopper-medium-v2`.
            variant: Name of the variant; the first one by default.

        Raises:
            UserError: The table has no such task or variant.
        """
        rows = self.tasks[self.base_config(task)]
        variant = variant or next(iter(self.variants))
        if variant not in self.variants:
            raise UserError(f"--variant: must be {' or '.join(self.variants)} for {self.model}, not {variant}")
        values = {"data.dataset": task, **self.variants[variant]}
        for column, value in zip(rows["columns"], rows[task], strict=True):
            name, _, of_variant = column.partition(".")
            if of_variant in ("", variant):
                values[self.keys[name]] = value
        return values


def task_tables() -> list[TaskTable]:
    """Return the tables of all algorithms that have one."""
    return [TaskTable.of(name) for name in config_names("tasks")]


def run_name(algorithm: str, ablation: str | None) -> str:
    """Return the name that run folders and grids have for an algorithm, or for one of its ablations."""
    return f"{algorithm.lower()}-{Path(ablation).stem}" if ablation else algorithm.lower()


def ablation_values(name: str, algorithm: str) -> dict[str, Any]:
    """Return the hyper-parameters that take a part of an algorithm away.

    Args:
        name: Name of a file of `conf/ablations`, e.g. `no_q`, or path of a file. It holds the values by name of the
            algorithm, or the reason why there are none.
        algorithm: Name of the algorithm.

    Raises:
        UserError: There is no such ablation, or it has no values for the algorithm.
    """
    table = read_config(name, "ablations", ABLATION)
    values = table.get(algorithm)
    if isinstance(values, str):
        raise UserError(f"{ABLATION} {name}: {algorithm} has none: {values}")
    if not isinstance(values, dict):
        raise UserError(f"{ABLATION} {name}: no values for {algorithm}; there are some of {', '.join(table)}")
    return {f"model.init_args.{key}": value for key, value in values.items()}


def expand_words(words: Sequence[str]) -> list[str]:
    """Return the words of a training command with paths of configs for names, and values for `--task` and `--ablation`.

    Without a config, `--task` brings the base config of its table. The values of the table come after all configs and
    before all other options, so that options win; those of an ablation come last. A checkpoint without a config brings
    the config of its run.

    Raises:
        UserError: A config, a task, a variant or an ablation does not exist, or `--task` comes without an algorithm.
    """
    trusts = TRUST in words
    options, words = split_options([word for word in words if word != TRUST], "--task", "--variant", ABLATION)
    if options.task is not None:
        words = _with_values_of_task(words, options.task, options.variant)
    elif options.variant is not None:
        raise UserError("--variant belongs to --task, e.g. --task hopper-medium-v2 --variant paper")
    else:
        words = [word for pair in pair_options(words) for word in _as_words(pair)]
        words = _with_config_of_checkpoint(words, trusts)
    paths = [value for name, value in pair_options(words) if name == "--config" and value is not None]
    try:
        configs = [read_config(path) for path in paths]
    except UserError:
        return words  # whoever parses them knows the line that is wrong
    ablation = options.ablation or next((c["ablation"] for c in reversed(configs) if c.get("ablation")), None)
    if ablation is None:
        return words
    algorithm = _algorithm_in(pair_options(words), configs)
    if algorithm is None:
        raise UserError(f"{ABLATION} needs an algorithm: add --model DTQL, or a config such as --config dtql_mujoco")
    return [*words, f"{ABLATION}={ablation}", *value_words(ablation_values(str(ablation), algorithm))]


def _with_values_of_task(words: Sequence[str], task: str, variant: str | None) -> list[str]:
    pairs = pair_options(words)
    configs = [value for name, value in pairs if name in CONFIG and value is not None]
    algorithm = _algorithm_in([] if configs else pairs, [read_config(name) for name in configs])
    if algorithm is None:
        raise UserError("--task needs an algorithm: add --model DTQL, or a config such as --config dtql_mujoco")
    table = TaskTable.of(algorithm)
    return [
        *(f"--config={find_config(name)}" for name in configs or [table.base_config(task)]),
        *value_words(table.values(task, variant)),
        *(word for pair in pairs if pair[0] not in CONFIG for word in _as_words(pair)),
    ]


def _algorithm_in(pairs: Sequence[tuple[str, str | None]], configs: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the name of the algorithm that options set, or else the last of the configs that sets one."""
    given = next((value for name, value in reversed(pairs) if name in ("--model", "--model.class_path")), None)
    if given is not None:
        return given.rpartition(".")[2]
    return next(filter(None, map(algorithm_of, reversed(configs))), None)


def value_words(values: Mapping[str, Any]) -> list[str]:
    """Return config keys and values as words of a command line."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def pair_options(words: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return options with their values; the value is None where an option has none, or a word belongs to no option."""
    pairs: list[tuple[str, str | None]] = []
    for word in words:
        name, equals, value = word.partition("=")
        if re.match(r"-[^\d.]", word):
            pairs.append((name, value if equals else None))
        elif pairs and pairs[-1][0].startswith("-") and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], word)
        else:
            pairs.append((word, None))
    return pairs


def _as_words(pair: tuple[str, str | None]) -> list[str]:
    """Return an option as words, a config as the path of its file."""
    name, value = pair
    if value is None:
        return [name]
    if name in CONFIG:
        return [f"--config={find_config(value)}"]
    return [f"{name}={value}"] if name.startswith("--") else [name, value]


def _with_config_of_checkpoint(words: list[str], trusts: bool) -> list[str]:
    """Put the config.yaml of a checkpoint's run folder first where the user gave a checkpoint and no config.

    Raises:
        UserError: That file, which comes from whoever made the checkpoint, names code that is not of this package, and
            the user does not trust it.
    """
    given = dict(pair_options(words))
    checkpoint = given.get("--ckpt_path")
    if "--config" in given or checkpoint in (None, "last", "auto"):
        return words
    if not Path(checkpoint).is_file():
        raise UserError(f"ckpt_path: no checkpoint at {checkpoint}")
    config = RunFolder.of_checkpoint(checkpoint).path / "config.yaml"
    if not config.is_file():
        if any(name.startswith(("--model", "--data.")) for name in given):
            return words
        raise UserError(f"ckpt_path: there is no {config}: name the run's configuration with --config")
    check_config(config)  # else a few aliases of aliases keep `foreign_code` busy for ever
    if not trusts and (name := next(foreign_code(read_config(str(config), option="ckpt_path")), None)):
        raise UserError(
            f"ckpt_path: {config} names code of another package, {name}: it will be imported and run; add {TRUST} if "
            "you know where the file comes from"
        )
    return [f"--config={config}", *words]


def foreign_code(config: Any, key: str = "") -> Iterator[str]:
    """Yield what a config names that is imported from elsewhere: classes, and modules with environments."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from foreign_code(value, str(name))
    elif isinstance(config, list):
        for value in config:
            yield from foreign_code(value, key)
    elif isinstance(config, str):
        is_class = key in CLASS_OPTIONS and "." in config
        is_module = key == "environment" and ":" in config
        if (is_class or is_module) and not config.startswith("lit_offrl."):
            yield config
