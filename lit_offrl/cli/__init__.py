"""The command line: which subcommand, and how its failures reach the user. Imports nothing heavy by itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lit_offrl import __version__
from lit_offrl.errors import RunFailure, UserError, did_you_mean, one_line
from lit_offrl.jobs.local import pop_option, run_seeds
from lit_offrl.system.ranks import launched_rank

HELP = """\
usage: lit-offrl <command> [options]      (or python -m lit_offrl <command> [options])

Offline reinforcement learning with diffusion policies.

commands:
  fit         train:  fit --config quick/dtql_antmaze  (minutes)  or  --config dtql_antmaze  (the paper's settings)
  validate    score a checkpoint:  validate --ckpt_path runs/.../checkpoints/last.ckpt
  test        the same, under the name of a final test
  predict     write the policy's actions for the dataset's observations
  algorithms  list the algorithms
  data        list, info ID, check PATH, convert SRC DST, collect ID
  sweep       search hyper-parameters:  sweep --config search/dtql_pointmaze
  grid        train all runs of a table:  grid paper/dtql  (without a name: list the tables)
  report      tables, learning curves and confidence intervals of runs:  report runs/

<command> --help shows the options of a command. People type most, after fit:
  --config NAME                            a config of the package, or a file; later ones win, options win over all
  --model DTQL --task hopper-medium-v2     the values of a paper for one task
  --data.dataset offrl/antmaze/umaze-v0    a dataset id, or the path of a file
  --model.init_args.<hyper-parameter> X    fit --model DTQL --help lists them
  --trainer.max_steps 20000                gradient steps
  --trainer.default_root_dir runs          folder of the runs
  --seed_everything 1                      or several seeds: --seeds 0,1,2,3,4 [--parallel 2]
  --ckpt_path last                         go on with a run that was stopped
"""
TRAINING = ("fit", "validate", "test", "predict")
COMMANDS = (*TRAINING, "algorithms", "data", "sweep", "grid", "report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0 success, 1 a failure during the run, 2 bad input (one line on stderr), 130 or 143 stopped by Ctrl-C or SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"lit_offrl {__version__}\n")
        return 0
    try:
        return _run(words[0], words[1:])
    except UserError as error:
        sys.stderr.write(f"{_rank_prefix()}error: {one_line(error)}\n")
        return 2
    except RunFailure as error:
        sys.stderr.write(f"{_rank_prefix()}error: {one_line(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _rank_prefix() -> str:
    """Return the prefix of an error message: the number of this process, or nothing for the first process."""
    return f"[rank {rank}] " if (rank := launched_rank()) else ""


def _run(command: str, words: list[str]) -> int:
    if command == "data":
        from lit_offrl.cli.data import run_data

        return run_data(words)
    if command == "sweep":
        from lit_offrl.cli.sweep import run_sweep

        return run_sweep(words)
    if command == "report":
        from lit_offrl.cli.report import run_report

        return run_report(words)
    if command == "grid":
        from lit_offrl.cli.grid import run_grid

        return run_grid(words)
    if command == "algorithms":
        from lit_offrl.cli.algorithms import run_algorithms

        return run_algorithms(words)
    if (
        command == "fit"
        and not {"-h", "--help", "--help-all"} & {*words}
        and (seeds := pop_option(words, "--seeds")) is not None
    ):
        return run_seeds(words, seeds, pop_option(words, "--parallel"))
    if command in TRAINING:
        from lit_offrl.cli.training import run_training
        from lit_offrl.system.memory import keep_freed_memory
        from lit_offrl.system.onednn import products_by_onednn

        keep_freed_memory()
        with products_by_onednn():
            return run_training(command, words)
    raise UserError(f"no command '{command}'{did_you_mean(command, COMMANDS)}; there are {', '.join(COMMANDS)}")
