"""A run that was killed and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_folder, tiny_words
from test_contract import ALGORITHMS
from tiny import checkpoints, words

from lit_offrl.callbacks.checkpoint import RunCheckpoint
from lit_offrl.callbacks.rollout import RolloutEvaluation
from lit_offrl.cli import main

Words = Callable[..., list[str]]


def load(folder: Path, name: str = "last.ckpt") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / name, weights_only=True)
    return content


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["global_step"] == other["global_step"]
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    for first, second in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        for key, state in first["state"].items():
            for name, value in state.items():
                assert torch.equal(value, second["state"][key][name]), (key, name)
    assert torch.equal(one["offrl"]["noise"], other["offrl"]["noise"])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def assert_same_tables(one: Path, other: Path) -> None:
    for name in ("metrics.csv", "eval.csv"):
        first, second = rows(one / name), rows(other / name)
        assert len(first) > 3
        assert first == second, name


@pytest.mark.parametrize(
    ("model", "options"),
    [
        *((each.__name__, {}) for each in ALGORITHMS),
        ("AEPO", {"critic.kind": "conservative"}),
        ("EDA", {"critic.kind": "conservative"}),
        ("AEPO", {"joint": True, "refresh_every": 15}),
    ],
)
def test_every_algorithm_resumes_in_every_phase(model: str, options: dict[str, object], tmp_path: Path):
    """What is no part of a checkpoint, labels of EDA and support of AEPO and QGPO, is made anew."""
    root = tmp_path / "runs"
    assert main(words(root, model, **options)) == 0
    folder = checkpoints(root).parent
    whole = load(folder)
    for stop in (10, 30) if model.startswith("DTQL") else (10, 30, 50):  # the middles of two or three phases
        assert main([*words(root, model, **options), f"--ckpt_path={folder}/checkpoints/step_{stop:07d}.ckpt"]) == 0
        assert_same_state(whole, load(folder))


@pytest.fixture(scope="module")
def finished(minari_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    assert main(tiny_words(root)) == 0
    return root


@pytest.fixture
def whole(finished: Path, tmp_path: Path) -> Path:
    """The folder of a run without interruptions, a copy that the test may change."""
    shutil.copytree(finished, tmp_path / "whole")
    return run_folder(tmp_path / "whole")


# 40 is the end of an epoch and an evaluation; 80 the second; 90 the end of training, in the middle of an epoch
@pytest.mark.parametrize("stop", [40, 80])
def test_resuming_from_every_kept_checkpoint(tiny: Words, tmp_path: Path, whole: Path, stop: int):
    reference = load(whole)
    tables = {name: (whole / name).read_text() for name in ("metrics.csv", "eval.csv")}
    for file in whole.glob("checkpoints/*"):
        if file.name != f"step_{stop:07d}.ckpt":
            file.unlink()
    # the folder still holds rows of later steps, as after a kill: they must come once only
    assert main(tiny(f"--ckpt_path={whole}/checkpoints/step_{stop:07d}.ckpt", root=tmp_path / "whole")) == 0
    assert_same_state(reference, load(whole))
    (tmp_path / "before").mkdir()
    for name, text in tables.items():
        (tmp_path / "before" / name).write_text(text)
    assert_same_tables(tmp_path / "before", whole)


def start(words: list[str], **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lit_offrl", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


STEPS = 800
LONG = (
    f"--trainer.max_steps={STEPS}",
    "--data.steps_per_epoch=100",
    "--data.block_size=20",
    "--trainer.check_val_every_n_epoch=2",
)


@pytest.fixture(scope="module")
def long_whole(minari_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("long")
    assert main(tiny_words(root, *LONG)) == 0
    return run_folder(root)


def test_kill_9_at_an_arbitrary_moment(tiny: Words, tmp_path: Path, long_whole: Path):
    folder = run_folder(tmp_path / "killed")
    process = start(tiny(*LONG, root=tmp_path / "killed"))
    wait_for(folder / "checkpoints" / "step_0000200.ckpt", process)
    time.sleep(0.2)
    process.kill()
    process.wait()
    assert 200 <= load(folder)["global_step"] < STEPS
    assert json.loads((folder / "results.json").read_text())["status"] == "running"
    # resumed by the checkpoint alone: the run folder's config.yaml says the rest
    assert main(["fit", f"--ckpt_path={folder}/checkpoints/last.ckpt"]) == 0
    assert_same_state(load(long_whole), load(folder))
    assert_same_tables(long_whole, folder)
    assert json.loads((folder / "results.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_signals_stop_cleanly_in_the_middle_of_an_epoch(
    tiny: Words, tmp_path: Path, long_whole: Path, number: signal.Signals, code: int
):
    folder = run_folder(tmp_path / "stopped")
    process = start(tiny(*LONG, root=tmp_path / "stopped"))
    wait_for(folder / "checkpoints" / "step_0000100.ckpt", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "go on with" in out
    stopped_at = load(folder)["global_step"]
    assert 100 <= stopped_at < STEPS
    results = json.loads((folder / "results.json").read_text())
    assert (results["status"], results["gradient_steps"]) == ("interrupted", stopped_at)
    assert main(["fit", f"--ckpt_path={folder}/checkpoints/last.ckpt"]) == 0
    assert_same_state(load(long_whole), load(folder))
    assert_same_tables(long_whole, folder)


def test_an_evaluation_that_was_broken_off_is_made_up_for(tiny: Words, tmp_path: Path, whole: Path, monkeypatch):
    """A request to stop in the middle of an evaluation, at every one of the three of a run."""
    for evaluation, root in enumerate(("first", "second", "final")):
        play = RolloutEvaluation.play
        calls = iter(range(100))

        def interrupted(self, module, actor, episodes, trainer, *, nth=evaluation, play=play, calls=calls):
            if next(calls) == nth:
                signal.raise_signal(signal.SIGTERM)
            return play(self, module, actor, episodes, trainer)

        monkeypatch.setattr(RolloutEvaluation, "play", interrupted)
        assert main(tiny(root=tmp_path / root)) == 143
        monkeypatch.setattr(RolloutEvaluation, "play", play)
        folder = run_folder(tmp_path / root)
        assert main(["fit", f"--ckpt_path={folder}/checkpoints/last.ckpt"]) == 0
        assert_same_state(load(whole), load(folder))
        assert rows(whole / "eval.csv") == rows(folder / "eval.csv")
        scores = [json.loads((each / "results.json").read_text())["scores"] for each in (whole, folder)]
        assert scores[0] == scores[1]


@pytest.mark.parametrize("moment", ["within an epoch", "in an evaluation"])
def test_tables_show_no_interruption(moment: str, tiny: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With losses on held-out episodes, which Lightning also logs when it is asked to stop."""
    own = ["--data.validation_fraction=0.2"]
    assert main(tiny(*own, root=tmp_path / "whole")) == 0
    with monkeypatch.context() as patched:
        if moment == "within an epoch":
            end = RunCheckpoint.on_block_end

            def on_block_end(self, trainer, algorithm):
                if algorithm.gradient_step == 54:
                    signal.raise_signal(signal.SIGTERM)
                end(self, trainer, algorithm)

            patched.setattr(RunCheckpoint, "on_block_end", on_block_end)
        else:
            play = RolloutEvaluation.play

            def interrupted(self, *arguments):
                signal.raise_signal(signal.SIGTERM)
                return play(self, *arguments)

            patched.setattr(RolloutEvaluation, "play", interrupted)
        assert main(tiny(*own, root=tmp_path / "stopped")) == 143
    whole, stopped = run_folder(tmp_path / "whole"), run_folder(tmp_path / "stopped")
    assert main(["fit", f"--ckpt_path={stopped}/checkpoints/last.ckpt"]) == 0
    assert_same_state(load(whole), load(stopped))
    assert any(name.startswith("val/") for name in rows(whole / "metrics.csv")[0])
    assert_same_tables(whole, stopped)


def test_a_kill_in_an_evaluation_loses_nothing(tiny: Words, tmp_path: Path, whole: Path):
    """The epoch before it is in the checkpoint, and the evaluation comes again."""
    kill = (
        "import os, signal, sys\n"
        "from lit_offrl.callbacks.rollout import RolloutEvaluation; from lit_offrl.cli import main\n"
        "RolloutEvaluation.play = lambda *_: os.kill(os.getpid(), signal.SIGKILL); main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", kill, *tiny(root=tmp_path / "killed")]
    assert subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True).returncode == -9
    folder = run_folder(tmp_path / "killed")
    assert load(folder)["global_step"] == 40
    assert main(["fit", f"--ckpt_path={folder}/checkpoints/last.ckpt"]) == 0
    assert_same_state(load(whole), load(folder))
    assert_same_tables(whole, folder)


def test_a_run_that_ended_within_an_epoch_can_go_on(tiny: Words, tmp_path: Path, whole: Path):
    """Extending a run gives what a longer one would have given.

    Evaluations come at the same steps, too, where the earlier ends are multiples of the block size. Elsewhere
    Lightning, which counts blocks, ends that one epoch a block early.
    """
    folder = run_folder(tmp_path / "extended")
    for steps in (20, 65, 90):
        resumed = [] if steps == 20 else [f"--ckpt_path={folder}/checkpoints/last.ckpt"]
        words = tiny(f"--trainer.max_steps={steps}", "--data.block_size=5", *resumed, root=tmp_path / "extended")
        assert main(words) == 0
    assert_same_state(load(whole), load(folder))
    kept = [row for row in rows(folder / "eval.csv") if row["step"] not in ("20", "65")]
    assert kept == rows(whole / "eval.csv")


def test_one_seed_is_one_run_and_another_seed_is_another(tiny: Words, tmp_path: Path, whole: Path):
    assert main(tiny(root=tmp_path / "again")) == 0
    assert_same_state(load(whole), load(run_folder(tmp_path / "again")))
    assert_same_tables(whole, run_folder(tmp_path / "again"))
    assert main(tiny("--seed_everything=1", root=tmp_path / "again")) == 0
    other = load(run_folder(tmp_path / "again", seed=1))["state_dict"]
    for name, value in load(whole)["state_dict"].items():
        if name.endswith("weight"):
            assert not torch.equal(value, other[name]), name


def test_the_block_size_changes_nothing_but_speed(tiny: Words, tmp_path: Path, whole: Path):
    assert main(tiny("--data.block_size=40", root=tmp_path / "blocks")) == 0
    assert_same_state(load(whole), load(run_folder(tmp_path / "blocks")))


def test_flags_win_on_resume(tiny: Words, tmp_path: Path, whole: Path):
    checkpoint = f"--ckpt_path={whole}/checkpoints/step_0000080.ckpt"
    assert main(["fit", checkpoint, "--model.init_args.learning_rate=1e-30"]) == 0
    before, after = load(whole, "step_0000080.ckpt")["state_dict"], load(whole)["state_dict"]
    for name, value in before.items():
        if name.startswith(("policy", "behavior")):
            assert (value - after[name]).abs().max() < 1e-20, name  # biases begin at 0
    assert not torch.equal(before["critic.v.layers.0.weight"], after["critic.v.layers.0.weight"])
