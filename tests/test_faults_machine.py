"""Where the machine fails: full disks, missing permissions, closed pipes, killed parents. See FAULTS.md."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATASET, tiny_words
from faults import (
    BANDIT,
    environment,
    fails_in_one_line,
    on_small_disk,
    trial,
    without_privileges,
)
from test_faults_data import flat_arrays

from lit_offrl.cli import main
from lit_offrl.system.processes import package_command

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses Linux's namespaces and /dev/full")
pytestmark = linux_only
LONG = ("--trainer.max_steps=4000", "--data.steps_per_epoch=200")


def in_campaign(value: str) -> Any:
    """Return a parameter that only the campaign tries."""
    return pytest.param(value, marks=pytest.mark.faults)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    assert main([*BANDIT, f"--trainer.default_root_dir={root}"]) == 0
    return root


def log_file(folder: Path, rows: int = 50) -> Path:
    generator = np.random.default_rng(0)
    arrays = {name: np.concatenate([each] * (1 + rows // len(each))) for name, each in flat_arrays().items()}
    arrays["observations"] = generator.normal(size=arrays["observations"].shape)  # which cannot be compressed
    np.savez(folder / "log.npz", **arrays)
    return folder / "log.npz"


# ------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.faults
@pytest.mark.parametrize(
    ("figures", "size"),
    [
        *(("true", each) for each in ("8k", "40k", "200k", "600k", "1m")),
        *(("false", each) for each in ("8k", "40k", "200k")),
    ],
)
def test_training_on_a_full_disk(size: str, figures: str, tmp_path: Path):
    """Wherever the disk is full first: the event file, metrics.csv, a figure, a checkpoint, results.json."""
    (tmp_path / "disk").mkdir()
    words = [*BANDIT, *LONG, f"--bandit.figures={figures}", "--trainer.default_root_dir=disk/runs"]
    with trial("full disk, fit"):
        done = fails_in_one_line(on_small_disk(size, tmp_path / "disk", package_command(words)), tmp_path)
        assert "No space left" in done.stderr or "cannot be written" in done.stderr or "could not be" in done.stderr


@pytest.mark.parametrize("suffix", ["npz", "hdf5"])
@pytest.mark.parametrize("size", ["4k", pytest.param("64k", marks=pytest.mark.faults)])
def test_converting_on_a_full_disk(suffix: str, size: str, tmp_path: Path):
    (tmp_path / "disk").mkdir()
    log_file(tmp_path, rows=20_000)
    words = package_command(["data", "convert", "log.npz", f"disk/out.{suffix}"])
    script = '"$@"; code=$?; test -z "$(ls -A disk)" || exit 99; exit $code'
    with trial("full disk, data convert"):
        done = fails_in_one_line(on_small_disk(size, tmp_path / "disk", ["sh", "-c", script, "sh", *words]), tmp_path)
        assert done.returncode != 99, "a file was left"


@pytest.mark.faults
@pytest.mark.parametrize("size", ["20k", "200k", "600k"])
def test_collecting_on_a_full_disk(size: str, tmp_path: Path):
    (tmp_path / "disk").mkdir()
    words = package_command(["data", "collect", "offrl/pointmaze/umaze-v0", "--steps", "20000", "--processes", "1"])
    with trial("full disk, data collect"):
        fails_in_one_line(
            on_small_disk(size, tmp_path / "disk", words), tmp_path, MINARI_DATASETS_PATH=str(tmp_path / "disk")
        )


@pytest.mark.faults
@pytest.mark.parametrize("size", ["4k", "12k"])
def test_reporting_on_a_full_disk(size: str, finished: Path, tmp_path: Path):
    (tmp_path / "disk").mkdir()
    words = package_command(["report", str(finished), "--output", "disk/report"])
    with trial("full disk, report"):
        fails_in_one_line(on_small_disk(size, tmp_path / "disk", words), tmp_path)


@pytest.mark.parametrize(
    "command", ["algorithms", *(pytest.param(each, marks=pytest.mark.faults) for each in ("report", "data", "fit"))]
)
def test_a_full_disk_behind_the_output(command: str, finished: Path, tmp_path: Path):
    words = {
        "report": ["report", str(finished), "--output", str(tmp_path / "report")],
        "data": ["data", "list"],
        "fit": [*BANDIT, f"--trainer.default_root_dir={tmp_path}/runs"],
        "algorithms": ["algorithms"],
    }[command]
    with trial("full disk behind the output"), Path("/dev/full").open("w") as full:
        done = subprocess.run(
            package_command(words), stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=120
        )
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert [line for line in done.stderr.splitlines() if "error: " in line] == [
            "error: No space left on device: make room, then give the same command again"
        ]


# ------------------------------------------------------------------------------------------------------ closed pipes


@pytest.mark.parametrize(
    "command", ["report", *(pytest.param(each, marks=pytest.mark.faults) for each in ("data", "fit"))]
)
def test_a_reader_that_goes_away(command: str, finished: Path, tmp_path: Path):
    """The command stops, with a code that says so; what a training had saved is there."""
    words = {
        "report": ["report", str(finished), "--output", str(tmp_path / "report")],
        "data": ["data", "list"],
        "fit": [*BANDIT, f"--trainer.default_root_dir={tmp_path}/runs"],
    }[command]
    with trial("closed pipe"):
        process = subprocess.Popen(
            package_command(words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True
        )
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
        assert process.wait(120) == 128 + signal.SIGPIPE, errors
        assert errors.strip().splitlines()[-1] == "error: stopped: nobody reads the output any more"


# ------------------------------------------------------------------------------------------------------- permissions


@pytest.mark.faults
def test_folders_and_files_without_permission(finished: Path, minari_root: Path, tmp_path: Path):
    closed = tmp_path / "closed"
    closed.mkdir()
    log = log_file(tmp_path)
    checkpoint = next(finished.rglob("last.ckpt"))
    unreadable = tmp_path / "runs" / "checkpoints" / "last.ckpt"
    unreadable.parent.mkdir(parents=True)
    unreadable.write_bytes(checkpoint.read_bytes())
    config = tmp_path / "config.yaml"
    config.write_text("seed_everything: 1\n")
    cases = {
        "run folder": [*BANDIT, f"--trainer.default_root_dir={closed}/runs"],
        "dataset": tiny_words(tmp_path / "runs", f"--data.dataset={log}"),
        "checkpoint": [*BANDIT, f"--ckpt_path={unreadable}"],
        "config": [*BANDIT, f"--config={config}"],
        "report": ["report", str(finished), "--output", str(closed / "report")],
        "convert": ["data", "convert", DATASET, str(closed / "out.npz")],
    }
    for path, mode in ((closed, 0o555), (log, 0), (unreadable, 0), (config, 0)):
        path.chmod(mode)
    try:
        for name, words in cases.items():
            with trial("permissions"):
                done = fails_in_one_line(without_privileges(package_command(words)), tmp_path)
                assert done.returncode in (1, 2), name
                assert "ermission denied" in done.stderr or "cannot be written" in done.stderr, done.stderr
        with trial("permissions"):  # a cache that cannot be written costs time only
            log.chmod(0o444)
            done = subprocess.run(
                without_privileges(package_command(["data", "check", DATASET])), env=environment(), capture_output=True
            )
            assert done.returncode == 0
    finally:
        closed.chmod(0o755)


def test_a_minari_root_without_permission(tmp_path: Path):
    root = tmp_path / "minari"
    root.mkdir()
    root.chmod(0)
    try:
        collect = ["data", "collect", DATASET, "--steps", "100"]
        for words in (["data", "info", "D4RL/pen/human-v2"], collect, ["data", "list"]):
            with trial("permissions"):
                fails_in_one_line(without_privileges(package_command(words)), tmp_path, MINARI_DATASETS_PATH=str(root))
    finally:
        root.chmod(0o755)


# ------------------------------------------------------------------------------------------------------------ orphans


@pytest.mark.faults
def test_seeds_end_with_their_parent(tmp_path: Path):
    """However it dies; the memory that they shared is given back by the next start."""
    endless = ["--trainer.max_steps=1000000", "--data.steps_per_epoch=200", "--seeds=0,1"]
    words = [*BANDIT, *endless, f"--trainer.default_root_dir={tmp_path}/runs"]
    tables = tmp_path / "tables"
    tables.mkdir()
    started = environment(TMPDIR=str(tables))
    with trial("killed parents"):
        process = subprocess.Popen(package_command(words), stdout=subprocess.PIPE, env=started)
        wait(lambda: len(list(tmp_path.rglob("last.ckpt"))) == 2)
        children = children_of(process.pid)
        assert len(children) == 2
        process.kill()
        process.wait()
        wait(lambda: not any(Path("/proc", str(child), "cmdline").exists() for child in children))
        assert len(list(tables.glob("lit_offrl_tables_*"))) == 1
        again = [*BANDIT, f"--trainer.default_root_dir={tmp_path}/other", "--seeds=0"]
        assert subprocess.run(package_command(again), env=started, capture_output=True).returncode == 0
        assert not list(tables.iterdir())


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def wait(condition: object, seconds: float = 90.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.init_args.hidden_dim=60000"], "GB"),
        (["--data.batch_size=2147483647"], "687"),
        pytest.param(
            ["--data.batch_size=3000000", "--data.block_size=1", "--model.init_args.hidden_dim=2048"],
            "GB",
            marks=pytest.mark.faults,
        ),
    ],
)
def test_what_does_not_fit_into_memory(options: list[str], named: str, tmp_path: Path):
    """Before training where that can be told, else at the first update; in both cases nothing is left."""
    with trial("out of memory"):
        words = [*BANDIT, *options, f"--trainer.default_root_dir={tmp_path}/runs"]
        limit = 'ulimit -v 12000000; exec "$@"'
        done = fails_in_one_line(["sh", "-c", limit, "sh", *package_command(words)], tmp_path)
        assert named in done.stderr
        assert not (tmp_path / "runs").exists()


@pytest.mark.faults
def test_no_home_folder(tmp_path: Path):
    with trial("no home folder"):
        words = [*BANDIT, f"--trainer.default_root_dir={tmp_path}/runs"]
        started = {name: value for name, value in environment().items() if name not in ("HOME", "XDG_CACHE_HOME")}
        done = subprocess.run(package_command(words), env=started, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "runs").exists()
