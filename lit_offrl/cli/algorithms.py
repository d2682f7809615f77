"""The `algorithms` subcommand."""

from __future__ import annotations

import sys

from lit_offrl.cli.parser import CommandParser


def run_algorithms(words: list[str]) -> int:
    """Run `algorithms`: print each algorithm with the first line of its description; return the exit code."""
    CommandParser(prog="python -m lit_offrl algorithms", description="List the algorithms.").parse_args(words)
    from lit_offrl.algorithms import ALGORITHMS

    width = max(map(len, ALGORITHMS))
    for name, cls in ALGORITHMS.items():
        summary = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        sys.stdout.write(f"{name:{width}}  {summary}\n")
    sys.stdout.write("\n`fit --model NAME --help` shows the options of an algorithm\n")
    return 0
