"""A run folder has one writer and one run, and a command that is refused changes no file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_folder, tiny_words

import lit_offrl
from lit_offrl.algorithms.checkpoints import read_checkpoint
from lit_offrl.callbacks.ema import EMATargets
from lit_offrl.cli import main
from lit_offrl.errors import UserError
from lit_offrl.run_folder import RunFolder

SHORT = ("--evaluation.enabled=false", "--trainer.max_steps=20", "--data.steps_per_epoch=10", "--data.block_size=5")
MORE = ("--evaluation.enabled=false", "--trainer.max_steps=40", "--data.steps_per_epoch=10", "--data.block_size=5")


@pytest.fixture(scope="module")
def trained(minari_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    assert main(tiny_words(root, *SHORT)) == 0
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of 20 steps."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


def content(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(root: Path, words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused in one line; check that it changes no file."""
    before = content(root)
    capfd.readouterr()
    assert main(words) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert content(root) == before
    return lines[0]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--model.init_args.hidden_dim=24"], "made with other model options"),
        (["--model=DTQLKL"], "is of lit_offrl.algorithms.dtql.DTQL, not of DTQLKL"),
        (["--data.dataset=bandit/8gaussians"], "was trained on offrl/pointmaze/"),
        (["--trainer.max_steps=10"], "has made 20 gradient steps already"),
        (["--trainer.max_steps=-1"], "max_steps"),
        (["--trainer.precision=16-true"], "precision"),
        (["--data.reward=minus"], "data.reward"),
    ],
)
def test_a_refused_resume_changes_nothing(
    words: list[str], complaint: str, root: Path, capfd: pytest.CaptureFixture[str]
):
    options = tiny_words(root, *MORE, f"--ckpt_path={run_folder(root)}/checkpoints/last.ckpt")
    if "--model=DTQLKL" in words:
        options = [each for each in options if not each.startswith("--model")]
    assert complaint in refused(root, [*options, *words], capfd)


def flip(path: Path, checkpoint: dict[str, Any]) -> None:
    with zipfile.ZipFile(path) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 1000] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path, checkpoint: dict[str, Any]) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def replacing(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, dict[str, Any]], None]:
    def damage(path: Path, checkpoint: dict[str, Any]) -> None:
        change(checkpoint)
        torch.save(checkpoint, path)

    return damage


def not_finite(checkpoint: dict[str, Any]) -> None:
    name = next(name for name, each in checkpoint["state_dict"].items() if each.is_floating_point())
    checkpoint["state_dict"][name].view(-1)[0] = torch.nan


DAMAGES: dict[str, tuple[Callable[[Path, dict[str, Any]], None], str]] = {
    "flipped bit": (flip, "broken"),
    "truncated": (truncate, "broken"),
    "empty": (lambda path, _: path.write_bytes(b""), "broken"),
    "text": (lambda path, _: path.write_text("no checkpoint"), "broken"),
    "a list": (lambda path, _: torch.save([1, 2], path), "not a checkpoint of this package"),
    "no own entry": (replacing(lambda c: c.pop("offrl")), "not a checkpoint of this package"),
    "entry of another type": (replacing(lambda c: c.update(offrl="text")), "not a checkpoint of this package"),
    "negative step": (replacing(lambda c: c["offrl"].update(gradient_step=-1)), "no valid gradient_step"),
    "huge step": (replacing(lambda c: c["offrl"].update(gradient_step=10**30)), "no valid gradient_step"),
    "step of another type": (replacing(lambda c: c["offrl"].update(gradient_step="20")), "no valid gradient_step"),
    "noise of another type": (replacing(lambda c: c["offrl"].update(noise=[1])), "no valid noise"),
    "noise too short": (replacing(lambda c: c["offrl"].update(noise=c["offrl"]["noise"][:9])), "no valid noise"),
    "weights missing": (replacing(lambda c: c.pop("state_dict")), "no valid state_dict"),
    "one weight missing": (replacing(lambda c: c["state_dict"].popitem()), "other model options"),
    "weights not finite": (replacing(not_finite), "is not finite"),
    "no optimizers": (replacing(lambda c: c.update(optimizer_states=[])), "no valid optimizer_states"),
    "empty optimizer": (replacing(lambda c: c["optimizer_states"][0].update(state={})), "no valid optimizer_states"),
    "no loops": (replacing(lambda c: c.pop("loops")), "no valid loops"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(damage: str, root: Path, capfd: pytest.CaptureFixture[str]):
    do, complaint = DAMAGES[damage]
    path = run_folder(root) / "checkpoints" / "last.ckpt"
    do(path, torch.load(path, weights_only=True))
    assert complaint in refused(root, tiny_words(root, *MORE, "--ckpt_path=last"), capfd)
    if complaint not in ("no valid optimizer_states", "no valid loops") and damage != "noise too short":
        assert complaint in refused(root, ["validate", f"--ckpt_path={path}"], capfd)
        assert complaint in refused(root, ["predict", f"--ckpt_path={path}"], capfd)


def test_no_flipped_bit_changes_what_is_read(trained: Path, tmp_path: Path):
    path, damaged = run_folder(trained) / "checkpoints" / "last.ckpt", tmp_path / "damaged.ckpt"
    data, expected = path.read_bytes(), read_checkpoint(path)
    refused = 0
    for bit in np.random.default_rng(0).integers(8 * len(data), size=200).tolist():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(bytes(flipped))
        try:
            found = read_checkpoint(damaged)
        except UserError:
            refused += 1
            continue
        assert found.keys() == expected.keys()
        assert all(torch.equal(each, expected["state_dict"][name]) for name, each in found["state_dict"].items())
    assert refused > 50, "the others hit what fills the file up"


def test_a_run_goes_on_by_itself_only_with_its_own_options(root: Path, capfd: pytest.CaptureFixture[str]):
    automatic = [*tiny_words(root, *MORE), "--ckpt_path=auto"]
    line = refused(root, [*automatic, "--model.init_args.alpha=7"], capfd)
    assert "model.init_args.alpha" in line
    assert "was begun with" in line
    assert "--ckpt_path last" in line
    assert "data.reward" in refused(root, [*automatic, "--data.reward=raw"], capfd)
    finished = [*tiny_words(root, *SHORT), "--ckpt_path=auto", "--model.init_args.alpha=7"]
    assert "model.init_args.alpha" in refused(root, finished, capfd), "also a run that is finished"
    assert main(automatic) == 0


def test_files_of_one_name_are_not_one_dataset(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    def words(folder: str, steps: int) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        some = np.random.default_rng(len(folder))
        np.savez(
            tmp_path / folder / "log.npz",
            observations=some.normal(size=(40, 3)),
            actions=some.uniform(-1, 1, (40, 2)),
            rewards=some.normal(size=40),
            terminals=np.arange(40) % 8 == 7,
        )
        own = [f"--data.dataset={tmp_path}/{folder}/log.npz", "--ckpt_path=auto", f"--trainer.max_steps={steps}"]
        return [*tiny_words(tmp_path / "runs", *SHORT), "--data.reward=raw", *own]

    assert main(words("a", 20)) == 0
    assert "other data of the name log" in refused(tmp_path / "runs", words("other", 20), capfd)
    assert "a/log.npz, not on" in refused(tmp_path / "runs", words("other", 40), capfd)
    assert main(words("a", 40)) == 0


def test_a_folder_has_one_writer(root: Path, capfd: pytest.CaptureFixture[str]):
    folder = RunFolder(run_folder(root))
    holds_the_lock = (
        "import time; from pathlib import Path; from lit_offrl.run_folder import RunFolder\n"
        f"with RunFolder(Path({str(folder.path)!r})).lock(): print('locked', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holds_the_lock],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"locked\n"
    for words in (
        tiny_words(root, *MORE, "--ckpt_path=last"),
        tiny_words(root, *MORE, "--overwrite=true"),
        ["validate", f"--ckpt_path={folder.last_checkpoint}", "--evaluation.enabled=false"],
    ):
        assert "another process writes into" in refused(root, words, capfd)
    other.kill()
    other.wait()
    assert main(tiny_words(root, *MORE, "--ckpt_path=last")) == 0, "the lock has died with its holder"
    assert not (folder.path / ".lock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_the_first_update_is_no_success(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    begin = EMATargets.on_fit_start

    def on_fit_start(*arguments: Any) -> None:
        os.kill(os.getpid(), number)
        begin(*arguments)

    handler = signal.getsignal(number)
    monkeypatch.setattr(EMATargets, "on_fit_start", on_fit_start)
    assert main(tiny_words(tmp_path, *SHORT)) == 128 + number
    assert capfd.readouterr().err.strip().splitlines()[-1] == "stopped"
    assert not list(tmp_path.rglob("last.ckpt"))
    assert not list(tmp_path.rglob("results.json"))
    assert signal.getsignal(number) == handler


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--trainer.fast_dev_run=true", "fast_dev_run"),
        ("--trainer.limit_train_batches=0", "limit_train_batches"),
        ("--trainer.max_epochs=0", "trainer.max_epochs"),
        ("--trainer.overfit_batches=2", "overfit_batches"),
        ("--trainer.reload_dataloaders_every_n_epochs=1", "reload_dataloaders_every_n_epochs"),
        ("--trainer.check_val_every_n_epoch=0", "check_val_every_n_epoch"),
        ("--trainer.check_val_every_n_epoch=-1", "check_val_every_n_epoch"),
        ("--trainer.precision=64-true", "trainer.precision"),
        ("--trainer.precision=bf16-true", "trainer.precision"),
        ("--trainer.val_check_interval=0", "val_check_interval"),
        ("--trainer.devices=-2", "devices"),
        ("--seed_everything=-1", "seed_everything: must be at least 0"),
        ("--seed_everything=4294967296", "seed_everything: must be at least 0"),
        ("--seed_everything=abc", "seed_everything: must be bool or int, not abc"),
        ("--model.init_args.critic=null", "a group of options is null"),
        ("--data.reward=affine:0:0", "a finite scale other than 0"),
        ("--data.reward=affine:nan:1", "a finite scale other than 0"),
        (f"--data.dataset={'x' * 5000}", "it has 5,000 characters"),
        ("--trainer.logger=WandbLogger", "pip install wandb"),
        ("--trainer.plugins=zzz", "trainer.plugins: no class 'zzz'"),
        ("--trainer.callbacks=BatchSizeFinder", "BatchSizeFinder"),
        ("--trainer.callbacks=LearningRateFinder", "LearningRateFinder"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(
    option: str, complaint: str, tmp_path: Path, minari_root: Path, capfd: pytest.CaptureFixture[str]
):
    assert complaint in refused(tmp_path, [*tiny_words(tmp_path / "runs", *SHORT), option], capfd)


def test_a_run_that_time_ended_is_not_finished(tmp_path: Path, minari_root: Path):
    words = tiny_words(tmp_path, *SHORT, "--trainer.max_time=00:00:00:00", "--trainer.max_steps=100000")
    assert main(words) == 0
    results = RunFolder(run_folder(tmp_path)).results()
    assert results["status"] == "interrupted"
    assert results["gradient_steps"] < 100_000


def test_without_a_home_folder_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    words = [*tiny_words(tmp_path / "runs"), "--data.dataset=offrl/pointmaze/umaze-v0"]
    assert "set MINARI_DATASETS_PATH" in refused(tmp_path, words, capfd)


def test_epochs_are_counted_in_steps_also_over_resumes(tmp_path: Path, minari_root: Path):
    epochs = [each for each in SHORT if "max_steps" not in each]
    words = [each for each in tiny_words(tmp_path, *epochs) if "max_steps" not in each]
    for stop in (15, 25):  # in the middle of an epoch
        assert main([*words, f"--trainer.max_steps={stop}", "--trainer.max_epochs=4", "--ckpt_path=auto"]) == 0
    assert main([*words, "--trainer.max_epochs=4", "--ckpt_path=auto"]) == 0
    assert RunFolder(run_folder(tmp_path)).results()["gradient_steps"] == 40


def log_of_two_episodes(folder: Path) -> None:
    """Write transitions of the shapes of `WithoutEnd`: episodes of 10 and of 30 steps."""
    np.savez(
        folder / "log.npz",
        observations=np.zeros((40, 3)),
        actions=np.zeros((40, 2)),
        rewards=np.ones(40),
        terminals=np.isin(np.arange(40), (9, 39)),
    )


class WithoutEnd(gym.Env[np.ndarray, np.ndarray]):
    """Never ends by itself."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**options)
        return np.zeros(3, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(3, np.float32), 1.0, False, False, {}


def test_an_environment_without_a_time_limit_has_that_of_the_data(tmp_path: Path, minari_root: Path):
    gym.register("WithoutEnd-v0", WithoutEnd)
    log_of_two_episodes(tmp_path)
    own = [f"--data.dataset={tmp_path}/log.npz", "--data.environment=WithoutEnd-v0", "--data.reward=raw"]
    own += ["--data.normalize_observations=false", "--evaluation.enabled=true", "--overwrite=true"]
    for more, limit in (([], 30), (["--evaluation.max_episode_steps=7"], 7)):
        assert main([*tiny_words(tmp_path / "runs", *SHORT), *own, *more]) == 0
        results = RunFolder(tmp_path / "runs" / "dtql" / "log" / "seed_0").results()
        assert results["scores"]["return_mean"] == limit
        assert bool(results["protocol"]["differences"]) == (not more), "what the data decided is said"


class Breaks(WithoutEnd):
    """Raises in every step after the first hundred of all its copies."""

    steps = 0

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        Breaks.steps += 1
        if Breaks.steps > 100:
            raise ArithmeticError("unstable simulation")
        return super().step(action)


def test_a_simulator_that_raises_costs_scores_and_no_training(
    tmp_path: Path, minari_root: Path, capfd: pytest.CaptureFixture[str]
):
    gym.register("Breaks-v0", Breaks, max_episode_steps=20)
    log_of_two_episodes(tmp_path)
    own = [f"--data.dataset={tmp_path}/log.npz", "--data.environment=Breaks-v0", "--data.reward=raw"]
    own += ["--data.normalize_observations=false", "--trainer.max_steps=200"]
    assert main([*tiny_words(tmp_path / "runs"), *own]) == 1
    output = capfd.readouterr()
    assert "note: no scores at step 120: the environment raised ArithmeticError: unstable simulation" in output.err
    assert output.err.strip().splitlines()[-1].startswith("error: the environment raised ArithmeticError")
    folder = RunFolder(tmp_path / "runs" / "dtql" / "log" / "seed_0")
    assert read_checkpoint(folder.last_checkpoint)["global_step"] == 200
    assert folder.results()["status"] == "failed"


def test_a_new_run_starts_from_the_weights_of_another(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    checkpoint = run_folder(root) / "checkpoints" / "last.ckpt"
    words = [
        *tiny_words(tmp_path / "new", *SHORT),
        f"--init_from={checkpoint}",
        "--model.init_args.learning_rate=1e-12",
    ]
    words += ["--model.init_args.critic.learning_rate=1e-12", "--model.init_args.nll_weight=0"]
    assert main(words) == 0
    assert "starts from" in capfd.readouterr().out
    new = run_folder(tmp_path / "new") / "checkpoints" / "last.ckpt"
    before, after = (read_checkpoint(path)["state_dict"] for path in (checkpoint, new))
    weights = [name for name in before if name.endswith("weight")]
    assert weights
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in weights)
    results = RunFolder(run_folder(tmp_path / "new")).results()
    assert results["init_from"]["checkpoint"] == str(checkpoint)
    assert results["init_from"]["gradient_steps"] == 20
    assert results["gradient_steps"] == 20
    line = refused(tmp_path / "new", [*words, "--overwrite=true", "--init_from=nowhere.ckpt"], capfd)
    assert "init_from: no checkpoint at nowhere.ckpt" in line


def test_code_of_others_in_a_config_needs_trust(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = run_folder(root)
    config = folder / "config.yaml"
    own = config.read_text()
    words = ["validate", f"--ckpt_path={folder}/checkpoints/last.ckpt", "--evaluation.enabled=false"]
    for before, after in (
        ("callbacks: null", "callbacks: planted.Callback"),
        ("callbacks: null", "callbacks:\n  - class_path: planted.Callback"),
        ("class_path: lit_offrl.DTQL", "class_path: planted.Model"),
        ("environment: null", "environment: planted:Env-v0"),
    ):
        assert before in own, before
        config.write_text(own.replace(before, after))
        assert "names code of another package, planted" in refused(root, words, capfd)
    aliases = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 8)}]\n" for i in range(1, 9))
    config.write_text(f"b0: &b0 [x]\n{aliases}{own}")
    assert "stands for too many values" in refused(root, words, capfd)
    config.write_text(own)
    assert main(words) == 0


def test_policies_of_unknown_classes_need_trust(root: Path):
    path = run_folder(root) / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["offrl"]["class_path"] = "planted_module.Policy"
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="import planted_module first, or give trust=True"):
        lit_offrl.load_policy(path)


def test_early_stopping_is_said_and_can_go_on(tmp_path: Path, minari_root: Path, capfd: pytest.CaptureFixture[str]):
    own = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=eval/return_mean"]
    words = [*tiny_words(tmp_path), *own, "--trainer.callbacks.patience=1", "--trainer.callbacks.mode=min"]
    words += ["--trainer.callbacks.min_delta=1000000", "--trainer.max_steps=400"]
    assert main(words) == 0
    assert "stopped early at gradient step 80 of 400" in capfd.readouterr().out
    assert RunFolder(run_folder(tmp_path)).results()["status"] == "stopped early"
    assert main([*words, "--ckpt_path=last"]) == 0
    wrong = [*tiny_words(tmp_path / "other"), *own[:1], "--trainer.callbacks.monitor=eval/score"]
    assert "no 'eval/score'" in refused(tmp_path, wrong, capfd)
    wrong[-1] = "--trainer.callbacks.monitor=train/loss"
    assert "'train/loss' is none of eval/... and val/..." in refused(tmp_path, wrong, capfd)
    wrong[-1] = "--trainer.callbacks.monitor=val/nothing"  # which losses an algorithm has shows the first validation
    assert main([*wrong, "--data.validation_fraction=0.2"]) == 1
    assert "trainer.callbacks: Early stopping conditioned on metric `val/nothing`" in capfd.readouterr().err


def test_a_failure_before_the_first_update_leaves_no_folder(
    tmp_path: Path, minari_root: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*arguments: Any) -> None:
        raise RuntimeError("a driver")

    monkeypatch.setattr(EMATargets, "on_fit_start", fails)
    with pytest.raises(RuntimeError, match="a driver"):
        main(tiny_words(tmp_path / "runs", *SHORT))
    assert not (tmp_path / "runs").exists()


def test_a_bare_checkpoint_says_what_it_lacks(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    bare = tmp_path / "bare.ckpt"
    shutil.copy(run_folder(root) / "checkpoints" / "last.ckpt", bare)
    assert "or name it with --config" in refused(root, ["validate", f"--ckpt_path={bare}"], capfd)
    moved = tmp_path / "checkpoints" / "last.ckpt"
    moved.parent.mkdir()
    shutil.copy(bare, moved)
    assert "name the run's configuration with --config" in refused(root, ["validate", f"--ckpt_path={moved}"], capfd)
    config = f"--config={run_folder(root)}/config.yaml"
    assert main(["validate", config, f"--ckpt_path={moved}", "--evaluation.enabled=false"]) == 0
