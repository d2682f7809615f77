"""Kills and signals at random moments: a run that goes on is, bit for bit, the one that was not stopped.."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from faults import BANDIT, environment, trial
from test_resume import assert_same_state, load, rows

from lit_offrl.cli import main
from lit_offrl.run_folder import RunFolder
from lit_offrl.system.processes import package_command

pytestmark = pytest.mark.faults
EPOCHS = ["--trainer.max_steps=800", "--data.steps_per_epoch=40", "--checkpoint.keep_every_n_epochs=5"]
VARIANTS = {"DTQL": [], "DTQL with held-out losses": ["--data.validation_fraction=0.1"]}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def words(variant: str, root: Path) -> list[str]:
    return [*BANDIT, *EPOCHS, *VARIANTS[variant], f"--trainer.default_root_dir={root}"]


def run_of(root: Path) -> RunFolder:
    return RunFolder(next(path for path in root.rglob("seed_0") if path.is_dir()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_training(variant: str, tmp_path: Path):
    """Killed, or asked to stop, at ten random moments; then it is finished, and compared."""
    assert main(words(variant, tmp_path / "whole")) == 0
    whole = run_of(tmp_path / "whole")
    for attempt in range(10):
        root, chance = tmp_path / "runs", random.Random(f"{variant} {attempt} {time.time()}")
        with trial(f"kills and signals: {variant}"):
            for number in (chance.choice([signal.SIGKILL, *SIGNALS]), signal.SIGKILL):
                process = subprocess.Popen(
                    package_command([*words(variant, root), "--ckpt_path=auto"]),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment(),
                )
                time.sleep(chance.uniform(0.0, 9.0))
                process.send_signal(number)
                out, err = process.communicate(timeout=120)
                assert "Traceback" not in err, err
                # One that was finished already, or got the signal while Python still started.
                assert process.returncode in (0, -number, 128 + number), (number, out, err)
            assert main([*words(variant, root), "--ckpt_path=auto"]) == 0
            folder = run_of(root)
            assert_same_state(load(whole.path), load(folder.path))
            assert rows(whole.path / "metrics.csv") == rows(folder.path / "metrics.csv")
            results = [json.loads((each.path / "results.json").read_text()) for each in (whole, folder)]
            assert results[0]["bandit"] == results[1]["bandit"]
            assert results[1]["status"] == "finished"
            assert not list(folder.path.rglob(".*.tmp")), "what killed processes left is removed"
        shutil.rmtree(root)


def test_collection(tmp_path: Path):
    """Killed at random moments, then finished: the same file as of an uninterrupted one."""
    collect = package_command(["data", "collect", "offrl/pointmaze/umaze-v0", "--steps", "6000", "--processes", "1"])

    def data(root: Path) -> bytes:
        return (root / "offrl" / "pointmaze" / "umaze-v0" / "data" / "main_data.hdf5").read_bytes()

    whole = tmp_path / "whole"
    done = subprocess.run(collect, env=environment(MINARI_DATASETS_PATH=str(whole)), capture_output=True)
    assert done.returncode == 0
    for attempt in range(6):
        root = tmp_path / "minari"
        started = environment(MINARI_DATASETS_PATH=str(root))
        with trial("kills: data collect"):
            process = subprocess.Popen(collect, env=started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(random.Random(f"{attempt} {time.time()}").uniform(0.5, 6.0))
            process.kill()
            process.wait()
            done = subprocess.run(collect, env=started, capture_output=True, text=True)
            assert done.returncode == 0 or "already lies in" in done.stderr, done.stderr
            assert data(root) == data(whole)
        shutil.rmtree(root)


def test_a_checkpoint_is_whole_at_any_moment(tmp_path: Path):
    """Read again and again while a training replaces it."""
    training = package_command(words("DTQL", tmp_path))
    process = subprocess.Popen(training, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    steps = set()
    while process.poll() is None:
        for path in tmp_path.rglob("last.ckpt"):
            with trial("checkpoints read while they are written"):
                steps.add(torch.load(path, weights_only=True)["global_step"])
    assert process.returncode == 0
    assert len(steps) > 1
