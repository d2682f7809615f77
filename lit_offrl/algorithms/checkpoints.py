"""What an algorithm writes into a checkpoint besides its weights, and how weights are read without a trainer."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_offrl.errors import UserError

if TYPE_CHECKING:
    from lit_offrl.algorithms.base import OfflineAlgorithm

ENTRY = "offrl"  # key of the package's own content in a checkpoint of Lightning


def training_state(algorithm: OfflineAlgorithm) -> dict[str, Any]:
    """Return the class, the gradient step and the position in the noise stream."""
    cls = type(algorithm)
    return {
        "class_path": f"{cls.__module__}.{cls.__qualname__}",
        "gradient_step": algorithm.gradient_step,
        "noise": algorithm.noise.get_state(),
    }


def restore_training_state(algorithm: OfflineAlgorithm, state: dict[str, Any]) -> None:
    """Set the gradient step and the position in the noise stream."""
    algorithm.gradient_step = state["gradient_step"]
    algorithm.noise.set_state(state["noise"])


def read_checkpoint(path: str | Path, option: str = "ckpt_path") -> dict[str, Any]:
    """Return the content of a checkpoint of this package, on the CPU.

    Args:
        path: The file.
        option: What to name in an error.

    Raises:
        UserError: There is no such file, or it is broken, or of another program.
    """
    if not Path(path).is_file():
        raise UserError(f"{option}: no checkpoint at {path}")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{option}: {path} is broken ({type(error).__name__})") from error
    if not isinstance(content, dict) or "gradient_step" not in content.get(ENTRY, {}):
        raise UserError(f"{option}: {path} is not a checkpoint of this package")
    return content


def load_pretrained(algorithm: OfflineAlgorithm, path: str | Path) -> None:
    """Copy every network parameter of a checkpoint that has the same name and shape in `algorithm`.

    Raises:
        UserError: The file is broken, or has no such parameter.
    """
    option = "model.init_args.pretrained"
    weights = read_checkpoint(path, option)["state_dict"]
    own = dict(algorithm.named_parameters())  # no buffers: the units of the data are this run's
    common = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if not common:
        raise UserError(f"{option}: {path} has no network of the same name and shape")
    algorithm.load_state_dict(common, strict=False)


def load_policy(path: str | Path) -> OfflineAlgorithm:
    """Return the algorithm of a checkpoint, ready to `act`: no trainer, dataset or environment is needed.

    Args:
        path: A checkpoint, e.g. `runs/dtql/offrl/antmaze/umaze-v0/seed_0/checkpoints/last.ckpt`.

    Raises:
        UserError: The file is no checkpoint of this package, or its class cannot be imported.
    """
    content = read_checkpoint(path, "load_policy")
    module, _, name = content[ENTRY]["class_path"].rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"load_policy: the class {module}.{name} of {path} cannot be imported ({error})") from error
    options = {key: value for key, value in content["hyper_parameters"].items() if not key.startswith("_")}
    algorithm: OfflineAlgorithm = cls(**{**options, "pretrained": None})
    algorithm.load_state_dict(content["state_dict"])
    restore_training_state(algorithm, content[ENTRY])
    return algorithm.eval()
