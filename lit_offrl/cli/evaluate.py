"""The `evaluate` subcommand."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_offrl.cli.parser import CommandParser
from lit_offrl.errors import RunFailure, UserError, require

if TYPE_CHECKING:
    from lit_offrl.data.datamodule import D4RLDataModule
    from lit_offrl.evaluate.result import FQEResult
    from lit_offrl.policy import Policy


def run_evaluate(words: list[str]) -> int:
    """Run `evaluate --ckpt_path FILE`; return the exit code."""
    options = _parser().parse_args(words)
    require(options.steps >= 1, "--steps", "at least 1", options.steps)
    require(options.samples >= 1, "--samples", "at least 1", options.samples)
    require(0 <= options.discount < 1, "--discount", "at least 0 and below 1", options.discount)
    require(0 <= options.seed < 2**32, "--seed", "at least 0 and below 2^32", options.seed)
    checkpoints = options.ckpt_path.absolute().parent
    folder = checkpoints.parent if checkpoints.name == "checkpoints" else None
    output = options.output or (folder and folder / "fqe.json")
    if output is None:
        raise UserError(f"ckpt_path: {options.ckpt_path} does not lie in a run folder: say where to write, --output X")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output: no folder {output.parent}")

    from lit_offrl.evaluate.evaluation import evaluate_policy
    from lit_offrl.evaluate.fqe import FQEOptions
    from lit_offrl.policy import load_policy
    from lit_offrl.system.files import write_json

    policy = load_policy(options.ckpt_path, options.actor, seed=options.seed, trust=options.trust)
    spec = policy.spec
    if policy.algorithm.has_memory:
        raise UserError(
            f"ckpt_path: {spec.algorithm} acts by what happened earlier in the episode, but Q(s, a) knows the present "
            "observation only: evaluate it in the environment (validate)"
        )
    data, held_out, by = _data(options, folder, policy)
    transitions, info = data.load()
    print(f"{spec.algorithm} ({spec.actor}) at gradient step {spec.gradient_steps:,} on {info.id}")
    print(f"fits Q on {(~held_out).sum():,} of {len(held_out):,} transitions; held-out episodes: {by}", flush=True)
    fqe_options = FQEOptions(options.steps, options.discount, options.samples, seed=options.seed)
    bounds = spec.action_low, spec.action_high
    result = evaluate_policy(
        policy.act,
        transitions,
        held_out,
        bounds,
        fqe_options,
        lambda point: print(f"step {point.step:,}: value {point.value:.4g}, TD error {point.td_error:.3g}", flush=True),
    )
    for line in result.lines():
        print(line)
    about: dict[str, Any] = {
        "method": "fqe",
        "checkpoint": str(options.ckpt_path),
        "algorithm": spec.algorithm,
        "actor": spec.actor,
    }
    about |= {"gradient_steps": spec.gradient_steps, "dataset": info.id, "dataset_sha256": info.sha256}
    last = asdict(result.last) | {"diverged": result.diverged}
    try:
        write_json(output, {**about, "held_out": by, **last, **asdict(result)})
        if options.output is None:
            _write_curves(output.with_name("fqe"), result)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}): choose another with --output") from error
    print(f"wrote {output}")
    if result.diverged:
        raise RunFailure("fitted Q evaluation diverged: |Q| is larger than the data's rewards allow; lower --discount")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m lit_offrl evaluate",
        description="The value of a trained policy from logged episodes, without an environment. It ranks policies; it "
        "is weak where a policy's actions leave the data.",
    )
    parser.add_argument("--method", choices=["fqe"], default="fqe", help="fitted Q evaluation")
    parser.add_argument("--ckpt_path", type=Path, required=True, metavar="FILE", help="the policy's checkpoint")
    parser.add_argument("--data.dataset", dest="dataset", metavar="ID", help="by default the data that it trained on")
    parser.add_argument("--actor", default="policy", help="which of the algorithm's actors, e.g. behavior")
    parser.add_argument("--steps", type=int, default=20_000, help="gradient steps (20,000)")
    parser.add_argument("--discount", type=float, default=0.99, help="compare values of one discount only (0.99)")
    parser.add_argument("--samples", type=int, default=1, help="actions of the policy at each next observation (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE", help="by default fqe.json in the run folder")
    parser.add_argument("--trust", action="store_true", help="run code of another package that the checkpoint names")
    return parser


def _data(options: argparse.Namespace, folder: Path | None, policy: Policy) -> tuple[D4RLDataModule, Any, str]:
    """Return the data, which transitions are held out, and who held them out, in words."""
    from lit_offrl.data.columns import USUAL_NAMES, LogColumns
    from lit_offrl.data.datamodule import D4RLDataModule
    from lit_offrl.data.sources import find_source
    from lit_offrl.evaluate.evaluation import HELD_OUT_FRACTION

    trained_with = _data_options(folder)
    dataset = options.dataset or trained_with.get("dataset")
    if dataset is None:
        raise UserError(f"data.dataset: no config.yaml beside {options.ckpt_path} names the data: give --data.dataset")
    columns = LogColumns(**(trained_with.get("columns") or {})) if find_source(dataset).is_own else USUAL_NAMES
    data = D4RLDataModule(dataset, d4rl_compat=trained_with.get("d4rl_compat", True), columns=columns)
    data.prepare_data()
    widths = (data.observation_dim, data.action_dim)
    spec = policy.spec
    if widths != (spec.observation_dim, spec.action_dim):
        raise UserError(
            f"data.dataset: {dataset} has {widths[0]} observations and {widths[1]} actions, the policy of "
            f"{options.ckpt_path} {spec.observation_dim} and {spec.action_dim}"
        )
    if (episodes := len(data.transitions.episode_starts)) < 2:
        raise UserError(f"data.dataset: {dataset} has {episodes} episode: one to fit on and one to hold out are needed")
    was_trained_on = (spec.dataset, spec.dataset_sha256) == (data.info.id, data.info.sha256)
    fraction = trained_with.get("validation_fraction", 0.0) if was_trained_on else 0.0
    data.validation_fraction = fraction or HELD_OUT_FRACTION
    held_out = data.held_out
    assert held_out is not None
    if fraction:
        by = f"{fraction:g} of all, those that the policy's training held out"
    elif was_trained_on:
        by = f"{HELD_OUT_FRACTION:g} of all; the policy was trained on them, so the value may be optimistic"
    else:
        by = f"{HELD_OUT_FRACTION:g} of all, of other data than the policy was trained on"
    return data, held_out, by


def _data_options(folder: Path | None) -> dict[str, Any]:
    """Return the options of the data that a run was trained with; none where its config.yaml cannot be read."""
    import yaml

    try:
        options = yaml.safe_load((folder / "config.yaml").read_text())["data"] if folder else {}
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return {}
    return options if isinstance(options, dict) else {}


def _write_curves(folder: Path, result: FQEResult) -> None:
    """Write the curves of the fit for TensorBoard, in place of those of an earlier evaluation."""
    from torch.utils.tensorboard.writer import SummaryWriter

    for file in folder.glob("events.out.tfevents.*"):
        file.unlink()
    with SummaryWriter(str(folder)) as writer:
        for point in result.curve:
            tags = {"fqe_value": point.value, "td_error": point.td_error, "largest_q": point.largest_q}
            for tag, value in tags.items():
                writer.add_scalar(f"ope/{tag}", value, point.step)
