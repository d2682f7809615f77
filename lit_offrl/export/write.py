"""Exporting a policy: the file, the check, the manifest."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_offrl import __version__
from lit_offrl.errors import UserError, did_you_mean, one_line
from lit_offrl.export.formats import FORMATS, OPSET
from lit_offrl.export.graph import PolicyGraph, trace_policy
from lit_offrl.export.parity import Parity, check_parity
from lit_offrl.policy import Policy
from lit_offrl.system.files import write_atomically, write_json

MANIFEST = "manifest.json"


def check_output(path: Path, kind: str) -> None:
    """Raise `UserError` unless a policy can be exported to `path` in the format `kind`."""
    if kind not in FORMATS:
        raise UserError(f"--format: no '{kind}'{did_you_mean(kind, FORMATS)}; there are {', '.join(FORMATS)}")
    FORMATS[kind].check_packages()
    suffix = FORMATS[kind].suffix
    if path.suffix != suffix:
        raise UserError(f"--output: {path} must end in {suffix}, as files of {kind} do")
    for each in (path, path.parent / MANIFEST):
        if each.exists():
            raise UserError(f"{each} exists: remove it, or choose a file in another folder with --output")


def export_policy(policy: Policy, path: Path, kind: str, observations: Tensor) -> Parity:
    """Write a policy to a file that acts without this package, compare both, and write `manifest.json` beside the file.

    Args:
        policy: The policy, on a CPU.
        path: The file; neither it nor the manifest may exist.
        kind: `onnx`, `torch_export` or `torchscript`.
        observations: Where to compare, `[n, observation_dim]`, in the environment's units.

    Raises:
        UserError: The policy cannot be exported, a package is missing, or the file cannot be written.
        RunFailure: The file does not act as the policy does; nothing is written then.
    """
    check_output(path, kind)
    graph = trace_policy(policy)
    compared: list[Parity] = []

    def write(file: Path) -> None:
        renamed = file.with_name(f"{file.name}{path.suffix}")  # formats look at the suffix
        try:
            compared.append(write_and_compare(policy, graph, renamed, kind, observations))
            renamed.replace(file)
        finally:
            renamed.unlink(missing_ok=True)

    try:
        write_atomically(path, write)
        write_json(path.parent / MANIFEST, manifest(policy, graph, path, kind, compared[0]))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({one_line(error)[:200]}): choose another with --output") from error
    return compared[0]


def write_and_compare(policy: Policy, graph: PolicyGraph, path: Path, kind: str, observations: Tensor) -> Parity:
    """Write a policy's graph, act with the file, and compare; see `export_policy`."""
    try:
        FORMATS[kind].write(graph, path)
        act = FORMATS[kind].load(path)
    except OSError:
        raise
    except Exception as error:  # whatever PyTorch's exporters and ONNX Runtime meet
        raise UserError(
            f"export: {policy.spec.algorithm} cannot be written as {kind} ({one_line(error)[:200]})"
        ) from error
    return check_parity(policy, act, observations)


def manifest(policy: Policy, graph: PolicyGraph, path: Path, kind: str, parity: Parity) -> dict[str, Any]:
    """Return what a user of the file must know."""
    spec, units = policy.spec, policy.algorithm.units
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "format": kind,
        "opset": OPSET if kind == "onnx" else None,
        "algorithm": spec.algorithm,
        "actor": spec.actor,
        "dataset": spec.dataset,
        "dataset_sha256": spec.dataset_sha256,
        "gradient_steps": spec.gradient_steps,
        "inputs": [
            {
                "name": "observations",
                "shape": ["n", spec.observation_dim],
                "dtype": "float32",
                "units": "the environment's; normalization is inside",
                "mean": units.observation_mean.tolist(),
                "std": units.observation_std.tolist(),
            },
            *(
                {
                    "name": each.name,
                    "shape": ["n" if size is None else size for size in each.shape],
                    "dtype": "float32",
                    "distribution": {"normal": "normal(0, 1)", "exponential": "exponential(1)"}[each.distribution],
                }
                for each in graph.noise
            ),
        ],
        "output": {
            "name": "actions",
            "shape": ["n", spec.action_dim],
            "dtype": "float32",
            "units": "the environment's",
            "low": spec.action_low.tolist(),
            "high": spec.action_high.tolist(),
        },
        "deterministic": not graph.noise,
        "parity": asdict(parity),
        "versions": {
            "lit_offrl": __version__,
            "torch": torch.__version__,
            **{name: version(name) for name in FORMATS[kind].packages},
            "python": platform.python_version(),
        },
    }
