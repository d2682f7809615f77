"""Jobs of a cluster without one: by submitit's own executor for this machine, and what is refused."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import submitit
from conftest import DATASET
from faults import BANDIT
from submitit.local.local import LocalJob

from lit_offrl.cli import main
from lit_offrl.cli.engine import run_on_engine, split_engine
from lit_offrl.collect.recorder import collect_dataset, collect_shard
from lit_offrl.errors import UserError
from lit_offrl.jobs import slurm
from lit_offrl.jobs.local import Job


def local(folder: Path) -> submitit.LocalExecutor:
    executor = submitit.LocalExecutor(folder / "slurm", max_num_timeout=slurm.MOST_RESTARTS)
    executor.update_parameters(timeout_min=5, stderr_to_stdout=True)
    return executor


def ended(folder: Path, job: str) -> None:
    LocalJob(folder / "slurm", job)._process = None
    deadline = time.monotonic() + 100
    while Path("/proc", job).exists() and "Z" not in Path("/proc", job, "stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow  # two trainings, one after the other
def test_a_warned_job_starts_again_and_goes_on(tmp_path: Path):
    """Submitit's executor for this machine sends the warning, and starts the job again, as SLURM does."""
    root = tmp_path / "runs"
    rarely = "--trainer.check_val_every_n_epoch=10"
    words = [*BANDIT, "--trainer.max_steps=600", rarely, f"--trainer.default_root_dir={root}", "--ckpt_path=auto"]
    (job,) = local(root).map_array(slurm.ClusterJob(), [words])
    log = root / "slurm" / f"{job.job_id}_0_log.out"
    deadline = time.monotonic() + 100
    while not list(root.rglob("last.ckpt")):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    children = Path("/proc", job.job_id, "task", job.job_id, "children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGUSR2)
    job.wait()
    text = log.read_text()
    assert text.count("stopped at gradient step") == 1
    assert text.count("finished 600 gradient steps") == 1
    assert slurm.is_done(root, job.job_id)
    assert slurm.last_line(log).startswith("finished 600 gradient steps")


def test_only_what_is_not_finished_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slurm, "live_jobs", dict)  # this machine has no queue
    jobs = [Job("good", ["--version"]), Job("bad", ["nonsense"])]
    for job in slurm.submit(local(tmp_path), jobs, tmp_path):
        ended(tmp_path, job)
    states = {each.name: (each.state, each.line) for each in slurm.statuses(tmp_path)}
    assert states["good"] == ("done", "lit_offrl 0.1.0")
    assert states["bad"][0] == "failed"
    assert states["bad"][1].startswith("error: no command 'nonsense'")
    before = slurm.read_index(tmp_path)
    (again,) = slurm.submit(local(tmp_path), jobs, tmp_path)
    ended(tmp_path, again)
    after = slurm.read_index(tmp_path)
    assert after["good"] == before["good"]
    assert after["bad"]["job"] == again != before["bad"]["job"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["grid", "quick", "--engine=slurm"], "there is no SLURM on this machine"),
        (["grid", "quick", "--engine=pbs"], "invalid choice: 'pbs'"),
        (["grid", "quick", "--slurm.partition=gpu"], "--slurm.partition belongs to --engine slurm"),
        (
            ["grid", "quick", "--engine=slurm", "--slurm.timeout_min=day"],
            "--slurm.timeout_min: invalid int value: 'day'",
        ),
        (["grid", "quick", "--engine=slurm", "--parallel=2"], "--slurm.array_parallelism"),
        (["grid", "quick", "--engine=slurm", "--overwrite=true"], "--overwrite: a job that is queued again"),
        (["grid", "status"], "give the folder of the runs: grid status runs/NAME"),
        (["grid", "status", "nowhere"], "no jobs were submitted for nowhere"),
        (["grid", "cancel", "nowhere"], "no jobs were submitted for nowhere"),
        (["fit", "--engine=slurm"], "--engine belongs to several runs: name their seeds"),
        (["sweep", "--config=search/dtql_pointmaze", "--workers=0"], "--workers: must be at least 1"),
        (["data", "collect", DATASET, "--shards=4"], "--engine: must be slurm beside --shards"),
        (["data", "collect", DATASET, "--engine=slurm"], "--shards: must be at least 1"),
        (["data", "collect", DATASET, "--shard=4/4"], "shard: 4/4 must be one of 0/4 to 3/4"),
        (["data", "collect", DATASET, "--shard=half"], "--shard: must be K/N"),
    ],
)
def test_bad_input_gets_one_line(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("PATH", str(tmp_path))  # without SLURM
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert main(words) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_submitit_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'lit_offrl\[cluster\]'"):
        slurm.make_executor(tmp_path, {})


def test_options_win_over_the_sites_and_those_over_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script that sbatch would get."""
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = slurm.site_file()
    file.parent.mkdir()
    file.write_text("partition: gpu\naccount: lab\ntimeout_min: 60\nadditional_parameters: {licenses: x}\n")
    executor = slurm.make_executor(tmp_path, {"timeout_min": 30, "array_parallelism": 7})
    inner = executor._executor  # type: ignore[attr-defined]
    inner.parameters["map_count"] = 10
    script = inner._make_submission_file_text("true", "0").splitlines()
    flags = {line.removeprefix("#SBATCH --") for line in script if line.startswith("#SBATCH")}
    assert {"partition=gpu", "account=lab", "time=30", "array=0-9%7", "requeue", "signal=USR2@120"} <= flags
    assert {"licenses=x", "cpus-per-task=1", "job-name=lit_offrl"} <= flags
    for content, complaint in (("partion: x", "Unknown argument 'partion'"), ("[1]", "must hold keys"), ("{", "YAML")):
        file.write_text(content)
        with pytest.raises(UserError, match=complaint):
            slurm.make_executor(tmp_path, {})


def test_engine_options_are_taken_out():
    options, words = split_engine(["--a=1", "--engine", "slurm", "--slurm.gpus_per_node=2", "--b", "3"])
    assert words == ["--a=1", "--b", "3"]
    assert (options.engine, getattr(options, "slurm.gpus_per_node")) == ("slurm", 2)


def test_here_the_jobs_run_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    options = split_engine([])[0]
    assert isinstance(options, argparse.Namespace)
    assert run_on_engine(options, [Job("good", ["--version"])], tmp_path) == 0
    assert "good | lit_offrl" in capfd.readouterr().out
    assert not list(tmp_path.iterdir())


def test_shards_are_taken_up(minari_root: Path, tmp_path: Path):
    """Two of three shards, one of them cut short by a kill: the collection records the rest, and has the same bytes."""
    options = {"steps": 1500, "seed": 0, "processes": 1, "root": tmp_path, "progress": False}
    paths = [collect_shard(DATASET, shard, 2, **options) for shard in (0, 1)]  # type: ignore[arg-type]
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) * 2 // 3])
    folder = collect_dataset(DATASET, **options)  # type: ignore[arg-type]
    file = Path("data", "main_data.hdf5")
    assert (folder / file).read_bytes() == (minari_root / DATASET / file).read_bytes()
    assert not list(paths[0].parent.glob("shard_*"))
