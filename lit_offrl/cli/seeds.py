"""`fit --seeds`: a training with several seeds, a job for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_offrl.cli.configs import ABLATION, pair_options
from lit_offrl.cli.engine import run_on_engine, split_engine, starts_anew
from lit_offrl.cli.parser import CONFIG
from lit_offrl.errors import UserError
from lit_offrl.jobs.local import Job, whole_numbers

# Options that tell one training from another.
NAMING = (*CONFIG, "--model", "--task", "--variant", ABLATION, "--data.dataset")


def run_seeds(words: Sequence[str], seeds: str, at_once: str | None = None) -> int:
    """Train several seeds; return the exit code.

    Each seed is the run of `fit --seed_everything SEED`, in the same run folder. A finished run is left as it is, an
    interrupted run is continued.

    Args:
        words: The words after `fit`, without the seeds.
        seeds: Comma-separated list, e.g. "0,1,2".
        at_once: Number of runs at a time.

    Raises:
        UserError: A number is wrong, or `words` hold an option of a single run.
    """
    engine, words = split_engine(words)
    numbers = whole_numbers("--seeds", seeds)
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds: {seeds} names a seed twice")
    for single in ("--seed_everything", "--ckpt_path"):
        if any(word.partition("=")[0] == single for word in words):
            raise UserError(f"{single} belongs to a single run: leave it out beside --seeds")
    resume = [] if starts_anew(words) else ["--ckpt_path=auto"]
    # The index of a cluster's jobs has those of all trainings below its root.
    what = [f"{value} " for name, value in pair_options(words) if name in NAMING] if engine.engine == "slurm" else []
    jobs = [
        Job(f"{''.join(what)}seed {seed}", ["fit", *words, f"--seed_everything={seed}", *resume]) for seed in numbers
    ]
    root = dict(pair_options(words)).get("--trainer.default_root_dir") or "runs"
    return run_on_engine(engine, jobs, Path(root), None if at_once is None else whole_numbers("--parallel", at_once)[0])
