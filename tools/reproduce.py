"""Train the runs of a table: every algorithm, task and seed of a grid, some at a time, and report them.

    python tools/reproduce.py --grid {paper/dtql,paper/bdpo,paper/bdpo_paper,paper/eda,quick} [--only PATTERN]
                              [--seeds 0,1,2] [--parallel N] [--root DIR] [--list] [options of fit]

`paper/...` are the tasks of `conf/tasks/...`, with five seeds: days to weeks of a GPU. `quick` is DTQL, BDPO, EDA and
AEPO on two collected datasets, cut to minutes a run by the quick overlays, with three seeds. `--only` takes the runs
whose name matches, e.g. `'*hopper*'`; `--list` prints the commands instead of running them. Runs that are finished are
left alone and those that were interrupted go on, so that a grid can be stopped and started at any time, and shared out
over machines by `--only` or `--seeds` where they share the folder of runs.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from lit_offrl.cli import main as command_line
from lit_offrl.jobs.local import Job, report_failures, run_jobs

CONF = Path(__file__).parent.parent / "conf"
QUICK_DATASETS = ("offrl/pointmaze/medium-v0", "offrl/halfcheetah/medium-replay-v0")
QUICK_OVERLAYS = {
    "dtql": {"pointmaze": ["quick_pointmaze"], "mujoco": ["quick", "quick_mujoco"]},
    "bdpo": {"pointmaze": ["quick_bdpo"], "mujoco": ["quick_bdpo"]},
    "eda": {"pointmaze": ["quick_eda", "quick_pointmaze_critic"], "mujoco": ["quick_eda"]},
    "aepo": {"pointmaze": ["quick_energy", "quick_pointmaze_critic"], "mujoco": ["quick_energy"]},
}


@dataclass(frozen=True)
class Task:
    """A cell of a table.

    Attributes:
        algorithm: Its name as run folders have it.
        dataset: Id.
        configs: Config files, later ones win.
    """

    algorithm: str
    dataset: str
    configs: tuple[Path, ...]

    def job(self, seed: int, root: str, words: Sequence[str]) -> Job:
        """Return the training of a seed."""
        flags = {
            "data.dataset": self.dataset,
            "seed_everything": seed,
            "trainer.default_root_dir": root,
            "ckpt_path": "auto",
        }
        configs = [f"--config={path}" for path in self.configs]
        name = f"{self.algorithm} {self.dataset} {seed}"
        return Job(name, ["fit", *configs, *(f"--{key}={value}" for key, value in flags.items()), *words])


def paper(folder: str) -> list[Task]:
    """Return the tasks of a folder of `conf/tasks`, whose first lines name the config that they overlay."""
    tasks = []
    for path in sorted((CONF / "tasks" / folder).glob("*.yaml")):
        base = re.match(r"# Overlay of conf/(\S+\.yaml)", path.read_text())
        if base is None:
            raise ValueError(f"{path} does not say in its first line what it overlays")
        tasks.append(Task(folder.partition("_")[0], path.stem, (CONF / base[1], path)))
    return tasks


def quick() -> list[Task]:
    """Return four algorithms on two collected datasets, cut to minutes."""
    tasks = []
    for algorithm, overlays in QUICK_OVERLAYS.items():
        for dataset in QUICK_DATASETS:
            domain = "pointmaze" if "pointmaze" in dataset else "mujoco"
            names = (f"{algorithm}_{domain}", *overlays[domain])
            tasks.append(Task(algorithm, dataset, tuple(CONF / f"{name}.yaml" for name in names)))
    return tasks


PAPERS = ("dtql", "bdpo", "bdpo_paper", "eda")
GRIDS = {
    **{f"paper/{name}": (lambda name=name: paper(name), "0,1,2,3,4") for name in PAPERS},
    "quick": (quick, "0,1,2"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, required=True)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of '<algorithm> <dataset> <seed>'")
    parser.add_argument("--seeds", type=lambda text: [int(each) for each in text.split(",")], metavar="0,1,2")
    parser.add_argument("--parallel", type=int, metavar="N", help="runs at a time; by default one for each core")
    parser.add_argument("--root", help="where the runs go; by default runs/<grid>")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    given, words = parser.parse_known_args(arguments)
    make, seeds = GRIDS[given.grid]
    numbers = given.seeds or [int(each) for each in seeds.split(",")]
    # Seeds outside: a grid that was stopped early has something to say about every task.
    root = given.root or f"runs/{given.grid}"
    jobs = [task.job(seed, root, words) for seed in numbers for task in make()]
    jobs = [job for job in jobs if fnmatch(job.name, given.only)]
    if not jobs:
        parser.error(f"--only {given.only} matches no run of {given.grid}")
    if given.list:
        for job in jobs:
            print(shlex.join(["python", "-m", "lit_offrl", *job.words]))
        return 0
    code = report_failures(jobs, run_jobs(jobs, given.parallel))
    return command_line(["report", root]) or code


if __name__ == "__main__":
    sys.exit(main())
