"""The tool that reproduces figures of the papers, on runs of a few steps."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY

from lit_offrl.collect.recorder import collect_dataset


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    specification = importlib.util.spec_from_file_location("paper_figures", REPOSITORY / "tools" / "paper_figures.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["paper_figures"] = module  # where dataclasses look for their annotations
    specification.loader.exec_module(module)
    return module


def test_a_row_of_paths_over_value_landscapes(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["bdpo11", f"--root={tmp_path}", "--sets", "moons", "--trainer.max_steps=6", "--data.batch_size=64"]
    words += ["--model.init_args.pretrain_steps=3", "--model.init_args.warmup_steps=1", "--bandit.figures=false"]
    words += ["--model.init_args.hidden_dim=16", "--data.steps_per_epoch=6", "--bandit.samples=50"]
    tool.main(words)
    assert (tmp_path / "bdpo11.png").read_bytes().startswith(b"\x89PNG")
    scores = json.loads((tmp_path / "bdpo/bandit/moons/seed_0/results.json").read_text())["bandit"]
    assert f"| `bandit/moons` | {scores['mean_label']:.3f} | 1.000 |" in capsys.readouterr().out


def test_two_rows_of_a_column_and_no_run_twice(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["dtql6", f"--root={tmp_path}", "--columns", "25gaussians-near", "--trainer.max_steps=6"]
    words += ["--model.init_args.pretrain_steps=3", "--model.init_args.hidden_dim=16", "--data.batch_size=8"]
    words += ["--data.steps_per_epoch=6", "--bandit.samples=50", "--bandit.figures=false"]
    tool.main(words)
    said = capsys.readouterr().out
    assert (tmp_path / "dtql6.png").read_bytes().startswith(b"\x89PNG")
    written = {}
    for name, algorithm in (("trust region", "dtql"), ("KL", "dtqlkl")):
        file = tmp_path / algorithm / "bandit/25gaussians-near" / "seed_0" / "results.json"
        scores = json.loads(file.read_text())["bandit"]
        best, off = (f"{scores[key]:.1%}" for key in ("best_mode_fraction", "off_mode_fraction"))
        assert f"| {name} | `bandit/25gaussians-near` | {best} | {off} |" in said
        written[file] = file.stat().st_mtime_ns
    tool.main(words)
    assert capsys.readouterr().out in said  # the same table, and no word of training
    assert all(file.stat().st_mtime_ns == time for file, time in written.items())


def test_curves_of_alignment_share_behavior_models_and_critics(
    tool: ModuleType,
    minari_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    hopper = "offrl/hopper/random-v0"  # its episodes are short
    collect_dataset(hopper, steps=500, seed=0, processes=1, progress=False)
    monkeypatch.setattr(tool, "EDA_STAGES", {"pretrain_steps": 3, "critic_steps": 2})
    alignment = {"trainer.max_steps": 4, "data.steps_per_epoch": 2, "trainer.check_val_every_n_epoch": 1}
    monkeypatch.setattr(tool, "EDA_ALIGNMENT", alignment)
    monkeypatch.setattr(tool, "EDA5_FRACTIONS", (0.1,))
    monkeypatch.setattr(tool, "EDA6_CANDIDATES", (2,))
    words = [f"--root={tmp_path}", f"--dataset={hopper}", "--seeds", "0", "1", "--episodes=2"]
    words += ["--data.batch_size=8", "--model.init_args.hidden_dim=16"]
    tool.main(["eda5", *words])
    said = capsys.readouterr().out
    stages = {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").rglob("results.json")}
    assert len(stages) == 2
    scores = []
    for seed in (0, 1):
        run = tmp_path / "labels_0.1" / "eda" / hopper / f"seed_{seed}"
        scores.append(json.loads((run / "results.json").read_text())["scores"]["normalized"])
        steps = {int(row.split(",")[0]) for row in (run / "eval.csv").read_text().splitlines()[1:]}
        assert steps == {2, 4}
        assert tool.curve(tool.RunFolder(run))[4] == pytest.approx(scores[-1])
    assert f"| 10% | {sum(scores) / 2:.1f} +- {abs(scores[0] - scores[1]) / 2**0.5:.1f} (" in said
    tool.main(["eda6", *words])
    said = capsys.readouterr().out
    assert "| value | 2 |" in said
    assert "| dpo | 2 |" in said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").rglob("results.json")} == stages
    for name in ("eda5", "eda6"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
