"""What a user sees: output, results, and one line for every kind of bad input."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from conftest import DATASET, REPOSITORY, run_folder, tiny_words

import lit_offrl
from lit_offrl import algorithms
from lit_offrl.cli import main
from lit_offrl.data import sources

Words = Callable[..., list[str]]


def failure(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 2) -> str:
    """Run a command that must fail; return its one line."""
    capsys.readouterr()
    assert main(words) == code
    err = capsys.readouterr().err.strip()
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err
    return lines[0]


def test_help_answers_at_once():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run([sys.executable, "-m", "lit_offrl", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "fit" in output.stdout
    # CPU time, because the machine may be busy with other things
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


@pytest.fixture(scope="module")
def finished(minari_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run with evaluations: its root, and what it printed."""
    root, printed = tmp_path_factory.mktemp("finished"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(tiny_words(root)) == 0
    return root, printed.getvalue()


@pytest.fixture
def folder(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """The folder of a copy of the finished run, which a test may change."""
    shutil.copytree(finished[0], tmp_path / "runs")
    return run_folder(tmp_path / "runs")


def test_a_run_leaves_everything_in_its_folder(finished: tuple[Path, str]):
    root, out = finished
    folder = run_folder(root)
    assert "finished 90 gradient steps: score" in out
    assert "step 80: score" in out  # also without a progress bar
    assert str(folder) in out

    results = json.loads((folder / "results.json").read_text())
    assert set(results) >= {
        "algorithm", "dataset", "dataset_source", "dataset_sha256", "transitions", "seed", "stage", "status",
        "gradient_steps", "scores", "score_reference", "time", "device", "versions",
    }  # fmt: skip
    assert (results["algorithm"], results["dataset"], results["dataset_source"]) == ("dtql", DATASET, "offrl")
    assert (results["stage"], results["status"], results["gradient_steps"]) == ("fit", "finished", 90)
    assert (results["transitions"], results["seed"], results["device"]) == (1500, 0, "cpu")
    assert set(results["time"]) == {
        *("train_s", "eval_s", "gradient_steps_per_s"),
        *("train_s_per_1k_steps", "act_ms", "act_ms_p99"),
    }
    times = results["time"]
    assert times["gradient_steps_per_s"] == pytest.approx(1000 / times["train_s_per_1k_steps"], rel=1e-2)
    assert 0 < times["act_ms"] <= times["act_ms_p99"] < 1000
    reference = results["score_reference"]
    assert reference["name"] == "local"
    scores = results["scores"]
    assert scores["episodes"] == 3
    expected = 100 * (scores["return_mean"] - reference["min"]) / (reference["max"] - reference["min"])
    assert scores["normalized"] == pytest.approx(expected)
    assert "behavior" in results["comparison"]

    with (folder / "eval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # evaluations at the ends of both epochs with 2 episodes, and the final one with 3 for each of the two actors
    assert [(r["step"], r["actor"]) for r in rows] == [
        *[("40", "policy")] * 2, *[("80", "policy")] * 2, *[("90", "policy")] * 3, *[("90", "behavior")] * 3,
    ]  # fmt: skip
    assert [r["seed"] for r in rows[:2]] == [r["seed"] for r in rows[2:4]] == ["10000", "10001"]
    final = [float(r["return"]) for r in rows if r["step"] == "90" and r["actor"] == "policy"]
    assert scores["return_mean"] == pytest.approx(np.mean(final))
    assert scores["return_std"] == pytest.approx(np.std(final), abs=1e-6)

    with (folder / "metrics.csv").open(newline="") as file:
        steps = [int(float(r["step"])) for r in csv.DictReader(file)]
    assert steps[0] == 7
    assert max(steps) == 90
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["hidden_dim"] == 16
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "last.ckpt", "step_0000040.ckpt", "step_0000080.ckpt", "step_0000090.ckpt",
    ]  # fmt: skip


def test_tensorboard_curves_count_gradient_steps(finished: tuple[Path, str]):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder(finished[0])))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "train/critic_q_loss", "train/policy_loss", "time/gradient_steps_per_s", "eval/normalized_score",
        "eval/return_mean", "eval/success_rate", "eval/episode_length", "eval_behavior/normalized_score",
    }  # fmt: skip
    assert [e.step for e in events.Scalars("eval/normalized_score")] == [40, 80, 90]
    assert [e.step for e in events.Scalars("train/critic_q_loss")][-1] == 90


def test_validate_and_test_score_a_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]):
    fit = json.loads((folder / "results.json").read_text())
    for command in ("validate", "test"):
        assert main([command, f"--ckpt_path={folder}/checkpoints/last.ckpt"]) == 0
        results = json.loads((folder / "results.json").read_text())
        assert (results["stage"], results["gradient_steps"]) == (command, 90)
        # the same seeds, the same noise: the score of the same checkpoint is the same
        assert results["scores"] == fit["scores"]
        assert results["time"]["train_s"] == fit["time"]["train_s"]
        assert "checkpoint at gradient step 90: score" in capsys.readouterr().out


def test_validating_an_early_checkpoint_keeps_what_came_after(folder: Path):
    before = {name: (folder / name).read_text().splitlines() for name in ("metrics.csv", "eval.csv")}
    assert main(["validate", f"--ckpt_path={folder}/checkpoints/step_0000040.ckpt"]) == 0
    for name, lines in before.items():
        after = (folder / name).read_text().splitlines()
        assert after[: len(lines)] == lines
        assert all(line.startswith("40") for line in after[len(lines) :])
    assert len((folder / "eval.csv").read_text().splitlines()) == len(before["eval.csv"]) + 6


def test_predict_writes_actions(folder: Path):
    results = (folder / "results.json").read_bytes()
    assert main(["predict", f"--ckpt_path={folder}/checkpoints/last.ckpt"]) == 0
    actions = np.load(folder / "actions.npy", allow_pickle=False)
    assert actions.shape == (1500, 2)
    assert np.abs(actions).max() <= 1
    assert (folder / "results.json").read_bytes() == results


def test_a_used_folder_is_not_overwritten(tiny: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    quick = ("--evaluation.enabled=false", "--trainer.max_steps=5")
    assert main(tiny(*quick)) == 0
    before = (run_folder(tmp_path / "runs") / "results.json").read_bytes()
    assert "holds a run already" in failure(capsys, tiny(*quick))
    failure(capsys, tiny(*quick, "--overwrite=true", "--trainer.max_steps=-1"))
    failure(capsys, tiny(*quick, "--overwrite=true", "--data.reward=minus"))
    failure(capsys, tiny(*quick, "--ckpt_path=last", "--model.init_args.hidden_dim=8"))
    assert (run_folder(tmp_path / "runs") / "results.json").read_bytes() == before
    assert main(tiny(*quick, "--overwrite=true")) == 0


def test_ckpt_path_last_goes_on(tiny: Words, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(tiny("--evaluation.enabled=false", "--trainer.max_steps=20")) == 0
    assert main(tiny("--evaluation.enabled=false", "--trainer.max_steps=35", "--ckpt_path=last")) == 0
    results = json.loads((run_folder(tmp_path / "runs") / "results.json").read_text())
    assert results["gradient_steps"] == 35


def test_pretrained_networks_come_from_another_run(tiny: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    off = "--evaluation.enabled=false"
    assert main(tiny(off, "--trainer.max_steps=30", root=tmp_path / "pretrained")) == 0
    assert "all of it is pretraining" in capsys.readouterr().out
    checkpoint = run_folder(tmp_path / "pretrained") / "checkpoints" / "last.ckpt"
    start = (f"--model.init_args.pretrained={checkpoint}", "--model.init_args.pretrain_steps=0")
    still = (
        "--model.init_args.learning_rate=1e-30",
        "--model.init_args.critic.learning_rate=1e-30",
        "--trainer.max_steps=1",
    )
    assert main(tiny(off, *start, *still)) == 0
    source = torch.load(checkpoint, weights_only=True)["state_dict"]
    copied = torch.load(run_folder(tmp_path / "runs") / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(source["behavior.network.mix.weight"], copied["behavior.network.mix.weight"])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--data.batchsize=3"], ["data.batchsize", "did you mean 'data.batch_size'?"]),
        (["--model.init_args.alfa=3"], ["model.init_args.alfa", "did you mean 'alpha'?"]),
        (["--model.init_args.alpha=much"], ["error: model.init_args.alpha: must be float, not much"]),
        (["--model=DTQ"], ["no class 'DTQ'", "did you mean 'DTQL'?"]),
        (["--data.batch_size=many"], ["data.batch_size", "many"]),
        (["--data.batch_size=0"], ["data.batch_size", "at least 1"]),
        (["--data.reward=minus"], ["no rule 'minus'", "minus_one"]),
        (["--data.dataset=offrl/pointmaze/umaz-v0"], ["offrl/pointmaze/umaz-v0"]),
        (["--data.dataset=no such thing"], ["'no such thing' is no dataset id"]),
        (["--data.dataset=nowhere.hdf5"], ["no file nowhere.hdf5"]),
        (["--config=nowhere.yaml"], ["nowhere.yaml"]),
        (["--trainer.max_steps=-1"], ["trainer.max_steps"]),
        (["--ckpt_path=nowhere.ckpt"], ["no checkpoint at nowhere.ckpt"]),
        (["--ckpt_path=last"], ["start the run without --ckpt_path"]),
        (["--model.init_args.pretrained=nowhere.ckpt"], ["no checkpoint at nowhere.ckpt"]),
        (["--trainer.devices=2"], ["devices"]),
        (["--trainer.accelerator=gpx"], ["gpx"]),
        (["--model.init_args.acting.candidates=0"], ["model.init_args.acting.candidates: must be at least 1"]),
        (["--data.dataset=hopper-medium-v2"], ["hopper_medium-v2.hdf5 is missing", "put the file into"]),
        (["--trainer.precision=16-true"], ["trainer.precision"]),
        (["--trainer.gradient_clip_val=1"], ["gradient_clip_val"]),
        (["--seed_everything=true"], ["seed_everything: give a number"]),
    ],
)
def test_bad_input_gets_one_line(
    tiny: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], words: list[str]
):
    line = failure(capsys, tiny(*extra))
    for word in words:
        assert word in line
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()], "the corrected command must run"


def test_unknown_commands(capsys: pytest.CaptureFixture[str]):
    assert "did you mean 'fit'?" in failure(capsys, ["fitt"])
    assert "invalid choice" in failure(capsys, ["data", "lst"])


@pytest.mark.parametrize("told", [True, False])
def test_a_remote_dataset_without_network_fails_within_seconds(
    tiny: Words, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, told: bool
):
    if not told:  # nobody has said that there is no network: names resolve to a host that does not answer
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(60))
    started = time.monotonic()
    line = failure(capsys, tiny("--data.dataset=mujoco/hopper/medium-v0"))
    assert time.monotonic() - started < 10
    assert "cannot be reached" in line
    assert "copy it to" in line


def _variant(root: Path, name: str) -> Path:
    """Copy the dataset under another name; return its data file."""
    copy = root / "broken" / f"{name}-v0"
    shutil.copytree(root / DATASET, copy)
    return copy / "data" / "main_data.hdf5"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _nan(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["episode_3/actions"][2] = np.nan


def _wrong_shape(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        actions = file["episode_1/actions"][()]
        del file["episode_1/actions"]
        file["episode_1/actions"] = actions[:, :1]


def _missing_key(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["episode_2/rewards"]


def _empty(path: Path) -> None:
    with h5py.File(path, "w"):
        pass


def _too_few_observations(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        observations = file["episode_0/observations/observation"][()]
        del file["episode_0/observations/observation"]
        file["episode_0/observations/observation"] = observations[:-1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, ["main_data.hdf5", "truncated"]),
        (_nan, ["main_data.hdf5", "'actions' holds NaN"]),
        (_wrong_shape, ["main_data.hdf5", "shape"]),
        (_missing_key, ["main_data.hdf5", "episode_2", "rewards"]),
        (_empty, ["main_data.hdf5", "no episodes"]),
        (_too_few_observations, ["episode_0", "observations for"]),
        (Path.unlink, ["main_data.hdf5 is missing"]),
    ],
)
def test_broken_datasets_get_one_line(
    tiny: Words,
    minari_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    words: list[str],
):
    name = damage.__name__.strip("_").replace("_", "-")
    damage(_variant(minari_root, name))
    line = failure(capsys, tiny(f"--data.dataset=broken/{name}-v0"))
    for word in words:
        assert word in line
    assert not (tmp_path / "runs").exists(), "nothing may be left of a run that never began"


def test_an_unwritable_run_folder(tiny: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("in the way")
    assert "--trainer.default_root_dir" in failure(capsys, tiny(root=tmp_path / "file"))


def test_a_diverging_run_stops_with_one_line_and_keeps_its_checkpoint(
    tiny: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = tiny("--evaluation.enabled=false", "--data.steps_per_epoch=10", "--trainer.max_steps=20")
    assert main(words) == 0
    folder = run_folder(tmp_path / "runs")
    bad = ["--ckpt_path=last", "--trainer.max_steps=60", "--model.init_args.learning_rate=1e30"]
    line = failure(capsys, [*words, *bad], code=1)
    assert "lower the learning rates" in line
    assert json.loads((folder / "results.json").read_text())["status"] == "failed"
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert 20 <= last["global_step"] < 60
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_a_broken_checkpoint(tiny: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    broken = tmp_path / "runs" / "checkpoints" / "last.ckpt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not a checkpoint")
    assert "is broken" in failure(capsys, tiny(f"--ckpt_path={broken}"))


def test_a_users_logger_stands_beside_ours(tiny: Words, tmp_path: Path):
    logger = ("--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'own'}")
    assert main(tiny("--evaluation.enabled=false", "--trainer.max_steps=10", *logger)) == 0
    folder = run_folder(tmp_path / "runs")
    assert (folder / "metrics.csv").is_file()
    assert list(folder.glob("events.out.tfevents.*"))
    assert list((tmp_path / "own").rglob("metrics.csv"))


def test_without_loggers_metrics_csv_stays(tiny: Words, tmp_path: Path):
    assert main(tiny("--evaluation.enabled=false", "--trainer.max_steps=10", "--trainer.logger=false")) == 0
    folder = run_folder(tmp_path / "runs")
    assert (folder / "metrics.csv").is_file()
    assert not list(folder.glob("events.out.tfevents.*"))


def test_help_of_fit_is_short_and_shows_the_values_of_a_config(capsys: pytest.CaptureFixture[str]):
    assert main(["fit", "--config", "quick/eda_mujoco", "--data.batch_size=8", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 105
    assert max(map(len, lines)) <= 130
    shown = {words[0]: words[1] for words in map(str.split, lines) if len(words) > 1 and words[0].startswith("--")}
    assert shown["--model.init_args.critic.steps"] == "12000"
    assert shown["--data.batch_size"] == "8"
    assert main(["fit", "--model=ReBRAC", "--help"]) == 0
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "init_args" in line]
    options = [word.removeprefix("--model.init_args.") for word in words]
    assert options[:2] == ["beta_actor", "beta_critic"]  # its own come first, and then those of TD3BC
    assert {"policy_every", "critic.learning_rate", "pretrained"} <= set(options)
    assert not {"alpha", "seed", "observation_dim"} & set(options)  # alpha is TD3BC's alone
    assert main(["fit", "--help"]) == 0
    assert "Name an algorithm" in capsys.readouterr().out


def test_all_options_are_shown_on_request(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--help-all"])
    assert exit_.value.code in (0, None)
    assert "--tensorboard.histograms" in capsys.readouterr().out


def test_algorithms_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["algorithms"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{out}" for name in algorithms.ALGORITHMS)
    assert "OfflineAlgorithm" not in out


def test_public_names():
    names = {*algorithms.ALGORITHMS, "OfflineAlgorithm", "D4RLDataModule", "load_policy", "main", "__version__"}
    assert set(lit_offrl.__all__) == names
    for name in names:
        assert getattr(lit_offrl, name) is not None
    assert lit_offrl.DTQL is algorithms.DTQL
    with pytest.raises(AttributeError, match="no attribute 'DTQ'"):
        lit_offrl.DTQ  # noqa: B018


@pytest.mark.slow
def test_a_wheel_holds_the_configs(tmp_path: Path):
    copy = tmp_path / "source"  # the build leaves files beside the sources
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".git", "runs", "*.egg-info", "build"))
    words = ["wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(copy)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    conf = REPOSITORY / "conf"
    expected = {f"lit_offrl/conf/{path.relative_to(conf)}" for path in conf.rglob("*.yaml")}
    assert expected <= names
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from lit_offrl.cli.configs import find_config; print(find_config('quick/dtql_antmaze'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()) == tmp_path / "site" / "lit_offrl" / "conf" / "quick" / "dtql_antmaze.yaml"


def test_data_commands(minari_root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "list"]) == 0
    assert DATASET in capsys.readouterr().out
    assert main(["data", "info", DATASET]) == 0
    out = capsys.readouterr().out
    assert "1,500 in" in out
    assert "PointMaze_UMaze-v3, at most" in out
    assert "(rules local)" in out
    assert main(["data", "check", DATASET]) == 0
    assert "no findings" in capsys.readouterr().out
    assert "did you mean" in failure(capsys, ["data", "info", "offrl/pointmaze/umaze-v9"])
    assert "already" in failure(capsys, ["data", "collect", DATASET, "--steps", "10"])


def test_check_finds_what_is_wrong(minari_root: Path, capsys: pytest.CaptureFixture[str]):
    path = _variant(minari_root, "suspicious")
    with h5py.File(path, "r+") as file:
        file["episode_0/actions"][0] = 3.0
        for episode in file:
            file[episode]["terminations"][...] = False
            file[episode]["observations/observation"][:, 1] = 0.5
    assert main(["data", "check", "broken/suspicious-v0"]) == 0
    out = capsys.readouterr().out
    for words in (
        "actions outside [-1, 1] in 1 of 1,500 transitions (first: 0), from -1 to 3",
        "observation dimensions [1] are constant",
        "no transition is terminal",
    ):
        assert words in out


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_convert_and_back(minari_root: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / f"flat{suffix}"
    assert main(["data", "convert", DATASET, str(path)]) == 0
    assert "wrote 1,500 transitions" in capsys.readouterr().out
    original, converted = (sources.load(source)[0] for source in (DATASET, str(path)))
    for field in fields(original):
        np.testing.assert_array_equal(getattr(converted, field.name), getattr(original, field.name))
    assert "exists" in failure(capsys, ["data", "convert", DATASET, str(path)])
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_convert_knows_two_formats(minari_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert ".npz or .hdf5" in failure(capsys, ["data", "convert", DATASET, str(tmp_path / "x.csv")])
    missing = tmp_path / "missing" / "x.npz"
    assert "cannot be written" in failure(capsys, ["data", "convert", DATASET, str(missing)])


def test_ctrl_c_while_collecting_leaves_nothing(tmp_path: Path):
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(tmp_path)}
    words = ["data", "collect", "offrl/pointmaze/medium-v0", "--steps", "2000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_offrl", *words],
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        # A shell without job control starts what runs in its background, e.g. these tests, with SIGINT ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    # Until an episode, of many kilobytes, has come in: an interrupt amid imports may be swallowed by a library.
    while not any(file.stat().st_size > 4096 for file in tmp_path.glob(".lit_offrl/**/*") if file.is_file()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not list(tmp_path.glob("offrl/**/*.hdf5"))
