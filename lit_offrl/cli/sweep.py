"""The `sweep` subcommand."""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

from lit_offrl.cli.configs import find_config
from lit_offrl.cli.parser import CommandParser
from lit_offrl.errors import UserError
from lit_offrl.jobs.local import whole_numbers


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, with an exit code of its own."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def run_sweep(words: list[str]) -> int:
    """Run `sweep --config FILE`; return the exit code."""
    options = _parser().parse_args(words)
    from lit_offrl.cli.plan import run_search
    from lit_offrl.search.space import read_search

    search = read_search(find_config(options.config), _changes(options))
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        run_search(search)
    except Terminated:
        sys.stderr.write("stopped\n")
        return 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m lit_offrl sweep",
        description="Search hyper-parameters. The same command again goes on where it was stopped or killed, and "
        "joins in where it runs already.",
    )
    parser.add_argument("--config", required=True, metavar="NAME", help="a search: a file, or search/dtql_antmaze")
    parser.add_argument("--trials", type=int, metavar="N", help="end with N finished trials, over all workers")
    parser.add_argument("--hours", type=float, metavar="H", help="begin no trial after H hours of trials")
    parser.add_argument("--seeds", metavar="0,1", help="train each trial with these seeds; its score is the mean")
    parser.add_argument("--sampler", help="tpe, random, qmc or grid")
    parser.add_argument("--pruner", help="none, median, percentile or hyperband")
    parser.add_argument("--storage", help="x.db (SQLite), x.log (journal) or a database URL; default FOLDER/study.db")
    parser.add_argument("--folder", metavar="DIR", help="where everything goes; by default runs/search/NAME")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key for all; repeatable")
    return parser


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the entries of the file that flags replace."""
    names = ("trials", "hours", "sampler", "pruner", "storage", "folder")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.seeds is not None:
        changes["seeds"] = whole_numbers("--seeds", options.seeds)
    pairs = [pair.partition("=") for pair in options.set]
    if wrong := [key for key, sign, _ in pairs if not sign or not key]:
        raise UserError(f"--set: must be KEY=VALUE, not {wrong[0]}")
    changes["overrides"] = {key.lstrip("-"): value for key, _, value in pairs}
    return changes
