"""The `sweep` subcommand."""

from __future__ import annotations

import argparse
from typing import Any

from lit_offrl.cli.configs import find_config
from lit_offrl.cli.engine import add_engine_options, run_on_engine, slurm_options
from lit_offrl.cli.parser import CommandParser
from lit_offrl.errors import UserError, require
from lit_offrl.jobs.local import Job, whole_numbers
from lit_offrl.system.signals import stopping_at_once


def run_sweep(words: list[str]) -> int:
    """Run `sweep --config FILE`; return the exit code."""
    workers = _workers_parser()
    several, others = workers.parse_known_args(words)
    options = _parser(workers).parse_args(others)
    from lit_offrl.search.space import read_search

    search = read_search(find_config(options.config), _changes(options))
    require(several.workers is None or several.workers >= 1, "--workers", "at least 1", several.workers)
    if several.workers is not None or several.engine == "slurm":
        jobs = [Job(f"worker {number}", ["sweep", *others]) for number in range(several.workers or 1)]
        at_once = several.workers if several.engine == "local" else None
        return run_on_engine(several, jobs, search.folder, at_once, repeat=True)
    slurm_options(several)  # refuses them without their engine
    from lit_offrl.cli.plan import run_search

    with stopping_at_once():
        run_search(search)
    return 0


def _workers_parser() -> CommandParser:
    parser = CommandParser(prog="python -m lit_offrl sweep", add_help=False, allow_abbrev=False)
    parser.add_argument("--workers", type=int, metavar="W", help="processes, or jobs of a cluster, that share the work")
    add_engine_options(parser)
    return parser


def _parser(parent: CommandParser) -> CommandParser:
    parser = CommandParser(
        prog="python -m lit_offrl sweep",
        description="Search hyper-parameters. The same command again goes on where it was stopped or killed, and "
        "joins in where it runs already.",
        parents=[parent],
    )
    parser.add_argument("--config", required=True, metavar="NAME", help="a search: a file, or search/dtql_antmaze")
    parser.add_argument("--trials", type=int, metavar="N", help="end with N finished trials, over all workers")
    parser.add_argument("--hours", type=float, metavar="H", help="begin no trial after H hours of trials")
    parser.add_argument("--seeds", metavar="0,1", help="train each trial with these seeds; its score is the mean")
    parser.add_argument("--sampler", help="tpe, random, qmc or grid")
    parser.add_argument("--pruner", help="none, median, percentile or hyperband")
    parser.add_argument("--storage", help="x.log (journal), x.db (SQLite) or a database URL; default FOLDER/study.log")
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
