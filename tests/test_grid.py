"""Grids of runs: all of a paper's tasks, resumable."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from conftest import DATASET

from lit_offrl.cli import main
from lit_offrl.cli.configs import config_names, expand_words, pair_options
from lit_offrl.cli.training import resolved_config
from lit_offrl.data.sources.d4rl import D4RL_FILES
from lit_offrl.data.sources.ogbench import OGBench
from lit_offrl.run_folder import RunFolder

# Tables and figures of the papers: runs of each.
PAPER = {
    "paper/dtql": (26 + 20 + 15 + 9 + 3 * 20 + 2 * 15 + 5) * 5,
    "paper/dtql_authors": 26 * 5,
    "paper/dtql_table3": 2 * 3 * 5,
    "paper/dtql_table5": 2 * 3 * 5,
    "paper/dtql_table6": (6 + 4) * 5,
    "paper/dtql_figure5": 2 * 2 * 5,
    "paper/bdpo": (15 + 6 * 15 + 2 * 9) * 5,
    "paper/bdpo_paper": 15 * 5,
    "paper/bdpo_figure6": 3 * 2 * 5,
    "paper/bdpo_figure7": 2 * 5 * 5,
    "paper/eda": (16 + 3 * 16 + 3 * 13 + 16) * 5,
    "paper/eda_figure4": 3 * 9 * 5,
    "paper/eda_figure5": 4 * 9 * 5,
    "paper/eda_figure6": 2 * 4 * 9 * 5,
    "paper/eda_figure9": 7 * 2 * 9 * 5,
    "paper/aepo": (33 + 3 * 27 + 6 * 15 + 9) * 5,
    "paper/aepo_figure1": 4 * 9 * 5,
    "paper/aepo_figure2": 6 * 2 * 4 * 5,
    "paper/aepo_figure6": 9 * 9 * 5,
    "paper/qgpo": 15 * 5,
}


OGBENCH = {
    "ogbench/fql": (50 + 50 + 5 + 5) * 8,
    "ogbench/fql_default": (10 + 10 + 1 + 1) * 8,
    "ogbench/qc": 4 * 5 * 4,
}


def test_every_grid_of_a_paper_is_known():
    assert {name for name in config_names("grids") if name.startswith("paper/")} == set(PAPER)


@pytest.mark.parametrize(("grid", "runs"), [*PAPER.items(), *OGBENCH.items(), ("quick", 8 * 3)])
def test_grids_are_whole(grid: str, runs: int, capsys: pytest.CaptureFixture[str]):
    """Every command is another one, and has a folder of its own; one of each kind parses, on a dataset with a score."""
    assert main(["grid", grid, "--list", "--root", "somewhere"]) == 0
    commands = [shlex.split(line)[4:] for line in capsys.readouterr().out.splitlines()]  # behind ... lit_offrl fit
    folders, kinds = set(), {}
    for words in commands:
        options = dict(pair_options(words))
        dataset = options.get("--data.dataset") or options.get("--task")
        assert dataset is not None
        folders.add(
            (options["--trainer.default_root_dir"], options.get("--config"), options.get("--model"), dataset, words[-3])
        )
        assert dataset in (OGBench().ids() if grid in OGBENCH else D4RL_FILES) or grid == "quick"
        kinds[options.get("--config"), options.get("--model"), options["--trainer.default_root_dir"]] = words
    assert len(commands) == len(set(map(tuple, commands))) == len(folders) == runs
    for words in kinds.values():
        resolved_config([word for word in words if not word.startswith("--ckpt_path")])


def test_without_a_name_grids_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["grid"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == config_names("grids")
    assert "825 runs" in next(line for line in lines if line.startswith("paper/dtql"))


def test_only_some(capsys: pytest.CaptureFixture[str]):
    assert main(["grid", "paper/dtql", "--list", "--only", "dtql hopper-medium-v2 1"]) == 0
    (command,) = capsys.readouterr().out.splitlines()
    words = expand_words(shlex.split(command)[4:])
    assert any(word.endswith("dtql_mujoco.yaml") for word in words)
    assert "--model.init_args.learning_rate=0.0001" in words
    assert main(["grid", "paper/bdpo_paper", "--list", "--only", "*hopper-medium-v2 1"]) == 0
    assert "--variant=paper" in capsys.readouterr().out
    assert main(["grid", "quick", "--list", "--methods", "EDA,dtql"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 4 * 3
    assert all("/eda_" in line or "/dtql_" in line for line in commands)
    assert main(["grid", "quick", "--methods", "EDA,DTLQ"]) == 2
    assert "--methods: quick has no runs of DTLQ (did you mean 'dtql'?)" in capsys.readouterr().err
    assert main(["grid", "quick", "--only", "nothing"]) == 2
    assert "--only nothing matches no run" in capsys.readouterr().err


def test_ablations_are_trained_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    grid = tmp_path / "both.yaml"
    grid.write_text("{seeds: [0], runs: [{configs: [iql_mujoco, bc_mujoco], datasets: [d.npz], ablations: [no_q]}]}")
    assert main(["grid", str(grid), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [("iql" in line, "--ablation=no_q" in line) for line in lines] == [
        (True, False),
        (True, True),
        (False, False),
    ]
    assert main(["grid", str(grid), "--list", "--methods", "IQL"]) == 0
    assert capsys.readouterr().out.splitlines() == lines[:2]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("runs: [{tasks: dtql}]", "seeds"),
        ("{seeds: [0], runs: [{configs: [iql_mujoco], ablations: [noq]}]}", "did you mean 'no_q'?"),
        ("seeds: [0]", "runs"),
        ("{seeds: [0], runs: [{tasks: dtql, configs: [dtql_mujoco]}]}", "either tasks: or configs:"),
        ("{seeds: [0], runs: [{tasks: dtql, varant: paper}]}", "did you mean 'variant'?"),
        ("{seeds: [0], runs: [{tasks: eda, variant: authors}]}", "--variant: must be paper"),
        ("{seeds: [0], runs: [{tasks: eda, only: [hoper-*]}]}", "only in"),
        ("{seeds: [0], runs: [{tasks: eda}, {tasks: eda}]}", "give one of them a label"),
        ("{seeds: [0], runs: [{tasks: eda, options: {model.init_args.beta: 1}}]}", "label in"),
        ("{seeds: [0], runs: [{tasks: eda, each: {model.init_args.beta: 1}}]}", "each in"),
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
