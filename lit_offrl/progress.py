"""The progress bar of everything that takes a while."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0


class _Lines:
    """A text stream that turns the redrawing of a bar into lines, for log files."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n")
        if line.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(description: str, total: int, *, initial: int = 0, disable: bool = False) -> tqdm[Any]:
    """Return a bar in steps, on stderr: redrawn in place on a terminal, a line every 15 seconds elsewhere."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        desc=description,
        total=total,
        initial=initial,
        unit="step",
        disable=disable,
        mininterval=0.5 if terminal else SECONDS_BETWEEN_LINES,
        miniters=1,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        file=sys.stderr if terminal else _Lines(),
    )
