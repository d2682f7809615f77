"""fit, validate, test and predict: LightningCLI with stacked configs, run folders and one-line errors."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_offrl import algorithms
from lit_offrl.algorithms.base import refuse_several_devices
from lit_offrl.callbacks.checkpoint import RunCheckpoint
from lit_offrl.callbacks.ema import EMATargets
from lit_offrl.callbacks.metrics_csv import MetricsCSV
from lit_offrl.callbacks.progress import GradientStepBar
from lit_offrl.callbacks.results import ResultsFile
from lit_offrl.callbacks.rollout import RolloutEvaluation
from lit_offrl.callbacks.throughput import Throughput
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.errors import UserError, did_you_mean
from lit_offrl.run_folder import RunFolder, write_atomically

TRAINER_DEFAULTS = {
    "accelerator": "auto",
    "devices": 1,
    "max_epochs": -1,  # max_steps ends a run
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,  # the unit is a block, whose means are one logging event
    "use_distributed_sampler": False,
    "enable_model_summary": False,
    "default_root_dir": "runs",
}


OPTION_GROUPS: dict[str, type] = {
    "data": D4RLDataModule,
    "evaluation": RolloutEvaluation,
    "checkpoint": RunCheckpoint,
    "trainer": lightning.Trainer,
}


def run_training(command: str, words: list[str]) -> int:
    """Run one of Lightning's subcommands; return the exit code."""
    _quieten()
    words = _with_config_of_checkpoint(words)
    try:
        cli = OfflineCLI([command, *words])
    except ArgumentError as error:
        raise UserError(explain(str(error))) from error
    return cli.exit_code


class OfflineCLI(LightningCLI):
    """The training command line. Adds the project's callbacks and loggers, and the run folder they write to."""

    def __init__(self, arguments: list[str]) -> None:
        self.folder: RunFolder | None = None
        self.resumed_step: int | None = None
        self.exit_code = 0
        super().__init__(
            algorithms.OfflineAlgorithm,
            D4RLDataModule,
            subclass_mode_model=True,
            save_config_callback=SaveConfig,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={
                "parser_mode": "omegaconf",
                "exit_on_error": False,
                **{name: {"parser_mode": "omegaconf", "exit_on_error": False} for name in self.subcommands()},
            },
            args=arguments,
        )

    # ---------------------------------------------------------------- what can be typed

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our callbacks' options, and what follows from others instead of being typed."""
        parser.add_lightning_class_args(RolloutEvaluation, "evaluation")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Start anew in a run folder that holds a run already."
        )
        for name in ("observation_dim", "action_dim"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        for target in ("model.init_args.seed", "data.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without Lightning's warning about a second source of arguments."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's hyper-parameters override the command line. Here flags win.
        return

    # ---------------------------------------------------------------- the run folder

    def before_instantiate_classes(self) -> None:
        """Find the run folder, and the checkpoint to start from."""
        config = self.config[self.subcommand]
        seed = int(config.seed_everything)
        algorithm = config.model.class_path.rpartition(".")[2].lower()
        self.folder = RunFolder.of(config.trainer.default_root_dir, algorithm, config.data.dataset, seed)
        if config.ckpt_path in ("last", "best"):
            config.ckpt_path = str(self.folder.last_checkpoint)
            if not self.folder.last_checkpoint.is_file():
                raise UserError(f"ckpt_path: no checkpoint at {config.ckpt_path}: start the run without --ckpt_path")
        elif config.ckpt_path is not None:
            self.folder = RunFolder.of_checkpoint(config.ckpt_path)
        if config.ckpt_path is not None:
            self.resumed_step = _gradient_step(Path(config.ckpt_path))
        elif self.subcommand == "fit":
            self._refuse_used_folder(config)
        elif self.subcommand != "fit":
            raise UserError(f"{self.subcommand} needs a checkpoint: --ckpt_path runs/.../checkpoints/last.ckpt")
        config.weights_only = True
        if self.subcommand in ("validate", "test"):
            config.verbose = False  # the line at the end says it all

    def _refuse_used_folder(self, config: Any) -> None:
        assert self.folder is not None
        if self.folder.is_used() and not config.overwrite:
            raise UserError(
                f"{self.folder.path} holds a run already: go on with it (--ckpt_path last), start anew "
                "(--overwrite true), or choose another --seed_everything or --trainer.default_root_dir"
            )

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Make the trainer with our loggers and callbacks beside the user's."""
        assert self.folder is not None
        self.folder.prepare()
        if self.subcommand == "fit" and self.resumed_step is None:
            self.folder.clear()
        seed = int(self._get(self.config, "seed_everything"))
        trainer_config = self._get(self.config_init, "trainer")
        if trainer_config.get("logger") in (None, True):
            kwargs["logger"] = self._loggers()
        callbacks = [EMATargets(), Throughput(), ResultsFile(seed)]
        if trainer_config.get("enable_progress_bar") is not False:
            callbacks.append(GradientStepBar())
        kwargs["callbacks"] = [*(trainer_config.get("callbacks") or []), *callbacks]
        return super().instantiate_trainer(**kwargs)

    def _loggers(self) -> list[Any]:
        assert self.folder is not None
        purge = None if self.resumed_step is None else self.resumed_step + 1
        metrics = MetricsCSV(self.folder.path, self.resumed_step)
        if self.subcommand != "fit":
            return [metrics]
        return [TensorBoardLogger(self.folder.path, name="", version="", purge_step=purge), metrics]

    def after_instantiate_classes(self) -> None:
        """Refuse what is not there yet, before Lightning starts further processes for it."""
        refuse_several_devices(self.trainer)

    # ---------------------------------------------------------------- before and after the run

    def before_fit(self) -> None:
        """Say what is about to happen."""
        assert self.folder is not None
        data, config = self.datamodule, self._get(self.config, "trainer")
        transitions, info = data.load()
        print(
            f"{type(self.model).__name__} on {info.id}: {len(transitions):,} transitions in "
            f"{len(transitions.episode_starts):,} episodes of mean return {transitions.episode_returns().mean():.3g}"
        )
        print(
            f"{config['max_steps']:,} gradient steps of batch {data.batch_size} on "
            f"{self.trainer.strategy.root_device}, {torch.get_num_threads()} threads"
        )
        print(f"run folder {self.folder.path}  (curves: tensorboard --logdir {self.folder.path})", flush=True)
        if 0 < config["max_steps"] <= self.model.pretrain_steps:
            print(f"note: all of it is pretraining (model.init_args.pretrain_steps {self.model.pretrain_steps})")

    def after_fit(self) -> None:
        """Say what came of it and where everything lies."""
        assert self.folder is not None
        checkpoint = next(c for c in self.trainer.checkpoint_callbacks if isinstance(c, RunCheckpoint))
        steps = self.model.gradient_step
        if checkpoint.stop_signal is not None:
            print(f"stopped at gradient step {steps:,}; go on with: {_resume_command(self.folder)}", flush=True)
            self.exit_code = 128 + checkpoint.stop_signal
            return
        self._say_scores(f"finished {steps:,} gradient steps")

    def after_validate(self) -> None:
        """Say the score."""
        self._say_scores(f"checkpoint at gradient step {self.model.gradient_step:,}")

    after_test = after_validate

    def _say_scores(self, what: str) -> None:
        assert self.folder is not None
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        evaluation = next(c for c in callbacks if isinstance(c, RolloutEvaluation))
        for name, scores in evaluation.scores.items():
            if name != "policy":
                print(f"to compare, {name}: {scores.line()}")
        policy = evaluation.scores.get("policy")
        score = "not evaluated" if policy is None else policy.line()
        reference = f" ({evaluation.reference.name} reference)" if evaluation.reference else ""
        print(f"{what}: {score}{reference}; everything is in {self.folder.path}", flush=True)


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration to config.yaml when a run starts or is resumed."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)

    def save_config(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write it, for runs that train."""
        if stage == "fit" and trainer.log_dir is not None:
            text = self.parser.dump(self.config, skip_none=False)
            write_atomically(Path(trainer.log_dir) / "config.yaml", lambda path: path.write_text(text))


def _with_config_of_checkpoint(words: list[str]) -> list[str]:
    """Put the config.yaml of a checkpoint's run folder first where the user gave a checkpoint and no config."""
    if any(word.startswith(("--config", "-c")) and not word.startswith("--checkpoint") for word in words):
        return words
    for i, word in enumerate(words):
        name, _, value = word.partition("=")
        if name == "--ckpt_path":
            config = RunFolder.of_checkpoint(value or (words[i + 1] if i + 1 < len(words) else "")).path / "config.yaml"
            if config.is_file():
                return ["--config", str(config), *words]
    return words


def _gradient_step(checkpoint: Path) -> int:
    if not checkpoint.is_file():
        raise UserError(f"ckpt_path: no checkpoint at {checkpoint}")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        return int(content["offrl"]["gradient_step"])
    except KeyError:
        raise UserError(f"ckpt_path: {checkpoint} is not a checkpoint of this package") from None
    except Exception as error:
        raise UserError(f"ckpt_path: {checkpoint} is broken ({type(error).__name__})") from error


def _resume_command(folder: RunFolder) -> str:
    return f"python -m lit_offrl fit --ckpt_path {folder.last_checkpoint}"


def _quieten() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.utils.data")


# ---------------------------------------------------------------------------------------------------------- errors


def explain(message: str) -> str:
    """Reduce a parser's nested message to one line: the key, what is wrong, and what was probably meant."""
    text = " ".join(message.split())
    key = _first(r'[Pp]arser key "([^"]+)"', text)
    if option := _first(r"Option '([^']+)' is not accepted", text):
        full = f"{key}.init_args.{option}" if key == "model" else (f"{key}.{option}" if key else option)
        return f"no option '{full}'{did_you_mean(option, _known_options())}; --help lists them"
    if option := _first(r"[Uu]nrecognized arguments: (.+)", text):
        return f"unrecognized: {option}{did_you_mean(option.split()[0].split('=')[0].lstrip('-'), _flags())}"
    if name := _first(r"Expected a dot import path string: (\S+)", text):
        names = [c for c in algorithms.__all__ if c != "OfflineAlgorithm"]
        return f"{key}: no class '{name}'{did_you_mean(name, names)}; there are {', '.join(names)}"
    if path := _first(r'[Pp]ath "?([^"]+?)"? (?:not accessible|does not exist)', text):
        return f"config: no file {path}"
    return f"{key}: {text}" if key and key not in text else text


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls).parameters)


def _known_options() -> list[str]:
    classes = (algorithms.DTQL, *OPTION_GROUPS.values())
    return [name for cls in classes for name in _parameters(cls)]


def _flags() -> list[str]:
    grouped = [f"{group}.{name}" for group, cls in OPTION_GROUPS.items() for name in _parameters(cls)]
    return ["config", "ckpt_path", "seed_everything", "overwrite", "model", *grouped]
