"""The command line: which subcommand, and how its failures reach the user. Imports nothing heavy by itself."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_offrl import __version__
from lit_offrl.cli.parser import split_options
from lit_offrl.errors import DEVICE_ERRORS, RunFailure, UserError, did_you_mean, explain_failure, one_line
from lit_offrl.system.memory import keep_freed_memory, limit_memory
from lit_offrl.system.ranks import launched_rank
from lit_offrl.system.signals import stopping_at_once

HELP = """\
usage: lit-offrl <command> [options]      (or python -m lit_offrl <command> [options])

Offline reinforcement learning with diffusion policies.

commands:
  fit         train:  fit --config quick/bdpo_mujoco  (minutes)  or  --config dtql_antmaze  (the paper's settings)
  validate    score a checkpoint:  validate --ckpt_path runs/.../checkpoints/last.ckpt
  test        the same, under the name of a final test
  predict     write the policy's actions for the dataset's observations
  evaluate    value a policy without an environment:  evaluate --ckpt_path runs/.../checkpoints/last.ckpt
  algorithms  list the algorithms
  data        list, info ID, check PATH, convert SRC DST, collect ID
  sweep       search hyper-parameters:  sweep --config search/dtql_pointmaze
  grid        train all runs of a table:  grid paper/dtql  (without a name: list the tables)
  report      tables, learning curves and confidence intervals of runs:  report runs/
  export      write a policy to a file that acts without this package:  export --ckpt_path CKPT --format onnx

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
OTHERS = ("evaluate", "export", "algorithms", "data", "sweep", "grid", "report")
COMMANDS = (*TRAINING, *OTHERS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0 success, 1 a failure during the run, 2 bad input (one line on stderr), 128 and the signal's number
    where a signal stopped it: 130 for Ctrl-C, 143 for SIGTERM. With LIT_OFFRL_TRACEBACK=1 in the environment, errors
    that are not the user's keep their traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± gets a question mark
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"lit_offrl {__version__}\n")
        return 0
    limit_memory()
    try:
        with _quiet_threads():
            code = _run(words[0], words[1:])
        sys.stdout.flush()  # here, where a full disk or a closed pipe is reported like any other failure
        return code
    except (UserError, RunFailure) as error:
        _print_error(one_line(error))
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt as request:
        sys.stderr.write("stopped\n")
        return 128 + getattr(request, "signal", signal.SIGINT)
    except BrokenPipeError:  # the reader of our output (head, less) has gone: what was not done is not done
        _write_no_more()
        _print_error("stopped: nobody reads the output any more")
        return 128 + getattr(signal, "SIGPIPE", 13)
    except Exception as error:
        if os.environ.get("LIT_OFFRL_TRACEBACK"):
            raise
        if getattr(error, "errno", None) in DEVICE_ERRORS and not getattr(error, "filename", None):
            _write_no_more()  # what could not be written stays in the buffer and would fail again at exit
        _print_error(explain_failure(error))
        return 1


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Within, a thread that cannot write prints no traceback: TensorBoard's hands its exception on to the main one."""

    def report(arguments: threading.ExceptHookArgs) -> None:
        if getattr(arguments.exc_value, "errno", None) not in DEVICE_ERRORS:
            before(arguments)

    before, threading.excepthook = threading.excepthook, report
    try:
        yield
    finally:
        threading.excepthook = before


def _print_error(text: str) -> None:
    prefix = f"[rank {rank}] " if (rank := launched_rank()) else ""
    with suppress(OSError):  # standard error can be on the full disk, too
        sys.stderr.write(f"{prefix}error: {text}\n")


def _write_no_more() -> None:
    """Send the rest of standard output, which cannot be written, to nowhere."""
    with suppress(OSError, ValueError):  # a standard output without a file, as in tests and notebooks
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(command: str, words: list[str]) -> int:
    if command in OTHERS:
        module = importlib.import_module(f"lit_offrl.cli.{command}")
        return int(getattr(module, f"run_{command}")(words))
    wants_help = {"-h", "--help", "--help-all"} & {*words}
    if command == "fit" and not wants_help:
        options, others = split_options(words, "--seeds", "--parallel")
        if options.seeds is not None:
            from lit_offrl.cli.seeds import run_seeds

            return run_seeds(others, options.seeds, options.parallel)
        if any(word.partition("=")[0] == "--engine" for word in words):
            raise UserError("--engine belongs to several runs: name their seeds, e.g. --seeds 0")
    if command in TRAINING:
        # Before torch is imported, which sets it to the temporary folder: compiled code is kept for later runs.
        with suppress(RuntimeError):  # there is no home folder: torch keeps its default
            caches = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(caches) / "lit_offrl" / "compiled"))
        with stopping_at_once():
            from lit_offrl.cli.training import run_training
            from lit_offrl.system.onednn import products_by_onednn

            keep_freed_memory()
            with products_by_onednn():
                return run_training(command, words)
    raise UserError(f"no command '{command}'{did_you_mean(command, COMMANDS)}; there are {', '.join(COMMANDS)}")
