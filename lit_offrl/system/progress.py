"""The progress bar of long operations."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0
CURSOR_UP = "\x1b[A"  # from the line of a second bar back to the first


class _Lines:
    """A text stream that writes each state of a bar as a line, for log files."""

    def write(self, text: str) -> None:
        line = text.replace(CURSOR_UP, "").strip("\r\n")
        if line.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(
    description: str, total: int | None, *, initial: int = 0, disable: bool = False, unit: str = "step"
) -> tqdm[Any]:
    """Return a bar on standard error: redrawn in place in a terminal, else a line every 15 seconds.

    Args:
        description: Text before the bar.
        total: Number of units; None if unknown.
        initial: Units that are done already.
        disable: Show nothing.
        unit: Name of the unit; `B` shows bytes in multiples of 1024.
    """
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=unit == "B",
        unit_divisor=1024,
        disable=disable,
        mininterval=0.5 if terminal else SECONDS_BETWEEN_LINES,
        miniters=1,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        file=sys.stderr if terminal else _Lines(),
    )
