"""Child processes that run commands of the package: how they start, how they stop, and what a signal does to them.

The other processes of the package are not commands: environments live in `multiprocessing` workers (envs/rollout.py),
collectors answer requests on their standard input (collect/workers.py), and a film is one `subprocess.run`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

# A training stops after the current block of updates, or between two environment steps.
PATIENCE_S = 120.0
PR_SET_PDEATHSIG = 1  # prctl(2)


def package_command(words: Sequence[str]) -> list[str]:
    """Return the command line `python -m lit_offrl WORDS` for this interpreter."""
    return [sys.executable, "-m", "lit_offrl", *words]


def start(
    words: Sequence[str],
    output: Any,
    environment: Mapping[str, str] | None = None,
    inherited: Sequence[int] = (),
    detached: bool = False,
) -> subprocess.Popen[str]:
    """Start a command of the package.

    On Linux the command receives SIGTERM when the thread that started it ends, i.e. also when this process is killed:
    no training goes on that nobody knows of. On other systems it continues.

    Args:
        words: The command and its options.
        output: Open file for everything that the command prints, or `subprocess.PIPE`.
        environment: Its environment variables; None for those of this process.
        inherited: File descriptors that stay open in the command (not on Windows).
        detached: Give it a session of its own, so that Ctrl-C in the terminal does not reach it.
    """
    options: dict[str, Any] = {"start_new_session": detached, "pass_fds": inherited} if os.name == "posix" else {}
    if sys.platform == "linux":
        options["preexec_fn"] = _stop_with_parent
    return subprocess.Popen(
        package_command(words),
        stdin=subprocess.DEVNULL if detached else None,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        **options,
    )


def _stop_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def stop(process: subprocess.Popen[Any], patience_s: float = PATIENCE_S) -> None:
    """Send SIGTERM, wait, and kill the process if it is still alive after `patience_s` seconds."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class RunningProcesses:
    """The processes that a signal is forwarded to.

    Attributes:
        stopped: A signal has come; nothing more should be started.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._processes: list[subprocess.Popen[Any]] = []

    def add(self, process: subprocess.Popen[Any]) -> None:
        """Forward signals to this process, too."""
        self._processes.append(process)
        if self.stopped:  # the signal came while the process was started
            process.terminate()

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Ask all processes to stop; a terminal has sent SIGINT to them already, and a second one would kill them."""
        self.stopped = True
        for process in self._processes:
            if process.poll() is None and (number != signal.SIGINT or not sys.stdin.isatty()):
                process.terminate()


@contextmanager
def forwarding_signals() -> Iterator[RunningProcesses]:
    """Forward SIGINT and SIGTERM to the processes that are added, as SIGTERM."""
    running = RunningProcesses()
    before = {number: signal.signal(number, running.forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield running
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
