"""The formats of an exported policy: how each file is written, and how it acts."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_offrl.errors import UserError
from lit_offrl.export.graph import PolicyGraph

ATEN = torch.ops.aten
OPSET = 18
Act = Callable[..., Tensor]  # maps observations and noise to actions


@dataclass(frozen=True)
class Format:
    """A format of exported policies.

    Attributes:
        suffix: Of its files.
        write: Writes a graph to a path.
        load: Returns what acts by the file at a path.
        packages: What it needs beside torch.
    """

    suffix: str
    write: Callable[[PolicyGraph, Path], None]
    load: Callable[[Path], Act]
    packages: tuple[str, ...] = ()

    def check_packages(self) -> None:
        """Raise `UserError` unless all packages are installed."""
        for name in self.packages:
            if find_spec(name) is None:
                raise UserError(f"export: {name} is not installed: pip install 'lit_offrl[export]'")


# ---------------------------------------------------------------- torch.export


def write_torch_export(graph: PolicyGraph, path: Path) -> None:
    """Write an `ExportedProgram`."""
    rows = torch.export.Dim("n")
    shapes = ({0: rows}, *({each.rows_dim: rows} for each in graph.noise))
    program = torch.export.export(graph.module, graph.example, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names files of this machine
    torch.export.save(program, path)


def load_torch_export(path: Path) -> Act:
    """Return the module of an `ExportedProgram`."""
    act: Act = torch.export.load(path).module()
    return act


# ---------------------------------------------------------------- TorchScript


def to_torchscript(graph: PolicyGraph) -> torch.jit.ScriptModule:
    """Return the graph in TorchScript, with its weights as constants."""
    module = copy.deepcopy(graph.module)
    for node in module.graph.nodes:
        if node.target is ATEN.sym_size.int:
            node.target = ATEN.size
        elif node.target is ATEN.sum.dim_IntList and not node.args[1]:  # ONNX has no empty list of dimensions
            node.target, node.args = ATEN.sum, node.args[:1]
        elif node.target is ATEN._softmax.default:  # not known to ONNX
            node.target, node.args = ATEN.softmax, node.args[:2]
        elif isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket  # TorchScript finds the overload itself
    names = ["observations", *(each.name for each in graph.noise)]
    for name, node in zip(names, module.graph.find_nodes(op="placeholder"), strict=True):
        node.target = name
    module.recompile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch advises torch.export, which is a format here
        script: torch.jit.ScriptModule = torch.jit.freeze(torch.jit.script(module.eval()))
    return script


def write_torchscript(graph: PolicyGraph, path: Path) -> None:
    """Write a `ScriptModule`."""
    to_torchscript(graph).save(path)


def load_torchscript(path: Path) -> Act:
    """Return a `ScriptModule`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        act: Act = torch.jit.load(path)  # type: ignore[no-untyped-call]
    return act


# ---------------------------------------------------------------- ONNX


def write_onnx(graph: PolicyGraph, path: Path) -> None:
    """Write an ONNX model.

    PyTorch's exporter from TorchScript is the older one. The one from `torch.export` takes 20 times as long for the
    unrolled solvers, minutes where gradients guide them.
    """
    names = ["observations", *(each.name for each in graph.noise)]
    rows = {"observations": {0: "n"}, "actions": {0: "n"}, **{each.name: {each.rows_dim: "n"} for each in graph.noise}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older exporter, and of constants that it does not fold
        torch.onnx.export(
            to_torchscript(graph),
            graph.example,
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=names,
            output_names=["actions"],
            dynamic_axes=rows,
        )
    share_constants(path)


def share_constants(path: Path) -> None:
    """Keep one of the equal constants of an ONNX model.

    The exporter writes one for each use: an unrolled solver of 15 steps has every weight 15 times.
    """
    import onnx

    model = onnx.load(path)
    first: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            content = node.attribute[0].SerializeToString(deterministic=True)
            renamed[node.output[0]] = first.setdefault(content, node.output[0])
            if renamed[node.output[0]] != node.output[0]:
                continue
        node.input[:] = [renamed.get(name, name) for name in node.input]
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def load_onnx(path: Path) -> Act:
    """Return an inference session of ONNX Runtime on the CPU."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from version 1.32 on, it starts with the import
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def act(*inputs: Tensor) -> Tensor:
        arrays: dict[str, Any] = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return act


FORMATS = {
    "onnx": Format(".onnx", write_onnx, load_onnx, ("onnx", "onnxruntime")),
    "torch_export": Format(".pt2", write_torch_export, load_torch_export),
    "torchscript": Format(".pt", write_torchscript, load_torchscript),
}
