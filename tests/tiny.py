"""What tests of algorithms share: small batches, tiny trainings on made-up data, the tools."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from conftest import REPOSITORY
from torch import Tensor, nn

from lit_offrl.algorithms import ALGORITHMS
from lit_offrl.algorithms.base import OfflineAlgorithm, OptimizerSpec
from lit_offrl.batch import Batch

OBSERVATION_DIM, ACTION_DIM, STATES = 3, 2, 20


def batch(rows: int = 12, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(rows, OBSERVATION_DIM, generator=generator),
        torch.rand(rows, ACTION_DIM, generator=generator) * 2 - 1,
        torch.randn(rows, generator=generator),
        torch.randn(rows, OBSERVATION_DIM, generator=generator),
        (torch.rand(rows, generator=generator) < 0.4).float(),
        torch.randint(STATES, (rows,), generator=generator),
    )


def segments(rows: Batch, steps: int) -> Batch:
    """Return rows as segments: row i with the rows after it, where every fourth segment is cut at its first step."""
    if steps == 1:
        return rows
    following = (torch.arange(len(rows.rewards))[:, None] + torch.arange(steps)) % len(rows.rewards)
    mask = torch.ones(len(rows.rewards), steps)
    mask[::4, 1:] = 0
    fields = [each[following] for each in rows[:5]]
    returns_to_go = fields[2].flip(1).cumsum(1).flip(1)
    return Batch(*fields, rows.rows, mask, returns_to_go, torch.arange(steps).expand_as(mask))


def drawn(algorithm: OfflineAlgorithm, call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """Return what `call` returns, and the noise that it drew."""
    state = algorithm.noise.get_state()
    with algorithm.noise.recording() as draws:
        result = call()
    algorithm.noise.set_state(state)
    return result, [algorithm.noise.draw_from_stream(draw) for draw in draws]


def double(rows: Batch) -> Batch:
    return Batch(*(each if each is None or not each.is_floating_point() else each.double() for each in rows))


def shake(module: nn.Module, seed: int = 1, scale: float = 0.1) -> None:
    """Make a copy differ from its original."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def rate(algorithm: OfflineAlgorithm, spec: OptimizerSpec) -> float:
    """Return the learning rate of the next update."""
    return spec.rate_at(algorithm.gradient_step - algorithm.main_start, algorithm.main_steps)


def moved(module: nn.Module, update: Callable[[], object]) -> set[str]:
    """Return the names of the networks that an update changes."""
    before = {name: weights(child) for name, child in module.named_children()}
    update()
    return {
        name
        for name, child in module.named_children()
        if not all(torch.equal(a, b) for a, b in zip(child.parameters(), before[name], strict=True))
    }


def load_tool(name: str) -> ModuleType:
    """Return a script of tools/ as a module."""
    specification = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    sys.modules[name] = tool  # where dataclasses look for their annotations
    specification.loader.exec_module(tool)
    return tool


CRITIC_PHASE = {"pretrain_steps": 20, "critic.hidden_dim": 16, "critic.batch_size": 6, "critic.steps": 20}
ENERGY = {
    **CRITIC_PHASE,
    "diffusion.hidden_dim": 16,
    "energy.hidden_dim": 16,
    "energy.batch_size": 4,
    "support_actions": 3,
}
ACTOR_CRITIC = {"hidden_dim": 16, "critic.hidden_dim": 16}
DTQL = {"pretrain_steps": 20, "hidden_dim": 16, "critic.hidden_dim": 16, "cosine_decay": True}
BDPO = {"pretrain_steps": 20, "warmup_steps": 20, "hidden_dim": 16, "critic.hidden_dim": 16}
# Small networks and short phases of every exported algorithm, by dotted names as on the command line.
TINY: dict[str, dict[str, object]] = {
    "DTQL": DTQL,
    "DTQLKL": DTQL,
    "BDPO": {**BDPO, "critic.members": 2, "samples": 2},
    "BDPOGaussian": BDPO,
    "BDPODeterministic": BDPO,
    "EDA": {
        **CRITIC_PHASE,
        "diffusion.hidden_dim": 16,
        "candidates_per_state": 3,
        "label_fraction": 0.5,
        "alignment_batch_size": 4,
    },
    "AEPO": {**ENERGY, "table_size": 5, "table_samples": 16},
    "QGPO": ENERGY,
    "BC": {"hidden_dim": 16},
    "DAC": {**ACTOR_CRITIC, "critic.members": 2, "samples": 2},
    "DQL": {**ACTOR_CRITIC, "acting.candidates": 3},
    "EDP": {**ACTOR_CRITIC, "acting.candidates": 3, "diffusion_steps": 5},
    "IQL": ACTOR_CRITIC,
    "IDQL": {**ACTOR_CRITIC, "acting.candidates": 4},
    "SfBC": {
        "pretrain_steps": 20,
        "diffusion.hidden_dim": 16,
        "critic.steps": 20,
        "critic.hidden_dims": [16, 16],
        "critic.behavior_actions": 3,
        "acting.candidates": 5,
        "acting.average_of": 2,
    },
    "SRPO": {**CRITIC_PHASE, "hidden_dim": 16, "policy_hidden_dim": 16, "policy_batch_size": 4},
    "TD3BC": ACTOR_CRITIC,
    "FQL": ACTOR_CRITIC,
    "IFQL": {**ACTOR_CRITIC, "acting.candidates": 3},
    "QC": {**ACTOR_CRITIC, "candidates": 3, "chunk_length": 3},
    "ReBRAC": ACTOR_CRITIC,
    "AWAC": ACTOR_CRITIC,
    "CQL": {**ACTOR_CRITIC, "samples": 3},
    "DecisionTransformer": {"context": 4, "embedding_dim": 16, "layers": 2, "heads": 2, "max_episode_steps": 30},
    "BCQ": {**ACTOR_CRITIC, "vae_hidden_dim": 16, "acting.candidates": 5},
}


def tiny_options(name: str) -> dict[str, object]:
    """Return the options of an algorithm in `TINY`; of others, general ones that the constructor has."""
    if name in TINY:
        return TINY[name]
    parameters = inspect.signature(ALGORITHMS[name]).parameters
    general = {"pretrain_steps": 20, "hidden_dim": 16}
    return {option: value for option, value in general.items() if option in parameters}


def nested(options: Mapping[str, object]) -> dict[str, Any]:
    """Return options of a constructor of options with dotted names; keyword arguments have `__` for the dot."""
    result: dict[str, Any] = {}
    for name, value in options.items():
        group, _, leaf = name.replace("__", ".").rpartition(".")
        (result.setdefault(group, {}) if group else result)[leaf] = value
    return result


def dotted(options: Mapping[str, object]) -> dict[str, object]:
    return {name.replace("__", "."): value for name, value in options.items()}


def write_log(path: Path) -> None:
    """Write ten made-up episodes of six steps."""
    some = np.random.default_rng(0)
    np.savez(
        path,
        observations=some.normal(size=(60, 3)),
        actions=some.uniform(-1, 1, (60, 2)),
        rewards=some.normal(size=60),
        terminals=np.arange(60) % 6 == 5,
        timeouts=np.zeros(60, bool),
    )


def words(root: Path, model: str, *extra: str, **options: object) -> list[str]:
    """Return the words of a tiny training on made-up data, of 60 steps: three phases of 20 where there are three."""
    data = root.parent / "data.npz"
    if not data.exists():
        write_log(data)
    all_options = {
        "model": model,
        **{f"model.init_args.{name}": value for name, value in {**tiny_options(model), **dotted(options)}.items()},
        "data.dataset": data,
        "data.batch_size": 8,
        "data.block_size": 7,
        "data.steps_per_epoch": 10,
        "evaluation.enabled": False,
        "tensorboard.histograms": False,
        "checkpoint.keep_every_n_epochs": 1,
        "trainer.max_steps": 60,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": root,
        "trainer.enable_progress_bar": False,
    }
    return ["fit", *(f"--{name}={value}" for name, value in all_options.items()), *extra]


def checkpoints(root: Path) -> Path:
    (last,) = root.rglob("last.ckpt")
    return last.parent


def state(root: Path) -> dict[str, Tensor]:
    content: dict[str, Tensor] = torch.load(checkpoints(root) / "last.ckpt", weights_only=True)["state_dict"]
    return content
