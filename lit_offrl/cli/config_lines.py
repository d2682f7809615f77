"""Where things stand in config files: what is wrong in one is named with its file and line.

The parser reads the files itself, but has lost their lines by the time it finds a wrong value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import yaml

from lit_offrl.cli.parser import CONFIG
from lit_offrl.errors import UserError

PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")}
MOST_NODES = 100_000  # a file of aliases of aliases can stand for more values than any memory holds
MOST_LEVELS = 50


def check_config(path: Path, groups: Collection[str] = ()) -> None:
    """Check that a file is YAML of keys and plain values.

    Args:
        path: The file.
        groups: Names of groups of options, which must hold some.

    Raises:
        UserError: It is not; the message names the line.
    """
    root = _compose(path)
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"config: {path} must hold keys and values")
    _check_size(path, root, {})
    lines: dict[str, int] = {}
    for name, key, value in _entries(root):
        place = f"config: {path} line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise UserError(f"{place}: '{getattr(key, 'value', key.tag)}' is no name of an option")
        if value.tag not in PLAIN_TAGS:
            raise UserError(f"{place}: the tag {value.tag.removeprefix('tag:yaml.org,2002:')} has no place here")
        if value.value == "???":
            raise UserError(f"{place}: {name} has no value: give one in place of ???")
        if (name in groups or key.value == "init_args") and not isinstance(value, yaml.MappingNode):
            raise UserError(f"{place}: {name} is a group of options: give some, or leave it out")
        if key.value == "class_path" and not isinstance(value, yaml.ScalarNode):
            raise UserError(f"{place}: {name} must be the name of a class")
        if (first := lines.setdefault(name, key.start_mark.line)) != key.start_mark.line:
            raise UserError(f"{place}: {name} stands in line {first + 1} already")


def with_place(message: str, pairs: Sequence[tuple[str, str | None]]) -> str:
    """Put file and line before a message about a key whose value comes from a config file.

    Args:
        message: Begins with the key, or holds it in quotes.
        pairs: The options of the command line, with the paths of configs; later ones win.
    """
    found = re.match(r"([\w.]+)(?=:)", message) or re.search(r"'([\w.]+)'", message)
    if found is None:
        return message
    for option, value in reversed(pairs):
        if option.lstrip("-") == found[1]:
            return message
        if option in CONFIG and value is not None:
            for name, key, _ in _entries(_compose(Path(value))):
                if name == found[1]:
                    return f"{value} line {key.start_mark.line + 1}: {message}"
    return message


def _compose(path: Path) -> yaml.Node | None:
    """Return the tree of a YAML file."""
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"config: {path} is no text in UTF-8 (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"config: {path} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f" line {mark.line + 1}"
        raise UserError(f"config: {path}{place} is no YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"config: {path} cannot be read as YAML: {error}") from error


def _check_size(path: Path, node: yaml.Node, sizes: dict[int, int], level: int = 0) -> int:
    """Return the number of nodes below one, with aliases counted as often as they are used."""
    if level > MOST_LEVELS:
        raise UserError(f"config: {path} line {node.start_mark.line + 1} is nested too deeply, or contains itself")
    if id(node) not in sizes:
        sizes[id(node)] = 1 + sum(_check_size(path, part, sizes, level + 1) for part in _parts(node))
    if sizes[id(node)] > MOST_NODES:
        raise UserError(f"config: {path} line {node.start_mark.line + 1} stands for too many values")
    return sizes[id(node)]


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _entries(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Yield the dotted name, the key and the value of every entry, groups included; not of lists."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}" if isinstance(key, yaml.ScalarNode) else prefix.rstrip(".")
            yield name, key, value
            yield from _entries(value, f"{name}.")
