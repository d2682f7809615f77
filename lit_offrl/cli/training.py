"""fit, validate, test and predict: LightningCLI with stacked configs, run folders and one-line errors."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import lightning
import torch
import yaml
from jsonargparse import ArgumentError, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from omegaconf.errors import OmegaConfBaseException

from lit_offrl.algorithms import OfflineAlgorithm
from lit_offrl.algorithms.checkpoints import ENTRY, check_dataset, check_fits, load_weights, read_checkpoint
from lit_offrl.callbacks.acceleration import Acceleration
from lit_offrl.callbacks.bandit import BanditEvaluation
from lit_offrl.callbacks.base import find_callback
from lit_offrl.callbacks.checkpoint import RunCheckpoint, validation_was_due
from lit_offrl.callbacks.distributed import DistributedTraining, check_batch_sizes
from lit_offrl.callbacks.ema import EMATargets
from lit_offrl.callbacks.metrics_csv import MetricsCSV
from lit_offrl.callbacks.predictions import PredictionsFile
from lit_offrl.callbacks.progress import GradientStepBar
from lit_offrl.callbacks.results import ResultsFile
from lit_offrl.callbacks.rollout import RolloutEvaluation
from lit_offrl.callbacks.threads import ThreadFallback
from lit_offrl.callbacks.throughput import Throughput
from lit_offrl.cli.config_lines import check_config, with_place
from lit_offrl.cli.configs import expand_words, pair_options, run_name
from lit_offrl.cli.errors import chain_of, explain, user_error_behind
from lit_offrl.cli.metrics import check_monitors
from lit_offrl.cli.options import ACCELERATION, OPTION_GROUPS, TRAINER_DEFAULTS
from lit_offrl.cli.parser import CONFIG
from lit_offrl.cli.resume import RunIsFinished, goes_on, refuse_used_folder
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.inspection import clipped_actions
from lit_offrl.data.sources import find_source
from lit_offrl.errors import RunFailure, UserError, explain_memory, out_of_memory
from lit_offrl.run_folder import RunFolder
from lit_offrl.system.files import write_bytes
from lit_offrl.system.trainer import check_trainer

T = TypeVar("T")


# So that `${data.batch_size}` in a file means the same where the parser puts the file's content below `fit`.
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


def run_training(command: str, words: list[str]) -> int:
    """Run one of Lightning's subcommands; return the exit code."""
    if any(word in ("-h", "--help") for word in words):
        from lit_offrl.cli.help import short_help

        sys.stdout.write(short_help(command, words))
        return 0
    _silence_lightning()
    arguments = expand_words(["--help" if word == "--help-all" else word for word in words])
    given = pair_options(arguments)
    for name, value in given:
        if name in CONFIG and value is not None:
            check_config(Path(value), OPTION_GROUPS)
    try:
        return _run_training(command, words, arguments)
    except UserError as error:
        raise UserError(with_place(str(error), given)) from error


def _run_training(command: str, words: list[str], arguments: list[str]) -> int:
    try:
        with contextlib.ExitStack() as until_the_end:
            cli = OfflineCLI([command, *arguments], [command, *words], until_the_end)
    except RunIsFinished as reason:
        print(reason, flush=True)
        return 0
    except ArgumentError as error:
        raise UserError(explain(str(error))) from error
    except OmegaConfBaseException as error:
        key = str(error.full_key or "config").removeprefix(f"{command}.")
        text = str(error.msg or error).splitlines()[0]
        missing = re.search(rf"not found \(resolved to '(?:{command}\.)?([^']+)'\)", text)
        raise UserError(f"{key}: {f'there is no {missing[1]} to take a value from' if missing else text}") from error
    except (MisconfigurationException, ValueError) as error:
        bad_input = user_error_behind(error)
        if bad_input is not None:
            raise bad_input from None
        if str(error).startswith("Does not validate"):  # of the parser, when it builds what a config names
            raise UserError(explain(str(error))) from error
        raise
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            message = "make data.batch_size, data.block_size, the candidates of acting or evaluation.num_envs smaller"
            raise RunFailure(f"{explain_memory(str(error))}: {message}; checkpoints are intact") from error
        if isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error):
            message = "another rank has died or hangs; the last checkpoint is intact: --ckpt_path last"
            raise RunFailure(message) from error
        if "conditioned on metric" in str(error):  # of EarlyStopping and its kin, at the end of the first epoch
            raise RunFailure(f"trainer.callbacks: {error}") from error
        raise
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns it into an exit with code 1
            raise error.__context__ from None
        raise
    return cli.exit_code


def resolved_config(words: list[str]) -> dict[str, Any]:
    """Return the configuration of a `fit` with these words, without running anything.

    Raises:
        UserError: A key or a value is wrong.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        run_training("fit", [*words, "--print_config"])
    config: dict[str, Any] = yaml.safe_load(printed.getvalue())
    return config


class OfflineCLI(LightningCLI):
    """The training command line. Adds the project's callbacks and loggers, and the run folder they write to.

    Args:
        arguments: Words of the command line, with paths of configs and values of `--task`; see `expand_words`.
        words: Words as they were typed.
        until_the_end: Releases what the command holds, e.g. the lock of the run folder.
    """

    _parsers: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, arguments: list[str], words: list[str], until_the_end: contextlib.ExitStack) -> None:
        self.words = words
        self.until_the_end = until_the_end
        self.folder: RunFolder  # found before the classes are instantiated
        self.checkpoint: dict[str, Any] | None = None  # what the command starts from
        self.origin: dict[str, Any] | None = None  # the checkpoint whose weights a new run starts from
        self.exit_code = 0
        mode = {"parser_mode": "omegaconf+", "exit_on_error": False}
        super().__init__(
            OfflineAlgorithm,
            D4RLDataModule,
            subclass_mode_model=True,
            save_config_callback=SaveConfig,
            trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [ResultsFile()]},  # it reads the callbacks before it
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "python -m lit_offrl", **mode, **dict.fromkeys(self.subcommands(), mode)},
            args=arguments,
        )

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Build the parser of a command once per process: it takes most of a second, and a search needs it often."""
        command = self.words[0]
        if command not in OfflineCLI._parsers:
            before = set(vars(self))
            super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
            OfflineCLI._parsers[command] = {name: value for name, value in vars(self).items() if name not in before}
        vars(self).update(OfflineCLI._parsers[command])

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the one subcommand that is asked for: the parser of each takes a tenth of a second to build."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name == self.words[0]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the project's callbacks, and set those that follow from other options."""
        for group, cls in OPTION_GROUPS.items():
            if issubclass(cls, lightning.Callback):
                parser.add_lightning_class_args(cls, group)
        parser.add_argument("--overwrite", type=bool, default=False, help="Start anew in a folder that holds a run.")
        text = "Part of the algorithm that is taken away, whose hyper-parameters win over all others: no_q for its Q."
        parser.add_argument("--ablation", type=str | None, default=None, help=text)
        text = "Start a new run from the weights of this checkpoint, e.g. on other data; optimizers start anew."
        parser.add_argument("--init_from", type=str | None, default=None, help=text)
        for name, text in ACCELERATION.items():
            kind, default = (bool | Literal["auto"], "auto") if name == "compile" else (bool, False)
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        for name in ("observation_dim", "action_dim"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        for target in ("model.init_args.seed", "data.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without Lightning's warning about a second source of arguments."""
        self.config = parser.parse_args(args)
        seed = self.config[self.config.subcommand].seed_everything
        if seed is None or isinstance(seed, bool):
            raise UserError("seed_everything: give a number, e.g. --seed_everything 1")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed_everything: must be at least 0 and below 2^32, not {seed}")

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's hyper-parameters override the command line. Here flags win.
        return

    def before_instantiate_classes(self) -> None:
        """Find the run folder, and the checkpoint to start from."""
        config = self.config[self.subcommand]
        algorithm = run_name(config.model.class_path.rpartition(".")[2], config.ablation)
        if self.subcommand == "fit":
            _count_epochs_in_steps(config)
        root = config.trainer.default_root_dir
        find_source(config.data.dataset)  # refuses what can be no name before folders are named after it
        self.folder = RunFolder.of(root, algorithm, config.data.dataset, config.seed_everything)
        if config.ckpt_path == "auto":
            options = yaml.safe_load(self._parser(self.subcommand).dump(config))
            is_begun = goes_on(self.folder, config, options)
            config.ckpt_path = "last" if is_begun else None
            config.overwrite |= not is_begun  # a run that was stopped before its first checkpoint may have left files
        if config.ckpt_path == "last":
            config.ckpt_path = str(self.folder.last_checkpoint)
            if not self.folder.last_checkpoint.is_file():
                raise UserError(f"ckpt_path: no checkpoint at {config.ckpt_path}: start the run without --ckpt_path")
        if config.ckpt_path is not None:
            self.checkpoint = read_checkpoint(config.ckpt_path)
            self.folder = RunFolder.of_checkpoint(config.ckpt_path)
        elif self.subcommand != "fit":
            raise UserError(f"{self.subcommand} needs a checkpoint: --ckpt_path runs/.../checkpoints/last.ckpt")
        else:
            refuse_used_folder(self.folder, config.overwrite)
            if config.init_from is not None:
                self.origin = read_checkpoint(config.init_from, "init_from")
        # Checks the options of the data, then downloads or collects the dataset if it is not here.
        D4RLDataModule(**config.data.as_dict()).prepare_data()
        config.weights_only = True
        if self.subcommand in ("validate", "test"):
            config.verbose = False  # our line at the end has the scores

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Make the trainer with our loggers and callbacks beside the user's; its root is the run folder."""
        trainer_config = self._get(self.config_init, "trainer")
        kwargs["logger"] = self._loggers(trainer_config.get("logger"))
        callbacks = _as_list(trainer_config.get("callbacks"))
        if not any(isinstance(callback, EMATargets) for callback in callbacks):
            callbacks.append(EMATargets())
        accelerate = Acceleration(**{name: self._get(self.config_init, name) for name in ACCELERATION})
        callbacks += [accelerate, ThreadFallback(), Throughput(), PredictionsFile()]
        if trainer_config.get("enable_progress_bar") is not False:
            callbacks.append(GradientStepBar())
        try:
            return super().instantiate_trainer(callbacks=callbacks, default_root_dir=self.folder.path, **kwargs)
        except (TypeError, ValueError, ModuleNotFoundError) as error:  # e.g. an accelerator that there is not
            raise UserError(f"trainer: {error}") from error

    def instantiate_classes(self) -> None:
        """Build data, networks and trainer; refuse what does not fit into the memory."""
        try:
            super().instantiate_classes()
        except Exception as error:  # the parser wraps what the constructor of a network raises
            cause = next(filter(out_of_memory, chain_of(error)), None)
            if cause is None:
                raise
            message = "make model.init_args.hidden_dim or the data smaller"
            raise UserError(f"{explain_memory(str(cause))}: {message}") from error

    def after_instantiate_classes(self) -> None:
        """Check all that can be checked before the run; only then touch the run folder."""
        if self.subcommand == "fit":
            check_trainer(self.trainer)
            if self.trainer.precision == "64-true":
                raise UserError("trainer.precision: data are float32 here: use 32-true")
            check_batch_sizes(self.model, self.datamodule.batch_size, self.trainer.world_size)
            self.datamodule.check_block_fits()
            check_monitors(self.trainer, self.datamodule, resumes=self.checkpoint is not None)
        self._callback(ResultsFile).ablation = self._get(self.config, "ablation")
        self._check_checkpoint()
        if self.origin is not None:
            self.model.init_from = load_weights(self.model, self.origin, self.config.fit.init_from, "init_from")
        self._check_launcher()
        self._callback(DistributedTraining).prepare(self.trainer)
        if self.subcommand != "predict":
            self._callback(RolloutEvaluation).prepare(self.datamodule)
        if not self.trainer.is_global_zero:
            return
        if not self.folder.is_used():
            self.until_the_end.push(self._leave_no_trace)
        self.folder.prepare()
        self.until_the_end.enter_context(self.folder.lock())
        if self.subcommand == "fit" and self.checkpoint is None:
            refuse_used_folder(self.folder, self.config.fit.overwrite)  # another process may just have ended here
            self.folder.clear()

    def _leave_no_trace(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Empty the folder again after a failure before the first block of updates: the command can be corrected."""
        if kind is not None and self.model.gradient_step == 0:
            self.folder.clear()
            self.folder.remove_if_empty(Path(self.config[self.subcommand].trainer.default_root_dir))

    def _check_checkpoint(self) -> None:
        """Check that the checkpoint can be restored, before any file is touched."""
        if self.checkpoint is None:
            return
        path, is_fit = self.config[self.subcommand].ckpt_path, self.subcommand == "fit"
        if self.subcommand != "predict":
            check_dataset(self.checkpoint, self.datamodule.info.id, self.datamodule.info.sha256, path)
        check_fits(self.checkpoint, self.model, path, resumes=is_fit)
        step = self.checkpoint[ENTRY]["gradient_step"]
        if is_fit and self.trainer.max_steps < step:
            raise UserError(f"trainer.max_steps: the checkpoint {path} has made {step:,} gradient steps already")

    def _check_launcher(self) -> None:
        """Refuse to start further ranks, by the command line of this process, from a process that has another."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, DDPStrategy) or strategy.num_processes == 1 or strategy.cluster_environment is None:
            return
        if not strategy.cluster_environment.creates_processes_externally and sys.argv[1:] != self.words:
            raise UserError("trainer.devices: several need a command line of their own: python -m lit_offrl ...")

    def _callback(self, cls: type[T]) -> T:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next(callback for callback in callbacks if isinstance(callback, cls))

    def _loggers(self, given: Any) -> list[Any]:
        """Return the run's loggers: metrics.csv always, TensorBoard while training, and the user's.

        Args:
            given: `trainer.logger`: one logger or several; None or True for none, False for metrics.csv alone.
        """
        users = [] if isinstance(given, bool) else _as_list(given)
        if self.subcommand != "fit":
            return [MetricsCSV(self.folder.path, keep_until=math.inf), *users]
        resumed_step = None if self.checkpoint is None else self.checkpoint[ENTRY]["gradient_step"]
        metrics = MetricsCSV(self.folder.path, resumed_step, validation_was_due(self.checkpoint))
        if given is False:
            return [metrics]
        purge = None if resumed_step is None else resumed_step + 1
        board = TensorBoardLogger(self.folder.path, name="", version="", purge_step=purge, default_hp_metric=False)
        return [board, metrics, *users]

    def before_fit(self) -> None:
        """Print what is about to be trained."""
        if not self.trainer.is_global_zero:
            return
        data, config = self.datamodule, self._get(self.config, "trainer")
        transitions, info = data.load()
        ablation = self._get(self.config, "ablation")
        name = type(self.model).__name__ + (f" ({ablation})" if ablation else "")
        print(
            f"{name} on {info.id}: {len(transitions):,} transitions in "
            f"{len(transitions.episode_starts):,} episodes of mean return {transitions.episode_returns().mean():.3g}"
        )
        ranks = f", shared by {self.trainer.world_size} ranks" if self.trainer.world_size > 1 else ""
        print(
            f"{config['max_steps']:,} gradient steps of batch {data.batch_size} on "
            f"{self.trainer.strategy.root_device}, {torch.get_num_threads()} threads{ranks}"
        )
        print(f"run folder {self.folder.path}  (curves: tensorboard --logdir {self.folder.path})", flush=True)
        if (origin := self.model.init_from) is not None and self.checkpoint is None:
            print(f"starts from {origin['parameters']} of {origin['of']} parameters of {origin['checkpoint']}")
        for note in (*info.notes, *clipped_actions(transitions, data.action_bounds or info.action_bounds)):
            print(f"note: {note}")
        protocol = self._callback(RolloutEvaluation).protocol
        if protocol is not None and protocol.differences:
            print(f"note: in {protocol.environment} {'; '.join(protocol.differences)}")
        if 0 < config["max_steps"] <= self.model.main_start:
            print(f"note: all of it is pretraining (the main phase begins at step {self.model.main_start:,})")

    def after_fit(self) -> None:
        """Print the scores."""
        step, last = self.model.gradient_step, self.trainer.max_steps
        timer = find_callback(self.trainer, Timer)
        if step >= last or self._callback(RunCheckpoint).stop_signal is not None:
            event = f"finished {step:,} gradient steps"
        elif timer is not None and timer.time_remaining() == 0:
            event = (
                f"trainer.max_time ended the run at gradient step {step:,} of {last:,}; it counts all parts of a run: "
                "go on with a larger one and --ckpt_path last"
            )
        else:
            event = f"stopped early at gradient step {step:,} of {last:,}"
        self._print_scores(event, command="fit")

    def after_validate(self) -> None:
        """Print the scores."""
        self._print_scores(f"checkpoint at gradient step {self.model.gradient_step:,}", command="validate")

    after_test = after_validate

    def after_predict(self) -> None:
        """Print where the actions are."""
        if self.trainer.is_global_zero:
            print(f"actions are in {self.folder.path / PredictionsFile.NAME}", flush=True)

    def _print_scores(self, event: str, command: str) -> None:
        if not self.trainer.is_global_zero:  # a code other than 0 would have Lightning's launcher kill rank 0
            return
        checkpoint = self._callback(RunCheckpoint)
        if checkpoint.stop_signal is not None:
            words = f"python -m lit_offrl {command} --ckpt_path {self.folder.last_checkpoint}"
            print(f"stopped at gradient step {self.model.gradient_step:,}; go on with: {words}", flush=True)
            self.exit_code = 128 + checkpoint.stop_signal
            return
        evaluation = self._callback(RolloutEvaluation)
        scores = evaluation.scores or self._callback(BanditEvaluation).scores
        for name, each in scores.items():
            if name != "policy":
                print(f"to compare, {name}: {each.line()}")
        score = scores["policy"].line() if "policy" in scores else "not evaluated"
        reference = f" ({evaluation.reference.name} reference)" if evaluation.reference else ""
        print(f"{event}: {score}{reference}; everything is in {self.folder.path}", flush=True)


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration to config.yaml when a run starts or is resumed."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Wait: until training starts nothing is written."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write the configuration as a new run would need it."""
        config = self.config.clone()
        config.ckpt_path, config.overwrite = None, False
        text = self.parser.dump(config, skip_none=False)
        write_bytes(Path(trainer.default_root_dir) / "config.yaml", text.encode())


def _count_epochs_in_steps(config: Any) -> None:
    """Turn `max_epochs` into `max_steps`: a run that is resumed within an epoch has begun more epochs than it has made.

    Raises:
        UserError: It is 0.
    """
    trainer = config.trainer
    epochs = trainer.max_epochs
    if epochs is None or epochs == -1:
        return
    if epochs < 1:
        raise UserError(f"trainer.max_epochs: must be at least 1, not {epochs}")
    steps = epochs * config.data.steps_per_epoch
    trainer.max_steps = steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)
    trainer.max_epochs = -1


def _as_list(given: Any) -> list[Any]:
    return [] if given is None else [*given] if isinstance(given, (list, tuple)) else [given]


def _silence_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.utils.data")
