"""The exceptions whose message is meant for the user's eyes."""

from __future__ import annotations

import difflib
import errno
import os
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

DEVICE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a full or broken disk answers, and a limit on the size of files."""


class UserError(Exception):
    """Bad input: one line that names the culprit and the remedy; the command line prints it and exits with code 2."""


class RunFailure(RuntimeError):  # noqa: N818 (it is not an error of the program)
    """A run that cannot go on, e.g. a loss that is not finite: one line, exit code 1, the last checkpoint intact."""


class SimulatorFailure(RunFailure):
    """An environment that raises, returns what is not finite, or whose process dies."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest allowed word, or an empty string where none is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def require(condition: bool, option: str, rule: str, value: object) -> None:
    """Raise `UserError` naming the option, the rule and the value unless the condition holds."""
    if not condition:
        raise UserError(f"{option}: must be {rule}, not {value}")


def one_line(error: BaseException) -> str:
    """Return the error's message without line breaks."""
    return " ".join(str(error).split())


def out_of_memory(error: BaseException) -> bool:
    """Return whether numpy, torch on a CPU or on a GPU, or Python itself has found too little memory."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def explain_memory(text: str) -> str:
    """Return what was too large for the memory, with its size, from the message of the allocator."""
    wanted = re.search(r"tried to allocate (\d+) bytes|Tried to allocate ([\d.]+ \w+)|allocate ([\d.]+ \w+) for", text)
    size = next(filter(None, wanted.groups()), None) if wanted else None
    size = f"{int(size) / 1e9:.1f} GB ({int(size):,} bytes)" if size and size.isdigit() else size
    return f"out of memory{f': {size} are needed at once' if size else ''}"


def explain_failure(error: Exception) -> str:
    """Return one line about an exception that nothing else has explained."""
    if out_of_memory(error):
        return f"{explain_memory(one_line(error))}: take smaller data, a smaller batch, or a machine with more memory"
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        remedy = ": make room, then give the same command again" if error.errno in DEVICE_ERRORS else ""
        return f"{where}{error.strerror or os.strerror(error.errno)}{remedy}"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return (
        f"{type(error).__name__}{place}: {one_line(error)[:300]} (not foreseen: LIT_OFFRL_TRACEBACK=1 shows where it "
        "comes from)"
    )
