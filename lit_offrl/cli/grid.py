"""The `grid` subcommand: train every algorithm, task and seed of a table, and report the runs."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from lit_offrl.cli.configs import (
    ABLATION,
    CONF,
    TaskTable,
    algorithm_of,
    config_names,
    find_config,
    read_config,
    run_name,
    value_words,
)
from lit_offrl.cli.engine import add_engine_options, cancel_jobs, print_status, run_on_engine
from lit_offrl.cli.parser import CommandParser
from lit_offrl.errors import UserError, did_you_mean, require
from lit_offrl.jobs.local import Job, whole_numbers

DESCRIPTION = """Train every run of a grid, some at a time, and report them. A grid is a YAML file of conf/grids, or a
file of your own. Finished runs are left alone and interrupted runs go on, so that a grid can be stopped and started at
any time, and shared out over machines by --only or --seeds where the machines share the folder of runs. All other
options are options of `fit`, for every run. On a cluster, --engine slurm submits the runs as an array of jobs;
`grid status DIR` and `grid cancel DIR` then say what they do, and stop them, where DIR is the folder of the runs."""
ON_JOBS = {"status": print_status, "cancel": cancel_jobs}
ENTRIES = {"tasks", "variant", "configs", "datasets", "only", "options", "each", "label", "ablations"}


class Cell(NamedTuple):
    """An algorithm on a dataset.

    Attributes:
        algorithm: In lower case, as in run folders; with an ablation, `<algorithm>-<ablation>`.
        dataset: Id.
        words: The options of `fit` that choose both.
        label: Name of a variation, whose runs lie in a folder of this name; empty for none.
    """

    algorithm: str
    dataset: str
    words: tuple[str, ...]
    label: str = ""

    @property
    def name(self) -> str:
        """Name of its runs, without the seed."""
        return f"{self.algorithm}{f':{self.label}' if self.label else ''} {self.dataset}"


def run_grid(words: list[str]) -> int:
    """Run `grid NAME`; return the exit code."""
    if words and words[0] in ON_JOBS:
        if len(words) != 2:
            raise UserError(f"grid {words[0]}: give the folder of the runs: grid {words[0]} runs/NAME")
        return ON_JOBS[words[0]](Path(words[1]))
    parser = CommandParser(prog="python -m lit_offrl grid", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("grid", nargs="?", metavar="NAME", help="name or file of a grid; without it, list the grids")
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="runs of this '<algorithm>[:<label>] <dataset> <seed>'"
    )
    parser.add_argument("--methods", metavar="DTQL,IQL", help="runs of these algorithms; by default of all of the grid")
    parser.add_argument("--seeds", metavar="0,1,2", help="in place of the grid's")
    parser.add_argument("--parallel", metavar="N", help="runs at a time; by default one for each core")
    parser.add_argument("--root", metavar="DIR", help="folder of the runs; by default runs/NAME")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    add_engine_options(parser)
    options, fit_words = parser.parse_known_args(words)
    if options.grid is None:
        if fit_words:
            raise UserError(f"grid: give the name of a grid; there are {', '.join(config_names('grids'))}")
        print("\n".join(_listing()))
        return 0
    seeds, cells = read_grid(options.grid)
    if options.seeds is not None:
        seeds = whole_numbers("--seeds", options.seeds)
    if options.methods is not None:
        cells = _of_methods(cells, options.methods.split(","), options.grid)
    at_once = None if options.parallel is None else whole_numbers("--parallel", options.parallel)[0]
    root = options.root or f"runs/{grid_name(options.grid)}"
    # Seeds are the outer loop: a grid that is stopped early then has runs of every cell.
    jobs = []
    for seed in seeds:
        for cell in cells:
            folder = f"{root}/{cell.label}" if cell.label else root
            choice = [*cell.words, f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}"]
            jobs.append(Job(f"{cell.name} {seed}", ["fit", *choice, "--ckpt_path=auto", *fit_words]))
    jobs = [job for job in jobs if fnmatch(job.name, options.only)]
    if not jobs:
        raise UserError(f"--only {options.only} matches no run of {options.grid}; --list shows them")
    if options.list:
        for job in jobs:
            print(shlex.join(["python", "-m", "lit_offrl", *job.words]))
        return 0
    from lit_offrl.cli.report import run_report

    code = run_on_engine(options, jobs, Path(root), at_once)
    return code if options.engine == "slurm" else run_report([root]) or code


def _of_methods(cells: Sequence[Cell], methods: Sequence[str], grid: str) -> list[Cell]:
    """Return the cells of some algorithms.

    Raises:
        UserError: The grid has no runs of one of them.
    """
    names = [cell.algorithm.partition("-")[0] for cell in cells]  # a method comes with its ablations
    known = list(dict.fromkeys(names))
    for method in methods:
        if method.lower() not in known:
            hint = did_you_mean(method.lower(), known)
            raise UserError(f"--methods: {grid} has no runs of {method}{hint}; it has {', '.join(known)}")
    wanted = {method.lower() for method in methods}
    return [cell for cell, name in zip(cells, names, strict=True) if name in wanted]


def grid_name(grid: str) -> str:
    """Return the name of a grid that is given by its name or its file."""
    path = find_config(grid, "grids", "grid")
    packaged = path.is_relative_to(CONF / "grids")
    return path.relative_to(CONF / "grids").with_suffix("").as_posix() if packaged else path.stem


def read_grid(grid: str) -> tuple[list[int], list[Cell]]:
    """Return the seeds and the cells of a grid.

    Args:
        grid: Name of a packaged grid, or path of a file: `seeds`, a list, and `runs`, a list of entries. An entry names
            either `tasks`, a table of `conf/tasks`, and optionally one of its variants and patterns of the `only` tasks
            that are meant; or `configs`, and optionally the `datasets` to train each of them on. `options` are further
            options of `fit`, with a `label` that tells these runs from others; `each` gives lists of values of options,
            of which every combination is a variation with a label of its own. `ablations` are trained beside each run
            whose algorithm has them.

    Raises:
        UserError: There is no such grid, or an entry is wrong.
    """
    content = read_config(grid, "grids", "grid")
    seeds, runs = content.get("seeds"), content.get("runs")
    whole = isinstance(seeds, list) and bool(seeds) and all(type(seed) is int and seed >= 0 for seed in seeds)
    require(whole, f"seeds in {grid}", "a list of whole numbers", seeds)
    require(isinstance(runs, list) and bool(runs), f"runs in {grid}", "a list of entries", runs)
    assert isinstance(seeds, list)
    assert isinstance(runs, list)
    cells = [cell for entry in runs for cell in _varied_cells(entry, grid)]
    names = [cell.name for cell in cells]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{grid}: two entries train {twice[0]} in one folder: give one of them a label")
    return seeds, cells


def _varied_cells(entry: Any, grid: str) -> Iterator[Cell]:
    """Yield the cells of an entry with its options, once for each combination of the values of `each`."""
    cells = list(_cells(entry, grid))
    options, each, label = entry.get("options", {}), entry.get("each", {}), str(entry.get("label", ""))
    require(isinstance(options, dict), f"options in {grid}", "options with their values", options)
    lists = isinstance(each, dict) and all(isinstance(values, list) and values for values in each.values())
    require(lists, f"each in {grid}", "options with lists of values", each)
    require(not options or bool(label), f"label in {grid}", "given where there are options", label)
    for values in itertools.product(*each.values()):
        varied = dict(zip(each, values, strict=True))
        labels = [label, *(f"{name.rpartition('.')[2]}_{value}" for name, value in varied.items())]
        words = tuple(value_words({**options, **varied}))
        for cell in cells:
            yield cell._replace(words=cell.words + words, label="-".join(filter(None, labels)))


def _cells(entry: Any, grid: str) -> Iterator[Cell]:
    valid = isinstance(entry, dict) and ("tasks" in entry) != ("configs" in entry)
    require(valid, f"each entry of runs in {grid}", "either tasks: or configs: with their values", entry)
    if unknown := sorted(set(entry) - ENTRIES):
        raise UserError(f"{grid}: no key '{unknown[0]}'{did_you_mean(unknown[0], ENTRIES)}")
    ablations = {
        str(name): read_config(str(name), "ablations", f"ablations in {grid}") for name in entry.get("ablations", [])
    }

    def with_ablations(algorithm: str, dataset: str, words: tuple[str, ...]) -> Iterator[Cell]:
        yield Cell(run_name(algorithm, None), dataset, words)
        for name, values in ablations.items():
            if isinstance(values.get(algorithm), dict):
                yield Cell(run_name(algorithm, name), dataset, (*words, f"{ABLATION}={name}"))

    if "tasks" in entry:
        table = TaskTable.of(str(entry["tasks"]))
        variant = entry.get("variant")
        chosen = [] if variant is None else [f"--variant={variant}"]
        patterns = [str(each) for each in entry.get("only", ["*"])]
        tasks = [task for task in table.names if any(fnmatch(task, pattern) for pattern in patterns)]
        require(bool(tasks), f"only in {grid}", f"patterns of the tasks of {entry['tasks']}", entry.get("only"))
        for task in tasks:
            table.values(task, variant)  # raises where there is no such variant
            yield from with_ablations(table.model, task, (f"--model={table.model}", f"--task={task}", *chosen))
        return
    for name in entry["configs"]:
        config = read_config(name)
        algorithm = algorithm_of(config)
        if algorithm is None:
            raise UserError(f"{grid}: {name} sets no model.class_path")
        for dataset in entry.get("datasets") or [config["data"]["dataset"]]:
            yield from with_ablations(algorithm, dataset, (f"--config={name}", f"--data.dataset={dataset}"))


def _listing() -> Iterator[str]:
    names = config_names("grids")
    width = max(map(len, names))
    for name in names:
        seeds, cells = read_grid(name)
        comment = (CONF / "grids" / f"{name}.yaml").read_text().partition("\n")[0].removeprefix("# ")
        yield f"{name:{width}}  {len(cells) * len(seeds):>4} runs  {comment}"
