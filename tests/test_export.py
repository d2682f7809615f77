"""Exported policies: what acts without this package acts as `Policy.act` does."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from test_policy import save, trained
from tiny import write_log

from lit_offrl.algorithms import ALGORITHMS
from lit_offrl.cli import main
from lit_offrl.errors import RunFailure
from lit_offrl.export.draws import GivenDraws, RecordedDraws
from lit_offrl.export.formats import FORMATS, write_onnx
from lit_offrl.export.graph import trace_policy
from lit_offrl.export.parity import check_parity, typical_observations
from lit_offrl.export.write import write_and_compare
from lit_offrl.policy import Policy

FIRST = ("BC", "DTQL", "FQL", "IQL", "TD3BC")
MEMORIES = {"DecisionTransformer", "QC"}

# What a user of the file writes; it gets the file and arrays, and neither this package nor its folder.
ACT = {
    "onnx": "import onnxruntime\nsession = onnxruntime.InferenceSession(path)\nactions = session.run(None, inputs)[0]",
    "torch_export": "import torch\nact = torch.export.load(path).module()\n"
    "actions = act(*map(torch.from_numpy, inputs.values())).numpy()",
    "torchscript": "import torch\nact = torch.jit.load(path)\n"
    "actions = act(*map(torch.from_numpy, inputs.values())).numpy()",
}


def export(path: Path, *words: object) -> int:
    return main(["export", "--ckpt_path", str(path), *map(str, words)])


def act_elsewhere(kind: str, path: Path, inputs: dict[str, np.ndarray], folder: Path) -> np.ndarray:
    """Return the actions of a file in an isolated process that cannot import this package."""
    np.savez(folder / "inputs.npz", **inputs)
    code = (
        "import sys, numpy\n"
        "sys.modules['lit_offrl'] = None\n"  # an import raises, also where the package is installed
        f"path, inputs = {str(path)!r}, dict(numpy.load({str(folder / 'inputs.npz')!r}))\n"
        f"{ACT[kind]}\n"
        "assert not [name for name in sys.modules if name.startswith('lit_offrl.')]\n"
        f"numpy.save({str(folder / 'actions.npy')!r}, actions)\n"
    )
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}  # it leaves a file in the temporary folder
    subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, check=True, env=environment)
    actions: np.ndarray = np.load(folder / "actions.npy")
    return actions


SLOW = pytest.mark.slow  # processes of their own, after the first


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("onnx", "DTQL"),
        pytest.param("torch_export", "FQL", marks=SLOW),
        pytest.param("torchscript", "IQL", marks=SLOW),
    ],
)
def test_a_file_acts_in_a_process_without_this_package(
    kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint = save(trained(name), run / "checkpoints" / "last.ckpt")
    assert export(checkpoint, "--format", kind) == 0
    folder = run / "export" / f"policy_{kind}"
    path = folder / f"policy{FORMATS[kind].suffix}"
    assert {each.name for each in folder.iterdir()} == {path.name, "manifest.json"}
    printed = capsys.readouterr().out
    assert "largest difference from policy.act" in printed
    assert str(path) in printed
    manifest = json.loads((folder / "manifest.json").read_text())
    policy = Policy(trained(name), seed=5)
    observations = 3 * torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    with RecordedDraws() as recorded:
        expected = policy.act(observations)
    given = [observations, *(noise for _, noise in recorded.draws)]
    names = [each["name"] for each in manifest["inputs"]]
    inputs = {name: each.numpy() for name, each in zip(names, given, strict=True)}
    for each in manifest["inputs"]:
        assert each["shape"] == ["n", *inputs[each["name"]].shape[1:]]
    actions = act_elsewhere(kind, path, inputs, tmp_path)
    assert np.abs(actions - expected.numpy()).max() <= 3e-5  # the actions reach over 6: 1e-5 of half of that
    assert manifest["deterministic"] == (name == "IQL")


def test_the_manifest_says_what_the_file_is(tmp_path: Path):
    checkpoint = save(trained("FQL"), tmp_path / "last.ckpt")
    path = tmp_path / "out" / "fql.pt"
    assert export(checkpoint, "--format", "torchscript", "--actor", "behavior", "--output", path) == 0
    manifest: dict[str, Any] = json.loads((path.parent / "manifest.json").read_text())
    assert manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (manifest["algorithm"], manifest["actor"], manifest["format"]) == ("FQL", "behavior", "torchscript")
    assert (manifest["dataset"], manifest["dataset_sha256"]) == ("log", "ab" * 32)
    assert manifest["gradient_steps"] == 10**6
    assert (manifest["file"], manifest["opset"], manifest["deterministic"]) == ("fql.pt", None, False)
    assert manifest["inputs"][0]["mean"] == [2, 2, 2]
    assert manifest["inputs"][1] == {
        "name": "noise",
        "shape": ["n", 2],
        "dtype": "float32",
        "distribution": "normal(0, 1)",
    }
    assert (manifest["output"]["low"], manifest["output"]["high"]) == ([-2, -5], [4, 1])
    assert manifest["parity"]["states"] == 1000
    assert manifest["parity"]["max_difference"] <= 1e-5
    assert manifest["versions"]["torch"] == torch.__version__
    folder = str(Path(__file__).parent.parent)  # files name no place of the machine that made them
    assert all(folder.encode() not in each.read_bytes() for each in path.parent.iterdir())


def test_given_exponential_noise_chooses_as_multinomial_does():
    weights = torch.rand(50, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for count in (1, 4):
        with RecordedDraws() as recorded:
            expected = torch.multinomial(weights, count, generator=torch.Generator().manual_seed(3))
        ((distribution, noise),) = recorded.draws
        assert distribution == "exponential"
        with GivenDraws([noise]):
            assert torch.equal(torch.multinomial(weights, count), expected)


def test_noise_is_what_makes_actions_differ(tmp_path: Path):
    graph = trace_policy(Policy(trained("DTQL")))
    assert [(each.name, each.distribution, each.shape) for each in graph.noise] == [
        ("noise", "normal", (None, 1024, 2)),
        ("choice", "exponential", (None, 1024)),
    ]
    observations, noise, choice = (each[:1].expand(3, *each.shape[1:]) for each in graph.example)
    same = graph.module(observations, noise, choice)
    assert torch.equal(same, same[:1].expand_as(same))
    other = graph.module(observations, noise, torch.empty(3, 1024).exponential_())
    assert not torch.equal(other, same)


def test_an_onnx_file_has_the_weights_of_an_unrolled_solver_once(tmp_path: Path):
    policy = Policy(trained("FQL"), "behavior")  # ten Euler steps
    write_onnx(trace_policy(policy), tmp_path / "policy.onnx")
    nodes = onnx.load(tmp_path / "policy.onnx").graph.node
    constants = [each.attribute[0].t.raw_data for each in nodes if each.op_type == "Constant"]
    kept = sum(len(each) for each in constants if len(each) >= 64)  # bytes: those of weights
    field = sum(each.numel() * each.element_size() for each in policy.algorithm.behavior.parameters())
    assert kept <= field
    assert kept > 0.9 * field


def test_a_file_that_acts_otherwise_is_refused():
    policy = Policy(trained("IQL"))
    observations = typical_observations(policy, 50)
    with pytest.raises(RunFailure, match="does not act as the policy does"):
        check_parity(policy, lambda each: policy.act(each) + 1e-3, observations)
    assert check_parity(policy, policy.act, observations).max_difference == 0


def test_what_cannot_be_exported_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fails(message: str, path: Path, *words: object) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert export(path, *words) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
        assert sorted(tmp_path.rglob("*")) == before

    iql = save(trained("IQL"), tmp_path / "iql.ckpt")
    qc = save(trained("QC"), tmp_path / "qc.ckpt")
    text = tmp_path / "text.ckpt"
    text.write_text("no checkpoint")
    script = ("--format", "torchscript")
    fails("actor: IQL has no behavior", iql, *script, "--actor", "behavior")
    fails(f"load_policy: no checkpoint at {tmp_path / 'no.ckpt'}", tmp_path / "no.ckpt", *script)
    fails(f"load_policy: {text} is broken (BadZipFile)", text, *script)
    fails(
        "--format: no 'onxx' (did you mean 'onnx'?); there are onnx, torch_export, torchscript",
        iql,
        "--format",
        "onxx",
    )
    fails(
        f"--output: {tmp_path / 'a.onnx'} must end in .pt, as files of torchscript do",
        iql,
        *script,
        "--output",
        tmp_path / "a.onnx",
    )
    memory = "keeps a memory of the episode from action to action, which a graph has not: use lit_offrl.load_policy"
    fails(f"export: QC {memory}", qc, *script)
    there = tmp_path / "there.pt"
    there.write_text("mine")
    fails(
        f"{there} exists: remove it, or choose a file in another folder with --output", iql, *script, "--output", there
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "lit_offrl.export.formats.find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    fails("export: onnxruntime is not installed: pip install 'lit_offrl[export]'", iql, "--format", "onnx")


def test_states_of_a_dataset_serve_for_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tmp_path / "log.npz"
    write_log(data)
    checkpoint = save(trained("BC"), tmp_path / "last.ckpt")
    assert export(checkpoint, "--format", "torchscript", "--data.dataset", data) == 0
    assert "at 60 states" in capsys.readouterr().out


@pytest.mark.slow  # minutes for all classes
@pytest.mark.parametrize("name", sorted({*ALGORITHMS} - MEMORIES - {*FIRST}))
def test_every_algorithm_is_exported_to_torchscript(name: str, tmp_path: Path):
    policy = Policy(trained(name))
    graph = trace_policy(policy)
    parity = write_and_compare(policy, graph, tmp_path / "policy.pt", "torchscript", typical_observations(policy))
    assert parity.states_beyond <= 10


@pytest.mark.parametrize("name", [each for each in FIRST if each != "DTQL"])
def test_the_first_are_exported_to_onnx(name: str, tmp_path: Path):
    policy = Policy(trained(name))
    graph = trace_policy(policy)
    parity = write_and_compare(policy, graph, tmp_path / "policy.onnx", "onnx", typical_observations(policy, 100))
    assert parity.max_difference <= 1e-5
