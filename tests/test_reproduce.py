"""Grids of runs: all of a paper's tasks, resumable."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import DATASET
from tiny import load_tool

from lit_offrl.run_folder import RunFolder

reproduce = load_tool("reproduce")


@pytest.mark.parametrize(("grid", "tasks", "seeds"), [("paper/dtql", 26, 5), ("paper/bdpo", 15, 5), ("quick", 8, 3)])
def test_grids_are_whole(grid: str, tasks: int, seeds: int, capsys: pytest.CaptureFixture[str]):
    assert reproduce.main(["--grid", grid, "--list", "--root", "somewhere"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == len(set(commands)) == tasks * seeds
    for command in commands:
        for word in command.split():
            if word.startswith("--config="):
                assert Path(word.removeprefix("--config=")).is_file(), command


def test_only_some(capsys: pytest.CaptureFixture[str]):
    assert reproduce.main(["--grid", "paper/dtql", "--list", "--only", "*hopper-medium-v2 1"]) == 0
    (command,) = capsys.readouterr().out.splitlines()
    assert "conf/dtql_mujoco.yaml" in command
    assert "tasks/dtql/hopper-medium-v2.yaml" in command
    with pytest.raises(SystemExit) as error:
        reproduce.main(["--grid", "quick", "--only", "nothing"])
    assert error.value.code == 2


def test_a_grid_is_trained_once_and_reported(
    minari_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reproduce, "QUICK_DATASETS", (DATASET,))
    words = ["--grid=quick", "--only=dtql*", "--seeds=0,1", f"--root={tmp_path}", "--model.init_args.hidden_dim=16"]
    cut = ["--model.init_args.pretrain_steps=5", "--trainer.max_steps=10", "--evaluation.final_episodes=2"]
    assert reproduce.main([*words, *cut, "--data.batch_size=8"]) == 0
    said = capfd.readouterr().out
    assert "2 of 2 finished" in said
    assert (tmp_path / "report" / "report.html").is_file()
    before = [RunFolder.of(tmp_path, "dtql", DATASET, seed).results() for seed in (0, 1)]
    assert [each["gradient_steps"] for each in before] == [10, 10]
    assert reproduce.main([*words, *cut, "--data.batch_size=8"]) == 0
    assert capfd.readouterr().out.count("finished already") == 2
