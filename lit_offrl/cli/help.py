"""`fit --help`: the options that people type most, one line each."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_type_hints

from docstring_parser import parse as parse_docstring

from lit_offrl.algorithms import ALGORITHMS
from lit_offrl.cli.configs import expand_words, flatten, pair_options, read_config
from lit_offrl.cli.options import ACCELERATION, OPTION_GROUPS, TRAINER_DEFAULTS

WIDTH = 120
TRAINER = {
    "max_steps": "Gradient steps of the run, those of pretraining included.",
    "default_root_dir": "Folder of all runs; a run lies in ALGORITHM/DATASET/seed_K below it.",
    "accelerator": "cpu, gpu, or auto for a GPU where there is one.",
    "devices": "Number of devices on this machine.",
    "num_nodes": "Number of machines.",
    "strategy": "auto, or ddp for several devices.",
    "precision": "32-true or bf16-mixed.",
    "check_val_every_n_epoch": "Epochs from one evaluation to the next.",
    "logger": "Loggers beside TensorBoard and metrics.csv; false for metrics.csv alone.",
    "enable_progress_bar": "Whether to show a progress bar.",
}
RUN = (
    ("--config", "NAME", "Config file, or the name of one: dtql_antmaze, quick/dtql_antmaze. Later ones win."),
    ("--task", "ID", "Values of a paper for one task, e.g. hopper-medium-v2; needs --model or --config."),
    ("--variant", "NAME", "Whose values --task takes, where they differ: paper or authors."),
    ("--ablation", "no_q", "The control: the same policy, trained and chosen without its Q, in ALGORITHM-no_q/."),
    ("--model", "CLASS", "The algorithm; `python -m lit_offrl algorithms` lists them."),
    ("--seed_everything", "0", "Seed of the run."),
    ("--seeds", "0,1,2", "Train several seeds, each in a process of its own (fit only)."),
    ("--parallel", "N", "How many of these seeds train at a time; by default one for each core (fit only)."),
    ("--ckpt_path", "FILE", "Checkpoint to go on from; `last` for this run's, `auto` to start or go on as needed."),
    ("--trust", "", "Let the config.yaml beside --ckpt_path name code of other packages, which is then run."),
    ("--init_from", "FILE", "Start a new run from the weights of a checkpoint, e.g. on other data."),
    ("--overwrite", "true", "Start anew in a run folder that holds a run."),
)
NO_MODEL = ("", "", "Name an algorithm to see its options: --model DTQL --help, or --config NAME --help")


def short_help(command: str, words: Sequence[str]) -> str:
    """Return the help of a training command.

    Args:
        command: fit, validate, test or predict.
        words: The other words of the command line: a config or `--model` among them chooses the algorithm that is
            described, and the values that are shown.
    """
    values = _values_of(words)
    model = str(values.get("model.class_path") or values.get("model") or "").rpartition(".")[2]
    cls = ALGORITHMS.get(model)
    blocks = [
        (
            "run",
            [
                *RUN,
                *((f"--{name}", "auto" if name == "compile" else "false", text) for name, text in ACCELERATION.items()),
            ],
        ),
        ("data", list(_rows(OPTION_GROUPS["data"], "data.", values))),
        (f"model {model}" if cls else "model", list(_rows(cls, "model.init_args.", values)) if cls else [NO_MODEL]),
        ("evaluation", list(_rows(OPTION_GROUPS["evaluation"], "evaluation.", values))),
        ("trainer", [_trainer_row(name, text, values) for name, text in TRAINER.items()]),
    ]
    lines = [f"usage: python -m lit_offrl {command} --config NAME [options]", ""]
    lines += ["Options with their values, of the configs that are given or by default. Options win over configs."]
    for title, rows in blocks:
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines += ["", f"{title}:", *(_line(row, widths) for row in rows)]
    rest = ", ".join(group for group in OPTION_GROUPS if group not in ("data", "evaluation"))
    lines += ["", f"--help-all shows all options ({rest})."]
    return "\n".join(lines) + "\n"


def options_of(cls: type) -> Iterator[tuple[str, Any, str]]:
    """Yield the name, the default ("" for none) and the description's first sentence of each option of a class.

    The options of a group of options have names with dots.
    """
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= {each.arg_name: each.description or "" for each in parse_docstring(base.__doc__ or "").params}
    for name, (kind, parameter) in _parameters(cls).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            for inner, default, text in options_of(kind):
                yield f"{name}.{inner}", getattr(parameter.default, inner, default), text
        elif "(set from" not in texts.get(name, ""):
            default = "" if parameter.default is inspect.Parameter.empty else parameter.default
            text = " ".join(texts.get(name, "").replace("`", "").split())
            yield name, default, re.split(r"(?<=[^.]\.)\s+(?=[A-Z])", text, maxsplit=1)[0]


def _parameters(cls: type) -> dict[str, tuple[Any, inspect.Parameter]]:
    """Return type and parameter by name, with those that the constructor passes on to its parents as `**options`."""
    found: dict[str, tuple[Any, inspect.Parameter]] = {}
    passed_on = False
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        constructor: Any = base.__init__  # type: ignore[misc]
        kinds = get_type_hints(constructor)
        *own, last = inspect.signature(base).parameters.values()
        if last.kind is not inspect.Parameter.VAR_KEYWORD:
            own.append(last)
        for each in own:
            found.setdefault(each.name, (kinds.get(each.name), each))
        if last in own:
            break
        passed_on = True
    if not passed_on:
        return found
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False)
    accepted = vars(parser.get_defaults())  # a constructor gives some of its parents' parameters values of its own
    return {name: each for name, each in found.items() if name in accepted}


def _values_of(words: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pair_options(expand_words([word for word in words if not word.startswith("--help")])):
        if name == "--config" and value is not None:
            values.update(flatten(read_config(value)))
        elif value is not None:
            values[name.removeprefix("--")] = value
    if "model" in values:  # typed after or without a config
        values["model.class_path"] = values["model"]
    return values


def _rows(cls: type, prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, default, text in options_of(cls):
        yield f"--{prefix}{name}", _as_text(values.get(f"{prefix}{name}", default)), text


def _trainer_row(name: str, text: str, values: Mapping[str, Any]) -> tuple[str, str, str]:
    default = inspect.signature(OPTION_GROUPS["trainer"]).parameters[name].default
    return f"--trainer.{name}", _as_text(values.get(f"trainer.{name}", TRAINER_DEFAULTS.get(name, default))), text


def _line(row: tuple[str, str, str], widths: Sequence[int]) -> str:
    flag, value, text = row
    head = f"  {flag:{widths[0]}}  {value:{widths[1]}}  "
    return (head + textwrap.shorten(text, max(WIDTH - len(head), 60), placeholder=" ...")).rstrip()


def _as_text(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
