"""The `data` subcommand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from lit_offrl.data import local
from lit_offrl.errors import UserError, did_you_mean


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help)")


def run_data(words: list[str]) -> int:
    """Run `data list | info ID | collect ID | check ID-or-PATH`; return the exit code."""
    parser = _Parser(prog="python -m lit_offrl data", description="Offline datasets: list, describe, collect, check.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    commands.add_parser("list", help="what can be collected and what lies here")
    for name, text in (("info", "what a dataset holds"), ("check", "what looks wrong with a dataset or file")):
        commands.add_parser(name, help=text).add_argument("dataset", help="dataset id or path of an HDF5 file")
    collect = commands.add_parser("collect", help="make a dataset in the real environment")
    collect.add_argument("dataset", help="id, e.g. offrl/antmaze/umaze-v0")
    collect.add_argument("--steps", type=int, help="number of transitions")
    collect.add_argument("--seed", type=int, default=0)
    collect.add_argument("--processes", type=int, help="worker processes (the result does not depend on it)")
    collect.add_argument("--overwrite", action="store_true", help="replace a dataset of this id")
    options = parser.parse_args(words)
    return {"list": _list, "info": _info, "check": _check, "collect": _collect}[options.command](options)


def _list(options: argparse.Namespace) -> int:
    from lit_offrl.collect.catalog import CATALOG

    here = set(local.local_datasets())
    print(f"{'id':34} {'here':5} what it is")
    for dataset in CATALOG.values():
        mark = "yes" if dataset.id in here else "-"
        print(f"{dataset.id:34} {mark:5} {dataset.description}; {dataset.steps:,} steps unless told otherwise")
    for dataset_id in sorted(here - set(CATALOG)):
        print(f"{dataset_id:34} {'yes':5} Minari dataset")
    print(f"local root: {local.minari_root()} (MINARI_DATASETS_PATH); '-': collected on first use or by `data collect`")
    return 0


def _load(dataset: str) -> Any:
    from lit_offrl.collect.catalog import CATALOG
    from lit_offrl.data import sources

    known = [*CATALOG, *local.local_datasets()]
    if not Path(dataset).exists() and not local.is_present(dataset):
        hint = f": run `data collect {dataset}`" if dataset in CATALOG else did_you_mean(dataset, known)
        raise UserError(f"no dataset '{dataset}' here{hint}; `data list` shows what there is")
    return sources.load(dataset)


def _info(options: argparse.Namespace) -> int:
    import numpy as np

    from lit_offrl.data.inspection import histogram

    transitions, info = _load(options.dataset)
    starts = transitions.episode_starts
    returns = transitions.episode_returns()
    lengths = np.diff([*starts, len(transitions)])
    keys = f" = {' + '.join(info.observation_keys)}" if info.observation_keys else ""
    facts = {
        "dataset": f"{info.id} ({info.source})",
        "file": info.path,
        "sha256": info.sha256,
        "transitions": f"{len(transitions):,} in {len(starts):,} episodes of {lengths.min()} to {lengths.max()} steps",
        "observations": f"{transitions.observation_dim} dimensions{keys}",
        "actions": f"{transitions.action_dim} dimensions",
        "episode ends": f"{int(transitions.terminals.sum())} terminal, {int(transitions.timeouts.sum())} timeouts",
        "return": f"{returns.mean():.3g} +- {returns.std():.3g} per episode",
        "evaluation": "unknown"
        if info.environment is None
        else f"{info.environment.env_id}, {info.environment.max_episode_steps} steps",
        "reference": "none"
        if info.reference is None
        else f"return {info.reference[0]:g} scores 0, {info.reference[1]:g} scores 100",
    }
    for name, value in facts.items():
        print(f"{name:13} {value}")
    print("returns of episodes:")
    for line in histogram(returns):
        print(line)
    return 0


def _check(options: argparse.Namespace) -> int:
    from lit_offrl.data.inspection import findings

    transitions, info = _load(options.dataset)
    lines = list(findings(transitions))
    for line in lines:
        print(f"- {line}")
    print(f"{info.id}: {len(transitions):,} transitions, {len(lines) or 'no'} finding{'' if len(lines) == 1 else 's'}")
    return 0


def _collect(options: argparse.Namespace) -> int:
    from lit_offrl.collect.recorder import collect_dataset

    folder = collect_dataset(
        options.dataset,
        steps=options.steps,
        seed=options.seed,
        processes=options.processes,
        overwrite=options.overwrite,
    )
    print(f"collected {options.dataset} in {folder}; describe it with `data info {options.dataset}`")
    return 0
