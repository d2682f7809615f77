"""What the campaign of faults shares: how a hostile command is tried, what must hold, and the count of tries."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import REPOSITORY

from lit_offrl.cli import main

# A run of two epochs of 20 updates that plays no episodes and draws nothing.
BANDIT = [
    *("fit", "--config=dtql_bandit", "--data.steps_per_epoch=20", "--data.block_size=10", "--data.batch_size=16"),
    *("--bandit.figures=false", "--bandit.samples=50", "--trainer.check_val_every_n_epoch=1", "--compile=false"),
    *("--model.init_args.hidden_dim=16", "--model.init_args.critic.hidden_dim=16", "--trainer.max_steps=40"),
    *("--model.init_args.pretrain_steps=20", "--trainer.enable_progress_bar=false"),
]
TALLY = "LIT_OFFRL_TALLY"  # environment variable: the file that counts tries and passes


@contextmanager
def trial(kind: str) -> Iterator[None]:
    """Count a try of this kind, and a pass if nothing is raised within."""
    passed = False
    try:
        yield
        passed = True
    finally:
        if (tally := os.environ.get(TALLY)) is not None:
            with Path(tally).open("a") as file:
                file.write(f"{int(passed)} {kind}\n")


def content(root: Path) -> dict[Path, bytes]:
    """Return all files below a folder."""
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def survives(words: Sequence[str], root: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command in this process; check what holds for every command, and return its exit code and its last line.

    It ends with code 0, or with a single line on standard error: with code 2, and then no file has been touched, or
    with code 1 after it had begun. An exception ends the test.
    """
    before = content(root)
    capfd.readouterr()
    code = main(words)
    output = capfd.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert code in (0, 1, 2), (words, output.err)
    assert len(lines) == (code != 0), (words, output.err)
    assert "Traceback" not in output.err
    if code == 2:
        assert content(root) == before, words
        assert len([line for line in output.err.splitlines() if not line.startswith("warning: ")]) == 1, output.err
    return code, lines[-1] if lines else ""


def environment(**more: str) -> dict[str, str]:
    """Return the environment variables of such a process: without the switch that shows tracebacks."""
    kept = {name: value for name, value in os.environ.items() if name != "LIT_OFFRL_TRACEBACK"}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **more}


def fails_in_one_line(command: Sequence[str], cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a process that must fail by itself, with one line and without a traceback."""
    done = subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, errors="replace", timeout=300
    )
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode > 0, (done.returncode, done.stdout[-500:], done.stderr[-2000:])
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert len(lines) == 1, done.stderr[-2000:]
    return done


def without_privileges(command: Sequence[str]) -> list[str]:
    """Return a command under which permissions hold for root, too."""
    if os.geteuid() != 0:
        return [*command]
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, as root passes over all permissions")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]


def on_small_disk(size: str, folder: Path, command: Sequence[str]) -> list[str]:
    """Return a command that runs with a file system of a size, e.g. `2m`, mounted at a folder, in its own namespace."""
    prefix = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare, and the right to mount in a namespace of one's own")
    mount = f'mount -t tmpfs -o size={size} small "$0" && exec "$@"'
    return [*prefix, "sh", "-c", mount, str(folder), *command]
