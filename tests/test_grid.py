"""Grids of runs: all of a paper's tasks, resumable."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from conftest import DATASET

from lit_offrl.cli import main
from lit_offrl.cli.configs import config_names, expand_words
from lit_offrl.run_folder import RunFolder


@pytest.mark.parametrize(("grid", "tasks", "seeds"), [("paper/dtql", 26, 5), ("paper/bdpo", 15, 5), ("quick", 8, 3)])
def test_grids_are_whole(grid: str, tasks: int, seeds: int, capsys: pytest.CaptureFixture[str]):
    assert main(["grid", grid, "--list", "--root", "somewhere"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == len(set(commands)) == tasks * seeds
    for command in commands:
        words = expand_words(shlex.split(command)[4:])  # behind python -m lit_offrl fit
        (config,) = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
        assert Path(config).is_file(), command


def test_without_a_name_grids_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["grid"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == config_names("grids")
    assert "130 runs" in next(line for line in lines if line.startswith("paper/dtql"))


def test_only_some(capsys: pytest.CaptureFixture[str]):
    assert main(["grid", "paper/dtql", "--list", "--only", "*hopper-medium-v2 1"]) == 0
    (command,) = capsys.readouterr().out.splitlines()
    words = expand_words(shlex.split(command)[4:])
    assert any(word.endswith("dtql_mujoco.yaml") for word in words)
    assert "--model.init_args.learning_rate=0.0001" in words
    assert main(["grid", "paper/bdpo_paper", "--list", "--only", "*hopper-medium-v2 1"]) == 0
    assert "--variant=paper" in capsys.readouterr().out
    assert main(["grid", "quick", "--only", "nothing"]) == 2
    assert "--only nothing matches no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("runs: [{tasks: dtql}]", "seeds"),
        ("seeds: [0]", "runs"),
        ("{seeds: [0], runs: [{tasks: dtql, configs: [dtql_mujoco]}]}", "either tasks: or configs:"),
        ("{seeds: [0], runs: [{tasks: dtql, varant: paper}]}", "did you mean 'variant'?"),
        ("{seeds: [0], runs: [{tasks: dtql, variant: authors}]}", "--variant: must be paper"),
        ("{seeds: [0], runs: [{configs: [dtql_mujco]}]}", "did you mean 'dtql_mujoco'?"),
        ("[1, 2]", "must hold keys and values"),
        ("{", "cannot be read as YAML"),
    ],
)
def test_wrong_grids_get_one_line(content: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "grid.yaml").write_text(content)
    assert main(["grid", str(tmp_path / "grid.yaml"), "--list"]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1


def test_a_grid_is_trained_once_and_reported(minari_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    grid = tmp_path / "mine.yaml"
    grid.write_text(f"seeds: [0, 1, 2]\nruns: [{{configs: [quick/dtql_pointmaze], datasets: [{DATASET}]}}]\n")
    root = tmp_path / "runs"
    words = ["grid", str(grid), f"--root={root}", "--model.init_args.hidden_dim=16", "--data.batch_size=8"]
    cut = ["--model.init_args.pretrain_steps=5", "--trainer.max_steps", "10", "--evaluation.final_episodes=2"]
    assert main([*words, *cut, "--seeds=0"]) == 0
    out = capfd.readouterr().out
    assert "1 of 1 finished" in out
    assert (root / "report" / "report.html").is_file()
    assert main([*words, *cut, "--seeds=0,1"]) == 0
    out = capfd.readouterr().out
    assert out.count("finished already") == 1
    assert "2 of 2 finished" in out
    results = [RunFolder.of(root, "dtql", DATASET, seed).results() for seed in (0, 1)]
    assert [each["gradient_steps"] for each in results] == [10, 10]
