"""The progress bar of everything that takes a while."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0
CURSOR_UP = "\x1b[A"  # from the line of a second bar back to the first


class _Lines:
    """A text stream that turns the redrawing of a bar into lines, for log files."""

    def write(self, text: str) -> None:
        line = text.replace(CURSOR_UP, "").strip("\r\n")
        if line.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(
    description: str, total: int | None, *, initial: int = 0, disable: bool = False, unit: str = "step"
) -> tqdm[Any]:
    """Return a bar on stderr: redrawn in place on a terminal, a line every 15 seconds elsewhere.

    Args:
        description: What is going on.
        total: Number of units in all, where it is known.
        initial: Units that were done before.
        disable: Show nothing.
        unit: What is counted; `B` for bytes, which are shown in multiples of 1024.
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
