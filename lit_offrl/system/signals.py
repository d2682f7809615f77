"""Requests to stop: signals that a user, a terminal or a scheduler sends to a training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Ctrl-C; what schedulers and `kill` send; a closed terminal; what SLURM sends before a time limit (--signal=USR1@60);
# what submitit has it send.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)

Handlers = dict[signal.Signals, "Callable[[int, FrameType | None], object] | int | None"]


class Stopped(KeyboardInterrupt):
    """A signal asked the process to stop where there is nothing to save.

    Attributes:
        signal: The signal; the exit code is 128 and its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


def listen(handler: Callable[[int, FrameType | None], object]) -> Handlers:
    """Let `handler` receive the stop signals; return the handlers before.

    SIGHUP stays ignored where it is, as under `nohup`. Threads other than the main one cannot listen.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    is_ignored = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    heard = [number for number in STOP_SIGNALS if not (is_ignored and number == signal.SIGHUP)]
    return {number: signal.signal(number, handler) for number in heard}


def restore(handlers: Handlers) -> None:
    """Give the signals back to the handlers that `listen` has returned."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Within, a stop signal raises `Stopped`, which unwinds the process: files are closed and locks released."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = listen(stop)
    try:
        yield
    finally:
        restore(before)
