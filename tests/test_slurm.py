"""A real SLURM: runs that are preempted, workers that are killed, collections in shards. Started by the tests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from faults import BANDIT
from one_node_slurm import missing, running_slurm, wait
from test_resume import assert_same_state, load, rows
from test_search import tiny_search

from lit_offrl.jobs.slurm import read_index

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
DATASET = "offrl/pointmaze/umaze-v0"
LONG = ["--trainer.max_steps=2000", "--evaluation.enabled=false", "--checkpoint.keep_every_n_epochs=0"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
    try:
        with running_slurm(folder) as environment:
            yield {
                **environment,
                "PYTHONPATH": str(REPOSITORY),
                "OMP_NUM_THREADS": "1",
                "XDG_CONFIG_HOME": str(folder / "config"),
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def offrl(environment: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lit_offrl", *words], env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    print(f"$ lit_offrl {' '.join(words)}\n{done.stdout}")
    return done.stdout


def ask(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    print(f"$ {' '.join(command)}\n{done.stdout}")
    return done.stdout


def wait_for(environment: dict[str, str], root: Path, *counts: str) -> str:
    """Wait until the last line of `grid status` has these counts; return what it said."""
    said = ""

    def reached() -> bool:
        nonlocal said
        words = [sys.executable, "-m", "lit_offrl", "grid", "status", str(root)]
        said = subprocess.run(words, env=environment, cwd=REPOSITORY, capture_output=True, text=True).stdout
        last = said.strip().rpartition("\n")[2]
        return all(count in last for count in counts)

    wait(reached, 400)
    print(f"$ lit_offrl grid status {root}\n{said}")
    return said


def test_preempted_runs_repeat_their_bits(slurm: dict[str, str], tmp_path: Path):
    """One of two is asked to stop, the other is not; a third, which is wrong, says why."""
    root, alone = tmp_path / "runs", tmp_path / "alone"
    train = [*BANDIT, *LONG, f"--trainer.default_root_dir={root}"]
    offrl(slurm, *train, "--seeds=0,1", "--engine=slurm", "--slurm.timeout_min=30")
    preempted = root / "dtql" / "bandit" / "25gaussians-hard" / "seed_0"
    wait(lambda: (preempted / "checkpoints" / "last.ckpt").is_file(), 200)
    (job, _) = (entry["job"] for entry in read_index(root).values())
    ask(slurm, "scancel", "--signal=TERM", job)
    again = offrl(slurm, *train, "--seeds=0,1", "--engine=slurm", "--slurm.timeout_min=30")
    assert "0 of 2 jobs submitted" in again
    wait_for(slurm, root, "2 jobs: 2 done")
    log = (root / "slurm" / f"{job}_0_log.out").read_text()
    print(log)
    assert len(re.findall("stopped at gradient step", log)) == 1
    assert len(re.findall("finished 2,000 gradient steps", log)) == 1
    assert len(re.findall("run folder", log)) == 2
    assert "0 of 2 jobs submitted" in offrl(slurm, *train, "--seeds=0,1", "--engine=slurm", "--slurm.timeout_min=30")

    offrl(slurm, *BANDIT, *LONG, f"--trainer.default_root_dir={alone}")
    whole = alone / preempted.relative_to(root)
    assert_same_state(load(whole), load(preempted))
    assert rows(whole / "metrics.csv") == rows(preempted / "metrics.csv")

    offrl(slurm, *train, "--seeds=2", "--engine=slurm", "--data.batch_size=-1")
    assert re.search(r"failed .* error: data.batch_size", wait_for(slurm, root, "3 jobs: 2 done, 1 failed"))


def test_cancelled_runs_stay_where_they_are(slurm: dict[str, str], tmp_path: Path):
    root = tmp_path / "runs"
    endless = [*BANDIT, "--trainer.max_steps=1000000", f"--trainer.default_root_dir={root}"]
    offrl(slurm, *endless, "--seeds=0", "--engine=slurm")
    wait(lambda: bool(list(root.rglob("last.ckpt"))), 200)
    assert "1 jobs cancelled" in offrl(slurm, "grid", "cancel", str(root))
    said = wait_for(slurm, root, "1 jobs: 1 stopped")
    assert "stopped at gradient step" in said


def test_a_killed_worker_of_a_search(slurm: dict[str, str], tmp_path: Path):
    """The other one takes over its trial, and there are exactly as many as were asked for."""
    folder = tmp_path / "search"
    search = {**tiny_search(tmp_path, **{"trainer.max_steps": 100, "data.steps_per_epoch": 20}), "folder": str(folder)}
    space = {"model.init_args.learning_rate": {"low": 1e-4, "high": 1e-2}}
    search |= {"sampler": "random", "trials": 4, "space": space}
    path = tmp_path / "search.yaml"
    path.write_text(json.dumps(search))
    offrl(slurm, "sweep", f"--config={path}", "--workers=2", "--engine=slurm")
    wait(lambda: len(list(folder.rglob("last.ckpt"))) >= 1, 200)
    (trial,) = {checkpoint.relative_to(folder).parts[1] for checkpoint in list(folder.rglob("last.ckpt"))[:1]}
    process = worker_of(folder / "trials" / trial)
    print(f"$ kill -KILL {process}")
    os.kill(process, signal.SIGKILL)  # as the system does where memory is short: SLURM does not start it again
    said = wait_for(slurm, folder, "1 failed", "1 done")
    other = next(line.split()[1] for line in said.splitlines() if line.startswith("done"))
    log = (folder / "slurm" / f"{other}_0_log.out").read_text()
    print(log)
    assert "its worker is dead; it is tried again" in log
    assert "4 finished trials: 4 complete, 0 pruned; 1 failed or broken off" in log


def worker_of(trial: Path) -> int:
    """Return the process that started the run of a trial."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"--trainer.default_root_dir={trial}".encode() in (entry / "cmdline").read_bytes():
                return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    raise AssertionError(f"no run in {trial}")


def test_a_collection_in_shards(slurm: dict[str, str], tmp_path: Path):
    words = ["data", "collect", DATASET, "--steps=3000", "--processes=1"]
    places = {name: {**slurm, "MINARI_DATASETS_PATH": str(tmp_path / name)} for name in ("shards", "alone")}
    offrl(places["shards"], *words, "--engine=slurm", "--shards=4")
    hidden = tmp_path / "shards" / ".lit_offrl" / DATASET.replace("/", "-")
    wait_for(places["shards"], hidden, "5 jobs: 5 done")
    offrl(places["alone"], *words)
    files = [tmp_path / name / DATASET / "data" / "main_data.hdf5" for name in places]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not list(hidden.glob("shard_*"))
    assert os.listdir(hidden / "slurm")  # noqa: PTH208 (the logs stay)
