"""Config files: names that work anywhere, quick runs beside the papers' runs, values of tasks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from lit_offrl import algorithms
from lit_offrl.cli import main
from lit_offrl.cli.configs import (
    TaskTable,
    algorithm_of,
    config_names,
    expand_words,
    find_config,
    flatten,
    read_config,
    task_tables,
)
from lit_offrl.cli.training import resolved_config
from lit_offrl.collect.catalog import CATALOG
from lit_offrl.data.sources.d4rl import D4RL_FILES
from lit_offrl.data.sources.offrl import CollectedOGBench
from lit_offrl.data.sources.ogbench import OGBench
from lit_offrl.errors import UserError

CONF = REPOSITORY / "conf"
OGBENCH = {*OGBench().ids(), *CollectedOGBench().ids()}
PAPERS = [name for name in config_names() if "/" not in name]
QUICK = config_names("quick")
TASKS = [(table.model, task, variant) for table in task_tables() for task in table.names for variant in table.variants]


def flat(config: dict[str, Any]) -> dict[str, Any]:
    return dict(flatten(config))


# ------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["dtql_antmaze", "dtql_antmaze.yaml", "conf/dtql_antmaze.yaml", "conf/dtql_antmaze"])
def test_names_work_from_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == CONF / "dtql_antmaze.yaml"
    assert find_config("search/dtql_pointmaze") == CONF / "search" / "dtql_pointmaze.yaml"
    assert find_config("conf/grids/quick.yaml", "grids") == CONF / "grids" / "quick.yaml"


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("dtql_antmaze").write_text("seed_everything: 7\n")
    assert read_config("dtql_antmaze") == {"seed_everything": 7}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["fit", "--config", "quick/dtql_antmase"], "(did you mean 'quick/dtql_antmaze'?)"),
        (["sweep", "--config", "search/dtql_pointmase"], "(did you mean 'search/dtql_pointmaze'?)"),
        (["grid", "paper/dqtl"], "(did you mean 'paper/dtql'?)"),
        (["fit", "--task", "hopper-medium-v2"], "--task needs an algorithm"),
        (["fit", "--task", "hopper-medum-v2", "--model", "DTQL"], "(did you mean 'hopper-medium-v2'?)"),
        (["fit", "--task=hopper-medium-v2", "--model=DTQLKL"], "no values for tasks of DTQLKL; there are some of"),
        (["fit", "--task=hopper-medium-v2", "--model=BDPO", "--variant=ours"], "--variant: must be authors or paper"),
        (["fit", "--config", "dtql_mujoco", "--variant", "paper"], "--variant belongs to --task"),
    ],
)
def test_unknown_names_get_one_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1


# ------------------------------------------------------------------------------------------- papers and quick runs


@pytest.mark.parametrize("name", [*PAPERS, *(f"quick/{name}" for name in QUICK)])
def test_every_config_parses_and_is_complete(name: str):
    config = read_config(name)
    resolved = flat(resolved_config([f"--config={name}"]))
    for key, value in flat(config).items():
        if key == "model.class_path":
            assert resolved[key].rpartition(".")[2] == value
            assert value.lower() == Path(name).name.partition("_")[0]
        else:
            assert resolved[key] == value, key
    dataset = config["data"]["dataset"]
    assert dataset in CATALOG or dataset.startswith("bandit/") or dataset in OGBENCH


@pytest.mark.parametrize("name", QUICK)
def test_quick_configs_say_where_they_differ_from_the_paper_and_why(name: str):
    paper, quick = flat(read_config(name)), flat(read_config(f"quick/{name}"))
    assert set(quick) == set(paper)
    differing = {key for key in quick if quick[key] != paper[key]}
    explained, path = set(), []
    for line in find_config(f"quick/{name}").read_text().splitlines():
        if match := re.match(r"( *)(\w+):[^#]*(#.*)?", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            if match[3] and len(match[3]) > 10:
                explained.add(".".join(path))
    print(f"quick/{name} and {name}:", *(f"{key}: {paper[key]} -> {quick[key]}" for key in sorted(differing)), sep="\n")
    assert explained == differing
    assert quick["trainer.max_steps"] < paper["trainer.max_steps"]


# ------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(("model", "task", "variant"), TASKS)
def test_values_of_every_task_reach_the_config(model: str, task: str, variant: str):
    table = TaskTable.of(model)
    base, values = table.base_config(task), table.values(task, variant)
    assert algorithm_of(read_config(base)) == model
    assert task in D4RL_FILES or task in OGBENCH
    config = flat(read_config(base))
    assert set(values) <= set(config), "a key that the base config does not have"
    assert {key: type(value) for key, value in values.items()} == {key: type(config[key]) for key in values}


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (
            ["--model", "DTQL", "--task", "pen-human-v1"],
            {"alpha": 1500.0, "learning_rate": 3e-5, "cosine_decay": True, "critic.expectile": 0.9, "nll_weight": 0.0},
        ),
        (["--config=dtql_mujoco", "--task=pen-human-v1"], {"alpha": 1500.0, "critic.expectile": 0.9}),
        (["--model=BDPO", "--task=hopper-medium-v2"], {"eta": 0.2, "critic.members": 20, "hidden_dim": 256}),
        (
            ["--model=BDPO", "--task=hopper-medium-v2", "--variant=paper"],
            {"eta": 2.0, "critic.members": 20, "hidden_dim": 512, "frozen_behavior": True},
        ),
        (["--model=QGPO", "--task=antmaze-umaze-v2"], {"critic.backup_beta": 20.0, "support_actions": 32}),
        (["--model=IQL", "--task=kitchen-partial-v0"], {"beta": 0.5, "critic.expectile": 0.7, "dropout": 0.1}),
        (["--model=DQL", "--task=antmaze-large-play-v0"], {"eta": 4.5, "clip_norm": 10.0, "max_q_backup": True}),
        (["--model=ReBRAC", "--task=hopper-medium-replay-v2"], {"beta_actor": 0.05, "beta_critic": 0.5}),
        (["--model=SRPO", "--task=walker2d-medium-replay-v2"], {"beta": 0.5, "policy_layers": 2}),
        (["--model=FQL", "--task=pen-human-v1"], {"alpha": 10000.0, "aggregation": "min", "normalize_q": False}),
        (
            ["--model=FQL", "--task=ogbench/antmaze-giant-navigate-singletask-task3-v0"],
            {"alpha": 10.0, "aggregation": "min", "critic.discount": 0.995},
        ),
        (["--config=quick/eda_mujoco", "--task=walker2d-medium-v2"], {"beta": 0.5, "critic.steps": 12000}),
        (["--model.init_args.beta=7.0", "--model=EDA", "--task=walker2d-medium-v2"], {"beta": 7.0}),
    ],
)
def test_the_resolved_config_holds_the_values_of_the_task(words: list[str], values: dict[str, Any]):
    config = resolved_config(words)
    init = flat(config["model"]["init_args"])
    assert {key: init[key] for key in values} == values
    assert any(word.endswith(config["data"]["dataset"]) for word in words)


def test_options_win_over_the_table():
    words = ["--model", "DTQL", "--task", "pen-human-v1", "--trainer.max_steps", "7", "--data.dataset=a.npz"]
    config = resolved_config(words)
    assert (config["trainer"]["max_steps"], config["data"]["dataset"]) == (7, "a.npz")


def test_the_tables_hold_the_papers_tasks():
    assert {table.model: len(table.names) for table in task_tables()} == {
        **{"AEPO": 33, "BDPO": 15, "DTQL": 26, "EDA": 16, "QGPO": 15},
        **{"AWAC": 42, "BC": 45, "BCQ": 45, "CQL": 45, "DAC": 15, "DQL": 20, "DecisionTransformer": 27, "EDP": 15},
        **{"FQL": 18 + 66, "IDQL": 21, "IFQL": 66, "IQL": 41 + 12, "QC": 24, "ReBRAC": 36 + 12, "SfBC": 16, "SRPO": 21},
        "TD3BC": 42,
    }
    assert all(table.model in algorithms.ALGORITHMS for table in task_tables())
    with pytest.raises(UserError, match="no values of BDPO for 'columns'"):
        TaskTable.of("BDPO").values("columns")


def test_words_without_names_stay_as_they_are():
    words = ["--data.batch_size", "8", "--model.init_args.rho", "-1", "--overwrite=true", "--print_config"]
    assert expand_words(words) == [
        "--data.batch_size=8", "--model.init_args.rho=-1", "--overwrite=true", "--print_config",
    ]  # fmt: skip
    assert json.loads(expand_words(["--data.action_bounds=[-2, 2]"])[0].partition("=")[2]) == [-2, 2]


ALIASES_OF_ALIASES = "b0: &b0 [x, x]\n" + "".join(
    f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 8)}]\n" for i in range(1, 9)
)
SHORT = ["--trainer.max_steps=2", "--data.block_size=1", "--bandit.samples=20", "--bandit.figures=false"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("data:\n  batch_size: many\n", "x.yaml line 2: data.batch_size: must be int, not many"),
        ("data:\n  batch_size: null\n", "x.yaml line 2: data.batch_size: must be at least 1"),
        ("data:\n  batchsize: 3\n", "x.yaml line 2: no option 'data.batchsize' (did you mean 'data.batch_size'?)"),
        ("data:\n  batch_size: ${no.such.key}\n", "x.yaml line 2: data.batch_size: there is no no.such.key"),
        ("data:\n  batch_size: ${oc.env:UNSET_VARIABLE}\n", "x.yaml line 2: data.batch_size: "),
        ("data:\n  batch_size: ???\n", "x.yaml line 2: data.batch_size has no value"),
        ("data:\n  batch_size: ${data.block_size}\n  block_size: ${data.batch_size}\n", "x.yaml line 2: data.b"),
        ("data:\n  null: 3\n", "x.yaml line 2: 'null' is no name of an option"),
        ("data:\n  batch_size: 3\ndata:\n  block_size: 4\n", "x.yaml line 3: data stands in line 1 already"),
        ("data:\n\tbatch_size: 3\n", "x.yaml line 2 is no YAML"),
        ("data: {batch_size: 3\n", "x.yaml line 2 is no YAML"),
        ("bandit: null\n", "x.yaml line 1: bandit is a group of options"),
        ("trainer: 3\n", "x.yaml line 1: trainer is a group of options"),
        ("model:\n  class_path: DTQL\n  init_args: null\n", "x.yaml line 3: model.init_args is a group of options"),
        (
            "model:\n  class_path:\n    class_path: DTQL\n",
            "x.yaml line 2: model.class_path must be the name of a class",
        ),
        ("model:\n  class_path: DTQL\n  init_args:\n    alpha: .nan\n", "x.yaml line 4: model.init_args.alpha"),
        ("data: !!python/object/apply:os.system [ls]\n", "x.yaml line 1: the tag python/object/apply:os.system"),
        ("- a\n- b\n", "x.yaml must hold keys and values"),
        ("", "x.yaml must hold keys and values"),
        (ALIASES_OF_ALIASES, "stands for too many values"),
        ("a: " + "[" * 60 + "]" * 60 + "\n", "nested too deeply"),
        ("data:\n  dataset: caf\xe9\n".encode("latin-1"), "x.yaml is no text in UTF-8"),
        ("data:\n  batch_size: 3\n".encode("utf-16"), "x.yaml is no text in UTF-8"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(
    text: str | bytes, complaint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    file = tmp_path / "x.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    words = ["fit", "--config=dtql_bandit", f"--config={file}", *SHORT, f"--trainer.default_root_dir={tmp_path}/runs"]
    if "block_size: ${" in str(text):
        words.remove("--data.block_size=1")
    assert main(words) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert complaint in line
    assert not (tmp_path / "runs").exists()


def test_interpolation_reaches_over_all_files(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("data:\n  batch_size: 16\n")
    (tmp_path / "b.yaml").write_text("data:\n  steps_per_epoch: ${data.batch_size}\n")
    words = ["--config=dtql_bandit", f"--config={tmp_path}/a.yaml", f"--config={tmp_path}/b.yaml"]
    assert resolved_config(words)["data"]["steps_per_epoch"] == 16
