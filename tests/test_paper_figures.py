"""The tool that reproduces figures of the papers, on runs of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from tiny import load_tool

from lit_offrl.collect.recorder import collect_dataset


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("paper_figures")


@pytest.fixture(scope="module")
def hopper(minari_root: Path) -> str:
    """A dataset whose episodes are short."""
    dataset = "offrl/hopper/random-v0"
    collect_dataset(dataset, steps=500, seed=0, processes=1, progress=False)
    return dataset


@pytest.mark.slow
def test_a_row_of_paths_over_value_landscapes(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["bdpo11", f"--root={tmp_path}", "--sets", "moons", "--trainer.max_steps=6", "--data.batch_size=64"]
    words += ["--model.init_args.pretrain_steps=3", "--model.init_args.warmup_steps=1", "--bandit.figures=false"]
    words += ["--model.init_args.hidden_dim=16", "--data.steps_per_epoch=6", "--bandit.samples=50"]
    tool.main(words)
    assert (tmp_path / "bdpo11.png").read_bytes().startswith(b"\x89PNG")
    scores = json.loads((tmp_path / "bdpo/bandit/moons/seed_0/results.json").read_text())["bandit"]
    assert f"| `bandit/moons` | {scores['mean_label']:.3f} | 1.000 |" in capsys.readouterr().out


def test_two_rows_of_a_column_and_no_run_twice(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["dtql6", f"--root={tmp_path}", "--sets", "25gaussians-near", "--trainer.max_steps=6"]
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


@pytest.mark.slow
def test_curves_of_alignment_share_behavior_models_and_critics(
    tool: ModuleType,
    hopper: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(tool, "EDA_STAGES", {"pretrain_steps": 3, "critic.steps": 2})
    alignment = {"trainer.max_steps": 4, "data.steps_per_epoch": 2, "trainer.check_val_every_n_epoch": 1}
    monkeypatch.setattr(tool, "EDA_ALIGNMENT", alignment)
    monkeypatch.setattr(tool, "EDA5_FRACTIONS", (0.1,))
    monkeypatch.setattr(tool, "EDA6_CANDIDATES", (2,))
    words = [f"--root={tmp_path}", f"--dataset={hopper}", "--seeds", "0", "1", "--episodes=2"]
    words += ["--data.batch_size=8", "--model.init_args.diffusion.hidden_dim=16"]
    tool.main(["eda5", *words])
    said = capsys.readouterr().out
    stages = {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").rglob("results.json")}
    assert len(stages) == 2
    scores = []
    for seed in (0, 1):
        run = tmp_path / "value_8_labels_0.1" / "eda" / hopper / f"seed_{seed}"
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


@pytest.mark.slow
def test_one_training_acts_with_every_scale_and_rescaling(
    tool: ModuleType, hopper: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tool, "AEPO2_SCALES", (0.5, 3.0))
    words = ["aepo2", f"--root={tmp_path}", f"--dataset={hopper}", "--seeds", "0", "--episodes=2"]
    words += ["--trainer.max_steps=300", "--data.steps_per_epoch=300", "--data.batch_size=64"]
    words += ["--model.init_args.pretrain_steps=200", "--model.init_args.critic.steps=50"]
    words += ["--model.init_args.diffusion.hidden_dim=16", "--model.init_args.table_size=2"]
    tool.main(words)
    said = capsys.readouterr().out
    assert said.count("finished 300 gradient steps") == 1
    scores = {}
    for rescale in ("none", "sample", "batch"):
        path = tmp_path / "aepo" / hopper / "seed_0" / f"rescale_{rescale}.json"
        comparison = json.loads(path.read_text())["comparison"]
        scores[rescale] = [comparison[name]["normalized"] for name in ("behavior", "omega_0.5", "omega_3")]
        assert f"| {rescale} | {scores[rescale][0]:.1f} " in said
    assert scores["none"][0] == scores["sample"][0] == scores["batch"][0]  # where nothing guides, nothing is rescaled
    assert scores["none"][1:] != scores["sample"][1:]
    assert (tmp_path / "aepo2.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_samples_of_guided_policies_beside_the_target(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tool, "GUIDED_BETAS", (10.0,))
    monkeypatch.setattr(tool, "GUIDED_SAMPLES", 50)
    words = ["guided6", f"--root={tmp_path}", "--sets", "moons", "--trainer.max_steps=3", "--data.batch_size=32"]
    words += ["--model.init_args.pretrain_steps=1", "--model.init_args.critic.steps=1", "--bandit.figures=false"]
    words += ["--model.init_args.diffusion.hidden_dim=16", "--data.steps_per_epoch=3", "--bandit.samples=50"]
    tool.main(words)
    said = capsys.readouterr().out
    for algorithm, variant in (("AEPO", ""), ("AEPO", "several_points"), ("QGPO", "")):
        folder = tmp_path / "beta_10" / variant / algorithm.lower() / "bandit/moons/seed_0"
        scores = json.loads((folder / "results.json").read_text())["bandit"]
        assert scores["beta"] == 10
        name = algorithm + variant.replace("several_points", ", several points")
        assert f"| `bandit/moons` | 10 | {name} | {scores['mean_label']:.3f} |" in said
    assert (tmp_path / "guided6.png").read_bytes().startswith(b"\x89PNG")
