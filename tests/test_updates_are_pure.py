"""What runs inside an update never waits for the device: no scalar is read, nothing branches on tensors.

A look at the source of all that an update can reach by name; tests/test_acceleration.py traces the updates themselves.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lit_offrl"
ROOMS = ("algorithms", "networks", "diffusion")
UPDATES = {"update", "pretrain_update", "critic_update", "concurrent_update", "joint_update"}
# What is made once, by the first update of its kind, which always runs eagerly; and what runs between updates.
ELSEWHERE = {"make_labels", "make_support", "refresh", "__init__"}
READS = {"item", "tolist", "numpy", "cpu", "nonzero", "synchronize"}  # wait for the device
MAKES = {"tensor", "as_tensor", "from_numpy"}  # copies from the host
SHAPED_BY_DATA = {"nonzero", "unique", "masked_select", "argwhere", "bincount"}
REDUCTIONS = {"any", "all", "equal", "allclose", "isfinite"}
COUNTERS = {"gradient_step", "main_step"}  # an update knows the time by `due` only


def functions() -> dict[str, list[ast.FunctionDef]]:
    """Return all functions and methods of the rooms by name."""
    found: dict[str, list[ast.FunctionDef]] = {}
    for room in ROOMS:
        for path in sorted((PACKAGE / room).glob("*.py")):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    found.setdefault(node.name, []).append(node)
    return found


def names_in(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id


@cache
def reachable() -> dict[str, list[ast.FunctionDef]]:
    """Return the functions that updates can reach, by name; `nn.Module` calls reach every `forward`."""
    known, seen, queue = functions(), set(), {*UPDATES, "forward", "minimize"}
    while queue:
        name = queue.pop()
        if name in seen or name in ELSEWHERE or name not in known:
            continue
        seen.add(name)
        queue |= {each for function in known[name] for each in names_in(function)}
    return {name: known[name] for name in seen}


def offences(function: ast.AST) -> list[str]:
    """Return what a function must not do within an update."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if name in READS | SHAPED_BY_DATA or (of_torch and name in MAKES):
                found.append(f"line {node.lineno} calls {name}")
        elif isinstance(node, ast.Attribute) and node.attr in COUNTERS and isinstance(node.ctx, ast.Load):
            found.append(f"line {node.lineno} reads {node.attr}")
        tests = [node.test] if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)) else []
        calls = [each for test in tests for each in ast.walk(test) if isinstance(each, ast.Call)]
        names = [each.func.attr for each in calls if isinstance(each.func, ast.Attribute)]
        found += [f"line {node.lineno} branches on {name}()" for name in names if name in REDUCTIONS]
    return found


# Reached by name alone: acting shares names with training, and attributes with functions.
ACTING = {"sample_each", "guided_sample", "scale_of", "sample_actions", "figure_maps", "figure_paths", "sample_as"}
NAMESAKES = {"levels"}
TIMEKEEPERS = {"due"}  # reads the step where nothing has fixed what is due


def test_updates_reach_what_they_should():
    names = set(reachable())
    assert {"minimize", "rollout", "continuation", "action_gradient", "apply", "noised", "critic_loss"} <= names
    assert not names & ELSEWHERE


@pytest.mark.parametrize("name", sorted(set(reachable()) - ACTING - NAMESAKES - TIMEKEEPERS))
def test_nothing_waits_for_the_device(name: str):
    for function in reachable()[name]:
        assert not offences(function), f"{name}: {offences(function)}"


@pytest.mark.parametrize(
    ("source", "offence"),
    [
        ("loss.item()", "calls item"),
        ("x.cpu()", "calls cpu"),
        ("torch.tensor([1.0])", "calls tensor"),
        ("if x.any(): pass", "branches on any"),
        ("y = 1 if torch.isfinite(x).all() else 2", "branches on"),
        ("self.gradient_step % 2", "reads gradient_step"),
        ("mask.nonzero()", "calls nonzero"),
    ],
)
def test_the_check_finds_offences(source: str, offence: str):
    assert offence in " ".join(offences(ast.parse(source)))
