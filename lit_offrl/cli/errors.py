"""One line for each error of the training commands: the option, what is wrong with it, and what was probably meant."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_offrl.algorithms import ALGORITHMS
from lit_offrl.cli.options import ACCELERATION, OPTION_GROUPS
from lit_offrl.errors import UserError, did_you_mean


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that it was raised from or while they were handled."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def user_error_behind(error: BaseException) -> UserError | None:
    """Return the bad input that the parser or Lightning has wrapped into an error of its own."""
    for each in chain_of(error):
        if isinstance(each, UserError):
            return each
        if isinstance(each, MisconfigurationException):
            return UserError(str(each))
    return None


def explain(message: str) -> str:
    """Reduce a parser's nested message to one line: the key, what is wrong, and what was probably meant."""
    text = " ".join(message.split())
    key = _first(r'[Pp]arser key "([^"]+)"', text)
    if "fit.data.dataset" in text and "required" in text:
        return "data.dataset is missing: give --data.dataset offrl/antmaze/umaze-v0, or a config with --config"
    if option := _first(r"Subcommand '\w+' does not accept option '([^']+)'", text):
        return f"no option '{option}'{did_you_mean(option, _flags())}; --help-all lists them"
    if group := _first(r"Parser key \"(\w+)\": Unable to load config", text):
        return f"{key}.init_args.{group}: is a group of options, not a single value"
    if "does not correspond to a subclass of" in text:
        others = f"; there are {', '.join(ALGORITHMS)}" if key == "model" else ""
        return f"{key}: the class is none that belongs there{others}"
    if "Not a valid subclass of" in text:
        return f"{key}: must be the name of a class, or class_path and init_args"
    if option := _first(r"Option '([^']+)' is not accepted", text):
        full = f"{key}.init_args.{option}" if key == "model" else (f"{key}.{option}" if key else option)
        return f"no option '{full}'{did_you_mean(option, _known_options())}; --help-all lists them"
    if wrong := re.search(
        r"given class_path '(?:\w+\.)*(\w+)': Group '([^']+)' does not accept option '([^']+)'", text
    ):
        return f"{key}: {wrong[1]} has no option '{wrong[2]}.{wrong[3]}'"
    if option := _first(r"[Uu]nrecognized arguments: (.+)", text):
        return f"unrecognized: {option}{did_you_mean(option.split()[0].split('=')[0].lstrip('-'), _flags())}"
    if name := _first(r"Expected a dot import path string: (\S+)", text):
        if key != "model":
            return f"{key}: no class '{name}'"
        names = list(ALGORITHMS)
        return f"{key}: no class '{name}'{did_you_mean(name, names)}; there are {', '.join(names)}"
    if package := _first(r"No module named '?([\w.]+)|Requirement '([\w.-]+)", text):
        return f"{key or 'a class of the configuration'}: needs the package {package}: pip install {package}"
    if wrong := re.search(r"class_path \S+ Parser key \"(\S+)\": Expected an? <class '(\w+)'>. Got value: (\S+)", text):
        return f"{key}.init_args.{wrong[1]}: must be {wrong[2]}, not {wrong[3]}"
    if wrong := re.search(r"Expected a <class '(\w+)'>\. Got value: (.+)", text):
        return f"{key}: must be {wrong[1]}, not {wrong[2]}"
    if wrong := re.search(r"class_path '(?:\w+\.)*(\w+)': the following arguments are required: ([\w, ]+?) -", text):
        return f"{key}: {wrong[1]} needs {wrong[2]}, e.g. --{key}.{wrong[2].split(',')[0]} VALUE after it"
    if path := _first(r'[Pp]ath "?(?!but )([^"]+?)"? (?:not accessible|does not exist)', text):
        return f"config: no file {path}"
    if "must be a mapping, not NoneType" in text:
        return f"{key or 'model.init_args'}: a group of options is null: leave it out, or give its options"
    if wrong := re.search(r"Subtypes: \[(.*?)\] Errors: (?:- Expected an? .*)Given value: (.+)", text):
        kinds = re.findall(r"<class '(\w+)'>|Literal\[(.*?)\]", wrong[1])
        return f"{key}: must be {' or '.join(filter(None, sum(kinds, ())))}, not {wrong[2]}"
    if reason := _first(r"Errors: - (.+?)(?: - Expected an? | Given value)", text):
        return f"{key}: {reason}" if key else reason
    return f"{key}: {text}" if key and key not in text else text


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return next(filter(None, match.groups()), None) if match else None


def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls).parameters)


def _known_options() -> list[str]:
    classes = (*ALGORITHMS.values(), *OPTION_GROUPS.values())
    return [name for cls in classes for name in _parameters(cls)]


def _flags() -> list[str]:
    grouped = [f"{group}.{name}" for group, cls in OPTION_GROUPS.items() for name in _parameters(cls)]
    own = [
        "config",
        "task",
        "variant",
        "ablation",
        "ckpt_path",
        "trust",
        "init_from",
        "seed_everything",
        "seeds",
        "parallel",
    ]
    own += ["overwrite", "model"]
    return [*own, *ACCELERATION, *grouped]
