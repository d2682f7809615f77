"""Fewer threads where other programs use the cores."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import lightning
import pytest
import torch
from tiny import ACTION_DIM, OBSERVATION_DIM, batch

from lit_offrl.algorithms import DTQL
from lit_offrl.algorithms.loop import advance, run_eagerly
from lit_offrl.callbacks.ema import EMATargets
from lit_offrl.callbacks.progress import GradientStepBar
from lit_offrl.callbacks.threads import FIXED_BY, ThreadFallback
from lit_offrl.system.cores import SHARE_OF_CORES, available_cores

UPDATES = 20


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in FIXED_BY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ThreadFallback, "WINDOW_S", 0.5)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def busy_cores() -> Iterator[None]:
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * available_cores())]
    yield
    for program in programs:
        program.kill()
        program.wait()


def threads_after_training(callback: ThreadFallback) -> int:
    """Train DTQL with networks of the usual size for some updates."""
    algorithm = DTQL(OBSERVATION_DIM, ACTION_DIM, pretrain_steps=0)
    algorithm.configure_optimizers()
    algorithm.main_steps = UPDATES
    EMATargets().on_fit_start(None, algorithm)  # type: ignore[arg-type]
    bar = GradientStepBar()
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[bar])
    callback.on_fit_start(trainer, algorithm)
    for _ in range(UPDATES):
        advance(algorithm, batch(rows=256))
    threads = torch.get_num_threads()
    callback.teardown(trainer, algorithm, "fit")
    return threads


@pytest.mark.skipif(available_cores() < 2, reason="one core runs one thread")
@pytest.mark.usefixtures("two_threads", "busy_cores")
def test_threads_that_are_not_scheduled_are_given_up(capfd: pytest.CaptureFixture[str]):
    callback = ThreadFallback()
    assert threads_after_training(callback) == 1
    assert torch.get_num_threads() == 2, "the process has its threads back after the run"
    output = "".join(capfd.readouterr())
    assert output.count("note: other programs use the CPU: 1 of 2 threads from here on") == 1


@pytest.mark.usefixtures("two_threads")
def test_a_resumed_run_keeps_the_reduced_number():
    callback = ThreadFallback()
    callback.load_state_dict({"threads": 1})
    assert threads_after_training(callback) == 1
    assert callback.state_dict() == {"threads": 1}


@pytest.mark.usefixtures("two_threads")
def test_a_number_that_the_user_sets_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    algorithm = DTQL(OBSERVATION_DIM, ACTION_DIM)
    ThreadFallback().on_fit_start(lightning.Trainer(accelerator="cpu", logger=False), algorithm)
    assert algorithm.run_update is run_eagerly, "nothing watches the updates"
    monkeypatch.setenv(SHARE_OF_CORES, "1")  # a job's share is no choice of the user
    ThreadFallback().on_fit_start(lightning.Trainer(accelerator="cpu", logger=False), algorithm)
    assert algorithm.run_update is not run_eagerly
