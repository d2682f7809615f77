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
usage: python -m lit_offrl <command> [options]

Offline reinforcement learning with diffusion policies.

commands:
  fit        train:  fit --config conf/dtql_antmaze.yaml [--config conf/quick.yaml] [flags]
  validate   score a checkpoint:  validate --ckpt_path runs/.../checkpoints/last.ckpt
  test       the same, under the name of a final test
  predict    actions for the dataset's observations
  data       list, info ID, check PATH, convert SRC DST, collect ID
  sweep      search hyper-parameters:  sweep --config conf/search/dtql_antmaze.yaml
  report     tables, learning curves and confidence intervals of runs:  report runs/
  <command> --help shows a command's options

flags people type most:
  --data.dataset offrl/antmaze/umaze-v0    --data.batch_size 256
  --trainer.max_steps 20000                --seed_everything 1
  --model.init_args.<hyper-parameter> X    --trainer.default_root_dir runs
  --ckpt_path last                         go on with a run that was stopped
  --seeds 0,1,2,3,4 [--parallel 2]         several seeds at once, each in a process of its own
"""
TRAINING = ("fit", "validate", "test", "predict")
COMMANDS = (*TRAINING, "data", "sweep", "report")


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
        sys.stderr.write(f"{_rank()}error: {one_line(error)}\n")
        return 2
    except RunFailure as error:
        sys.stderr.write(f"{_rank()}error: {one_line(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _rank() -> str:
    """Return which of several processes says something; nothing for the first one."""
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
    if command == "fit" and (seeds := pop_option(words, "--seeds")) is not None:
        return run_seeds(words, seeds, pop_option(words, "--parallel"))
    if command in TRAINING:
        from lit_offrl.cli.training import run_training
        from lit_offrl.system.memory import keep_freed_memory
        from lit_offrl.system.onednn import products_by_onednn

        keep_freed_memory()
        with products_by_onednn():
            return run_training(command, words)
    raise UserError(f"no command '{command}'{did_you_mean(command, COMMANDS)}; there are {', '.join(COMMANDS)}")
