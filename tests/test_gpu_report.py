"""The report for machines with a GPU, made on the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny import load_tool


def test_the_report_has_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    report = load_tool("gpu_report")
    monkeypatch.setattr(report, "variants_on", lambda device: ["eager"])  # compiling takes a minute
    words = ["--device=cpu", "--algorithms=DTQL", "--batch-sizes=16", "--rounds=1", "--sections=losses,speed,kernels"]
    report.main([*words, f"--output={tmp_path}/report.md"])
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"\| DTQL: pretraining \| 0.0e\+00 \|", text), "the same on the same device"
    assert re.search(r"\| DTQL: training \| 16 \| [\d,.]+ \|", text)
    assert re.search(r"\| DTQL: training \| 16 \| [\d,.]+ \| \d+% \|", text)
    assert text.count("## ") == 3
    assert "## kernels" in capsys.readouterr().out


@pytest.mark.slow
def test_seeds_and_the_whole_run(tmp_path: Path, minari_root: Path, capsys: pytest.CaptureFixture[str]):
    report = load_tool("gpu_report")
    short = ["--data.dataset=offrl/pointmaze/umaze-v0", "--trainer.max_steps=200", "--evaluation.final_episodes=2"]
    words = ["--device=cpu", "--algorithms=DTQL", "--batch-sizes=16", "--seconds=1", "--sections=seeds,run"]
    report.main([*words, f"--run-options={' '.join(short)}"])
    output = capsys.readouterr().out
    assert re.search(r"\| DTQL \| 16 \| 2 \| eager \| [\d,.]+ \| [\d.]+ \|", output)
    assert "from start to end" in output


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]):
    report = load_tool("gpu_report")
    if report.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        report.main([])
    assert "there is no GPU here" in capsys.readouterr().err
