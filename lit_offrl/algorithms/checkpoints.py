"""What an algorithm writes into a checkpoint besides its weights, and how weights are read without a trainer."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_offrl.errors import UserError

if TYPE_CHECKING:
    from lit_offrl.algorithms.base import OfflineAlgorithm

ENTRY = "offrl"  # key of the package's own content in a checkpoint of Lightning


def training_state(algorithm: OfflineAlgorithm) -> dict[str, Any]:
    """Return the class, the gradient step, the position in the noise stream, and which data it was trained on."""
    cls = type(algorithm)
    return {
        "dataset": algorithm.trained_on,
        "init_from": algorithm.init_from,
        "class_path": f"{cls.__module__}.{cls.__qualname__}",
        "gradient_step": algorithm.gradient_step,
        "noise": algorithm.noise.get_state(),
    }


def restore_training_state(algorithm: OfflineAlgorithm, state: dict[str, Any]) -> None:
    """Set the gradient step, the position in the noise stream, and what the run began with."""
    algorithm.init_from = state.get("init_from")
    algorithm.gradient_step = state["gradient_step"]
    algorithm.noise.set_state(state["noise"])


def read_checkpoint(path: str | Path, option: str = "ckpt_path") -> dict[str, Any]:
    """Return the content of a checkpoint of this package, on the CPU.

    Args:
        path: The file.
        option: What to name in an error.

    Raises:
        UserError: There is no such file, or it is broken, or of another program, or its weights are not finite.
    """
    if not Path(path).is_file():
        raise UserError(f"{option}: no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as parts:  # a checkpoint is a zip file, whose checksums torch does not check
            damaged = parts.testzip()
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"{option}: {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # whatever damaged bytes cause
        raise UserError(f"{option}: {path} is broken ({type(error).__name__})") from error
    if damaged is not None:
        raise UserError(f"{option}: {path} is broken (the checksum of {damaged} is wrong)")
    if not isinstance(content, dict) or not isinstance(content.get(ENTRY), dict):
        raise UserError(f"{option}: {path} is not a checkpoint of this package")
    for name, holds in _CONTENT.items():
        if not holds(content):
            raise UserError(f"{option}: {path} is broken (no valid {name})")
    for name, value in content["state_dict"].items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{option}: {name} in {path} is not finite: the training diverged; take an earlier one")
    return content


_CONTENT: dict[str, Callable[[dict[str, Any]], bool]] = {
    "class_path": lambda content: isinstance(content[ENTRY].get("class_path"), str),
    "gradient_step": lambda content: _is_count(content[ENTRY].get("gradient_step")),
    "noise": lambda content: getattr(content[ENTRY].get("noise"), "dtype", None) is torch.uint8,
    "hyper_parameters": lambda content: isinstance(content.get("hyper_parameters"), dict),
    "state_dict": lambda content: (
        isinstance(content.get("state_dict"), dict)
        and all(isinstance(each, torch.Tensor) for each in content["state_dict"].values())
    ),
}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def check_fits(content: dict[str, Any], algorithm: OfflineAlgorithm, path: str | Path, resumes: bool) -> None:
    """Check that a checkpoint can be restored into an algorithm, and change nothing.

    Args:
        content: See `read_checkpoint`.
        algorithm: The algorithm as its options say.
        path: Where the checkpoint lies.
        resumes: The training goes on, so that the states of its optimizers are needed, too.

    Raises:
        UserError: It is of another algorithm, of networks of other sizes, or lacks what is needed.
    """
    cls = type(algorithm)
    if content[ENTRY]["class_path"].rpartition(".")[2] != cls.__qualname__:
        raise UserError(f"ckpt_path: {path} is of {content[ENTRY]['class_path']}, not of {cls.__qualname__}")
    expected, found = algorithm.state_dict(), content["state_dict"]
    for name in sorted({*expected, *found}):
        if name not in expected or name not in found or expected[name].shape != found[name].shape:
            raise UserError(f"ckpt_path: {path} was made with other model options: {name} has another size")
    if not resumes:
        return
    states = content.get("optimizer_states")
    own = [adam.state_dict() for adam in algorithm.configure_optimizers()]
    if not isinstance(states, list) or _shapes(states) != _shapes(own):
        raise UserError(f"ckpt_path: {path} is broken (no valid optimizer_states)")
    if content[ENTRY]["noise"].shape != algorithm.noise.get_state().shape:
        raise UserError(f"ckpt_path: {path} is broken (no valid noise)")
    loops = content.get("loops")
    if not isinstance(loops, dict) or not isinstance(loops.get("fit_loop"), dict):
        raise UserError(f"ckpt_path: {path} is broken (no valid loops)")


def _shapes(value: Any) -> Any:
    """Return the shape of each tensor in nested lists and dictionaries, and nothing of other values."""
    if isinstance(value, dict):
        return {key: _shapes(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_shapes(each) for each in value]
    return value.shape if isinstance(value, torch.Tensor) else None


def check_dataset(content: dict[str, Any], dataset: str, sha256: str | None, path: str | Path) -> None:
    """Check that a training goes on with the data that it began with.

    Args:
        content: See `read_checkpoint`.
        dataset: Id of the present dataset.
        sha256: Its digest; None where it has none.
        path: Where the checkpoint lies.

    Raises:
        UserError: The data are others.
    """
    began = content[ENTRY].get("dataset")
    if not isinstance(began, dict):  # a checkpoint of a script, or of an earlier version
        return
    digests = began.get("sha256"), sha256
    if began.get("id") != dataset if None in digests else digests[0] != digests[1]:
        name = f"other data of the name {dataset}" if began.get("id") == dataset else began.get("id")
        raise UserError(
            f"ckpt_path: {path} was trained on {name}, not on {dataset}; a new run starts from its weights with "
            f"--init_from {path} in place of --ckpt_path"
        )


def load_weights(algorithm: OfflineAlgorithm, content: dict[str, Any], path: str | Path, option: str) -> dict[str, Any]:
    """Copy every network parameter of a checkpoint that has the same name and shape in `algorithm`.

    Args:
        algorithm: Receives the weights.
        content: See `read_checkpoint`.
        path: Where the checkpoint lies.
        option: What to name in an error.

    Returns:
        What the run records about them.

    Raises:
        UserError: It has no such parameter.
    """
    weights = content["state_dict"]
    own = dict(algorithm.named_parameters())  # no buffers: the units of the data are this run's
    common = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if not common:
        raise UserError(f"{option}: {path} has no network of the same name and shape")
    algorithm.load_state_dict(common, strict=False)
    began = content[ENTRY].get("dataset") or {}
    return {
        "checkpoint": str(path),
        "dataset": began.get("id"),
        "gradient_steps": content[ENTRY]["gradient_step"],
        "parameters": len(common),
        "of": len(own),
    }


def load_algorithm(path: str | Path, trust: bool = False) -> OfflineAlgorithm:
    """Return the algorithm of a checkpoint, ready to `act`: no trainer, dataset or environment is needed.

    Args:
        path: A checkpoint, e.g. `runs/dtql/offrl/antmaze/umaze-v0/seed_0/checkpoints/last.ckpt`.
        trust: Import the algorithm's class also where it is not of this package and its module has not been imported
            yet, which runs that module's code.

    Raises:
        UserError: The file is no checkpoint of this package, its class cannot be imported, or is not trusted.
    """
    content = read_checkpoint(path, "load_policy")
    module, _, name = content[ENTRY]["class_path"].rpartition(".")
    if not (trust or module in sys.modules or module.startswith("lit_offrl.")):
        raise UserError(f"load_policy: {path} is of {module}.{name}: import {module} first, or give trust=True")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"load_policy: the class {module}.{name} of {path} cannot be imported ({error})") from error
    options = {key: value for key, value in content["hyper_parameters"].items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):  # the first weights, which are overwritten, take no noise from elsewhere
        algorithm: OfflineAlgorithm = cls(**{**options, "pretrained": None})
    algorithm.load_state_dict(content["state_dict"])
    algorithm.trained_on = content[ENTRY].get("dataset")
    restore_training_state(algorithm, content[ENTRY])
    return algorithm.eval()
