"""The `data` subcommand."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_offrl.cli.configs import task_tables
from lit_offrl.cli.engine import add_engine_options, slurm_options
from lit_offrl.cli.parser import CommandParser
from lit_offrl.data.columns import LogColumns
from lit_offrl.errors import require
from lit_offrl.system.signals import stopping_at_once

if TYPE_CHECKING:
    from lit_offrl.data.info import DatasetInfo
    from lit_offrl.data.transitions import Transitions


def run_data(words: list[str]) -> int:
    """Run `data list | info | check | convert | collect`; return the exit code."""
    parser = CommandParser(prog="python -m lit_offrl data", description="List, describe, check or make datasets.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    commands.add_parser("list", help="what can be collected or downloaded, and what lies here")
    for name, text in (
        ("info", "what a dataset holds"),
        ("check", "what looks wrong with a dataset, and what training does about it"),
        ("convert", "write a dataset's transitions into a file of flat arrays, or as a Minari dataset"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("dataset", help="dataset id, or path of a file or folder of your own")
        for role in fields(LogColumns):
            text = "columns of a log, as in `fit`" if role.name == "observations" else argparse.SUPPRESS
            command.add_argument(f"--data.columns.{role.name}", type=_names, metavar="NAMES", help=text)
        if name == "convert":
            command.add_argument("destination", help="file to write, .npz or .hdf5, or id of a new Minari dataset")
    collect = commands.add_parser("collect", help="make a dataset in the real environment")
    collect.add_argument("dataset", help="id, e.g. offrl/antmaze/umaze-v0")
    collect.add_argument("--steps", type=int, help="number of transitions")
    collect.add_argument("--seed", type=int, default=0)
    collect.add_argument("--processes", type=int, help="worker processes (the result does not depend on it)")
    collect.add_argument("--overwrite", action="store_true", help="replace a dataset of this id")
    collect.add_argument("--shard", metavar="K/N", help="record every N-th episode from K, for a later collection")
    collect.add_argument("--shards", type=int, metavar="N", help="with --engine slurm: jobs that share the episodes")
    add_engine_options(collect)
    options = parser.parse_args(words)
    run = {"list": _list, "info": _info, "check": _check, "convert": _convert, "collect": _collect}
    return run[options.command](options)


def _list(options: argparse.Namespace) -> int:
    from lit_offrl.data.sources import SOURCES

    rows = [("dataset", "here", "steps", "license", "what it is")]
    for row in (row for source in SOURCES for row in source.listing()):
        size = "-" if row.size_mb is None else f"{row.size_mb:.0f} MB"
        steps = "" if row.steps is None else f"{row.steps:,}"
        rows.append((row.dataset, size, steps, row.license, row.description))
    width = max(len(dataset) for dataset, *_ in rows)
    for dataset, size, steps, license_, text in rows:
        print(f"{dataset:{width}}  {size:>7}  {steps:>9}  {license_:7}  {text}")
    print()
    for source in SOURCES:
        print(source.help())
    counts = ", ".join(f"{table.model} for {len(table.names)}" for table in task_tables())
    print(f"values of papers for original D4RL files, by `fit --model DTQL --task hopper-medium-v2`: {counts}")
    return 0


def _names(text: str) -> Any:
    """Return a name, or the names of a list in brackets."""
    return yaml.safe_load(text) if text.startswith("[") else text


def _load(options: argparse.Namespace) -> tuple[Transitions, DatasetInfo]:
    from lit_offrl.data import sources

    named = {role.name: getattr(options, f"data.columns.{role.name}") for role in fields(LogColumns)}
    return sources.load(options.dataset, columns=LogColumns(**named))


def _info(options: argparse.Namespace) -> int:
    import numpy as np

    from lit_offrl.data.inspection import histogram, usual_reward_rule

    transitions, info = _load(options)
    starts = transitions.episode_starts
    returns = transitions.episode_returns()
    lengths = np.diff([*starts, len(transitions)])
    keys = f" = {' + '.join(info.observation_keys)}" if info.observation_keys else ""
    rewards, actions = transitions.rewards, transitions.actions
    facts = {
        "dataset": f"{info.id} ({info.source})",
        "file": info.path if info.sha256 else "none: it is generated",
        "sha256": info.sha256,
        "transitions": f"{len(transitions):,} in {len(starts):,} episodes of {lengths.min()} to {lengths.max()} steps",
        "observations": f"{transitions.observation_dim} dimensions{keys}",
        "actions": f"{transitions.action_dim} dimensions from {actions.min():.3g} to {actions.max():.3g}",
        "episode ends": _ends(transitions),
        "rewards": f"{rewards.min():.3g} to {rewards.max():.3g}, raw unless --data.reward says otherwise; "
        f"usual here: {usual_reward_rule(info.id)}",
        "return": f"{returns.mean():.3g} +- {returns.std():.3g} per episode",
        "evaluation": _evaluation(info),
        "reference": _reference(info, float(returns.mean())),
    }
    for name, value in facts.items():
        if value is not None:
            print(f"{name:13} {value}")
    for note in info.notes:
        print(f"{'note':13} {note}")
    print("returns of episodes:")
    for line in histogram(returns):
        print(line)
    return 0


def _ends(transitions: Transitions) -> str:
    terminals, timeouts = int(transitions.terminals.sum()), int(transitions.timeouts.sum())
    if transitions.ends is None:
        return f"{terminals} terminal, {timeouts} timeouts"
    return f"{timeouts} timeouts; {terminals} terminal steps, after which episodes go on"


def _evaluation(info: DatasetInfo) -> str:
    from lit_offrl.envs.make import environment_for
    from lit_offrl.envs.protocol import protocol_of

    if info.environment is None:
        return info.environment_note or "unknown: name an environment with --data.environment"
    environment = environment_for(info)
    limit = f", at most {environment.max_episode_steps} steps" if environment.max_episode_steps else ""
    protocol = protocol_of(info, environment)
    differences = f"; {'; '.join(protocol.differences)}" if protocol.differences else ""
    return f"{environment.env_id}{limit} (rules {protocol.rules}{differences})"


def _reference(info: DatasetInfo, mean_return: float) -> str:
    from lit_offrl.envs.scores import reference_for

    reference = reference_for(info)
    if reference is None:
        return "none: returns are reported, no scores"
    if reference.measure == "success":
        return f"{reference.name}: the share of successful episodes, in percent"
    return (
        f"{reference.name}: return {reference.minimum:g} scores 0, {reference.maximum:g} scores 100; "
        f"the data's mean {reference.normalize(mean_return):.1f}"
    )


def _check(options: argparse.Namespace) -> int:
    from lit_offrl.data.inspection import findings

    transitions, info = _load(options)
    lines = list(findings(transitions, info.action_bounds))
    for note in info.notes:
        print(f"note: {note}")
    for line in lines:
        print(f"- {line}")
    print(f"{info.id}: {len(transitions):,} transitions, {len(lines) or 'no'} finding{'' if len(lines) == 1 else 's'}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from lit_offrl.data.export import write_transitions
    from lit_offrl.data.sources.minari import Minari, size_mb

    transitions, info = _load(options)
    target = options.destination
    if Minari().matches(target) and not Path(target).suffix:
        from lit_offrl.collect.convert import write_minari

        write_minari(transitions, info, target)
        where, size = f"the Minari dataset {target}", size_mb(target) or 0.0
    else:
        write_transitions(transitions, Path(target))
        where, size = target, Path(target).stat().st_size / 1e6
    print(
        f"wrote {len(transitions):,} transitions of {info.id} to {where} ({size:.1f} MB); train on it with "
        f"--data.dataset {target}"
    )
    return 0


def _collect(options: argparse.Namespace) -> int:
    from lit_offrl.collect.recorder import collect_dataset, collect_shard

    numbers: dict[str, Any] = {name: getattr(options, name) for name in ("steps", "seed", "processes")}
    given = slurm_options(options)
    if options.shards is not None or options.engine == "slurm":
        require(
            options.engine == "slurm", "--engine", "slurm beside --shards (here, --processes share the work)", "local"
        )
        return _submit_shards(options, numbers, given)
    with stopping_at_once():
        if options.shard is not None:
            shard, _, shards = options.shard.partition("/")
            require(shard.isdigit() and shards.isdigit(), "--shard", "K/N, e.g. 0/4", options.shard)
            path = collect_shard(options.dataset, int(shard), int(shards), **numbers)
            print(f"recorded shard {options.shard} in {path}; `data collect {options.dataset}` takes it up")
            return 0
        folder = collect_dataset(options.dataset, overwrite=options.overwrite, **numbers)
    print(f"collected {options.dataset} in {folder}; describe it with `data info {options.dataset}`")
    return 0


def _submit_shards(options: argparse.Namespace, numbers: Mapping[str, Any], given: Mapping[str, Any]) -> int:
    """Submit a job for each shard, and one that puts their episodes together."""
    from lit_offrl.collect.recorder import check_collection, working_folder
    from lit_offrl.data.sources.minari import minari_root
    from lit_offrl.jobs.local import Job
    from lit_offrl.jobs.slurm import make_executor, submit

    require((options.shards or 0) >= 1, "--shards", "at least 1", options.shards)
    check_collection(options.dataset, folder=minari_root() / options.dataset, overwrite=options.overwrite, **numbers)
    words = ["data", "collect", options.dataset]
    words += [f"--{name}={value}" for name, value in numbers.items() if value is not None]
    folder = working_folder(options.dataset)
    shards = [Job(f"shard {k}", [*words, f"--shard={k}/{options.shards}"]) for k in range(options.shards)]
    ids = submit(make_executor(folder, given), shards, folder, skip_finished=False)
    # Once all have ended, however they ended: it records what they leave.
    after = (
        {"dependency": ":".join(["afterany", *dict.fromkeys(each.partition("_")[0] for each in ids)])} if ids else {}
    )
    whole = Job("whole", [*words, *(["--overwrite"] if options.overwrite else [])])
    ids += submit(make_executor(folder, {**given, **after}), [whole], folder, skip_finished=False)
    print(f"{len(ids)} jobs submitted, {', '.join(ids)}; see what they do: python -m lit_offrl grid status {folder}")
    return 0
