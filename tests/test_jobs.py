"""Several seeds at once: the runs that they would be by themselves, over one table."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DATASET

from lit_offrl.cli import main
from lit_offrl.cli.parser import split_options
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.shared_tables import SHARED_TABLES
from lit_offrl.jobs.local import Job, run_jobs
from lit_offrl.run_folder import RunFolder

NO_SCORE = "--evaluation.enabled=false"


def folder(root: Path, seed: int) -> RunFolder:
    return RunFolder.of(root, "dtql", DATASET, seed)


def state(root: Path, seed: int) -> dict[str, torch.Tensor]:
    content = torch.load(folder(root, seed).last_checkpoint, weights_only=True)
    weights: dict[str, torch.Tensor] = content["state_dict"]
    return weights


def test_each_seed_is_the_run_it_would_be_alone(
    tiny: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: sums are split alike, so the bits are the same
    together, alone = tmp_path / "together", tmp_path / "alone"
    words = tiny(f"--trainer.default_root_dir={together}", NO_SCORE, "--seeds=0,1", "--parallel=2")
    assert main(words) == 0
    assert main(tiny(f"--trainer.default_root_dir={alone}", NO_SCORE, "--seed_everything=1")) == 0
    for key, value in state(alone, 1).items():
        assert torch.equal(value, state(together, 1)[key]), key
    assert not torch.equal(state(together, 0)["policy.layers.0.weight"], state(together, 1)["policy.layers.0.weight"])
    said = capfd.readouterr().out
    assert "seed 0 | finished 90 gradient steps" in said
    assert "2 of 2 finished" in said


@pytest.mark.slow  # four processes; what each of them does with --ckpt_path=auto is part of the next test
def test_the_same_command_trains_only_seeds_that_are_not_finished(
    tiny: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    together = tmp_path / "together"
    words = tiny(f"--trainer.default_root_dir={together}", NO_SCORE, "--seeds=0,1")
    assert main(words) == 0
    trained = state(together, 1)
    capfd.readouterr()
    before = folder(together, 0).last_checkpoint.stat().st_mtime_ns
    folder(together, 1).last_checkpoint.unlink()
    (folder(together, 1).path / "results.json").unlink()
    assert main(words) == 0
    assert "seed 0 | finished already" in capfd.readouterr().out
    assert folder(together, 0).last_checkpoint.stat().st_mtime_ns == before
    for key, value in trained.items():
        assert torch.equal(value, state(together, 1)[key]), key


def test_a_request_to_stop_reaches_all_and_they_go_on_later(
    minari_root: Path, tiny: Callable[..., list[str]], tmp_path: Path
):
    root = tmp_path / "runs"
    words = tiny(f"--trainer.default_root_dir={root}", NO_SCORE, "--trainer.max_steps=9999", "--seeds=0,1")
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_offrl", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not all(folder(root, seed).last_checkpoint.is_file() for seed in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    for seed in (0, 1):
        assert f"seed {seed} | stopped at gradient step" in said
        content = torch.load(folder(root, seed).last_checkpoint, weights_only=True)
        step = content["offrl"]["gradient_step"]
        assert main(tiny(f"--trainer.default_root_dir={root}", NO_SCORE, f"--trainer.max_steps={step + 10}",
                         f"--seed_everything={seed}", "--ckpt_path=auto")) == 0  # fmt: skip
        content = torch.load(folder(root, seed).last_checkpoint, weights_only=True)
        assert content["offrl"]["gradient_step"] == step + 10


def test_a_job_that_fails_stops_no_other(capfd: pytest.CaptureFixture[str]):
    codes = run_jobs([Job("bad", ["nonsense"]), Job("good", ["--version"])], at_once=1)
    assert codes == {"bad": 2, "good": 0}
    said = capfd.readouterr().out
    assert "bad  | error: no command 'nonsense'" in said
    assert "good | lit_offrl " in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--seeds", "one"], "--seeds: give whole numbers, e.g. --seeds 0,1,2, not 'one'"),
        (["--seeds", "-1"], "--seeds: give whole numbers"),
        (["--seeds=0,0"], "--seeds: 0,0 names a seed twice"),
        (["--seeds"], "argument --seeds: expected one argument"),
        (["--seeds=0,1", "--seed_everything=3"], "--seed_everything belongs to a single run"),
        (["--seeds=0,1", "--ckpt_path", "last"], "--ckpt_path belongs to a single run"),
        (["--seeds=0,1", "--parallel=none"], "--parallel: give whole numbers"),
    ],
)
def test_bad_seeds(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]):
    assert main(["fit", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_options_are_taken_out():
    words = ["--a", "1", "--seeds", "0,1", "--b=2", "-0.5"]
    options, others = split_options(words, "--seeds", "--b", "--c")
    assert (options.seeds, options.b, options.c) == ("0,1", "2", None)
    assert others == ["--a", "1", "-0.5"]


def test_tables_are_one_in_memory(minari_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SHARED_TABLES, str(tmp_path))
    modules = [D4RLDataModule(DATASET, reward=reward) for reward in ("raw", "raw", "minus_one")]
    (one, widths), (same, _), (other, _) = (module.shared_table() for module in modules)
    own, own_widths = modules[0].table()
    assert torch.equal(one, own)
    assert widths == own_widths
    assert not torch.equal(one, other)
    one[0, 0] += 1  # the same memory
    assert same[0, 0] == one[0, 0]
