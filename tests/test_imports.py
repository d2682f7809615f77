"""The import rule: data flows one way, and the light commands stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lit_offrl"
COMMON = {"errors", "batch", "ranges", "system"}
ALLOWED = {  # room -> rooms of the package it may import, besides itself
    "networks": set(),
    "diffusion": set(),
    "data": COMMON,
    "envs": {"data", "run_folder", *COMMON},
    "collect": {"envs", "data", "__init__", *COMMON},
    "algorithms": {"networks", "diffusion", *COMMON},
    "policy": {"algorithms", *COMMON},
    "evaluate": {"algorithms", "networks", "data", *COMMON},
    "export": {"policy", "__init__", *COMMON},
    "callbacks": {"algorithms", "envs", "data", "run_folder", "__init__", *COMMON},
    "run_folder": {"data", "errors", "system"},
    "report": {"envs", "data", "errors"},
    "search": {"report", "errors", "system"},  # it trains through the command line, in processes of their own
    "jobs": {"data", "errors", "system", "main"},  # on a cluster a job calls the package's `main`
    "system": {"errors"},
    "ranges": {"errors"},
    "batch": set(),
    "errors": set(),
}
# What several papers make use of.
SHARED_BY_ALGORITHMS = {
    *("base", "module", "noise", "loop", "optimizers", "targets", "acting", "checkpoints", "options"),
    *("critic_losses", "vp_diffusion", "flow_policy", "energy_guided", "support"),
}
EXCEPTIONS = {("data/sources/offrl.py", "collect")}  # the source of collected datasets calls the collector


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "lit_offrl" else [f"lit_offrl.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lit_offrl":
                room = parts[1] if len(parts) > 1 else "__init__"
                rooms.add("__init__" if room.startswith("__") else room)
    return rooms


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_each_room_imports_only_what_it_may(room: str):
    files = sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    for path in files:
        relative = path.relative_to(PACKAGE).as_posix()
        extra = imported_rooms(path) - ALLOWED[room] - {room} - {to for file, to in EXCEPTIONS if file == relative}
        assert not extra, f"{relative} imports {sorted(extra)}"


# What is another algorithm with one part exchanged derives from it.
BUILDS_ON = {"bdpo_ablations": "bdpo", "edp": "dql", "rebrac": "td3bc"}


def test_algorithms_do_not_import_each_other():
    for path in (PACKAGE / "algorithms").glob("*.py"):
        if path.stem in ("__init__", *SHARED_BY_ALGORITHMS):
            continue
        modules = [n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        others = {m.rpartition(".")[2] for m in modules if m and m.startswith("lit_offrl.algorithms.")}
        base = BUILDS_ON.get(path.stem)
        assert not others - SHARED_BY_ALGORITHMS - {base}, path.name


def test_nobody_but_main_imports_the_command_line():
    for path in PACKAGE.rglob("*.py"):
        # The root's `main` is imported when it is first used.
        if path.stem != "__main__" and path.parent.name != "cli" and path != PACKAGE / "__init__.py":
            assert "cli" not in imported_rooms(path), path.name


def test_the_package_imports_on_every_system():
    unix_only = {"fcntl", "grp", "posix", "pwd", "resource", "termios"}
    for path in PACKAGE.rglob("*.py"):
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not names & unix_only, path.name


def test_a_wheel_has_every_room():
    rooms = [path.parent.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("__init__.py")]
    named = re.findall(
        r'^ {4}"(lit_offrl[.a-z0-9_]*)",$', (PACKAGE.parent / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert sorted(named) == sorted([".".join(room.parts) for room in rooms] + ["lit_offrl.conf"])


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import lit_offrl.cli; lit_offrl.cli.main(['--help'])", {"torch", "lightning", "numpy", "gymnasium"}),
        ("import lit_offrl.cli; lit_offrl.cli.main(['data', 'list'])", {"torch", "lightning", "gymnasium"}),
        (
            "import contextlib, lit_offrl.cli\n"
            "with contextlib.suppress(SystemExit): lit_offrl.cli.main(['evaluate', '--help'])",
            {"torch", "lightning", "numpy", "gymnasium"},
        ),
        (
            "import contextlib, lit_offrl.cli\n"
            "with contextlib.suppress(SystemExit): lit_offrl.cli.main(['sweep', '--help'])",
            {"torch", "lightning", "numpy", "gymnasium", "optuna", "matplotlib"},
        ),
        ("import lit_offrl.search.study, lit_offrl.search.trial", {"torch", "lightning", "gymnasium", "matplotlib"}),
        ("import lit_offrl.algorithms", {"gymnasium", "minari", "h5py"}),
    ],
)
def test_light_commands_stay_light(statement: str, forbidden: set[str]):
    code = f"import sys\n{statement}\nprint('LOADED', *sorted(m for m in sys.modules if '.' not in m))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(output.rpartition("LOADED")[2].split())
    assert not loaded & forbidden
