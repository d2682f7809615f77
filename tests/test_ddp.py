"""Several ranks train as one process does; what goes wrong on one of them ends the job, with its checkpoint intact."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import tiny as made_up
import torch
import torch.multiprocessing
from conftest import run_folder, tiny_words
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor

from lit_offrl import algorithms
from lit_offrl.callbacks.distributed import DistributedTraining, average, check_equal, gather_objects, gather_rows
from lit_offrl.callbacks.ema import EMATargets
from lit_offrl.callbacks.rollout import Scores
from lit_offrl.cli import main
from lit_offrl.data import sources
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.transitions import BlockSampler
from lit_offrl.envs.rollout import Episode
from lit_offrl.errors import RunFailure, UserError
from lit_offrl.system.ranks import launched_rank
from lit_offrl.system.trainer import check_trainer

OBSERVATION_DIM, ACTION_DIM, BATCH_SIZE, STEPS = 3, 2, 24, 50
# Phases so short that 50 updates go through all of them, and sizes that leave parts of batches to be shared out.
BDPO = {"warmup_steps": 10, "actor_every": 2, "diffusion_steps": 5, "rho": 0.5, "clip_norm": 1.0}
ONE_STEP = {name: value for name, value in BDPO.items() if name != "diffusion_steps"}
STAGES: dict[str, Any] = {"critic.batch_size": 12, "critic.steps": 15}
ENERGY = {**STAGES, "energy.batch_size": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "DTQL": ("DTQL", {"nll_weight": 1.0}),
    "DTQLKL": ("DTQLKL", {}),
    "BDPO": ("BDPO", BDPO),
    "BDPOGaussian": ("BDPOGaussian", ONE_STEP),
    "BDPODeterministic": ("BDPODeterministic", ONE_STEP),
    "EDA": ("EDA", {**STAGES, "candidates_per_state": 3, "label_fraction": 0.5, "alignment_batch_size": 8}),
    "AEPO": ("AEPO", {**ENERGY, "table_size": 8, "table_samples": 64}),
    "AEPO, joint": ("AEPO", {**ENERGY, "joint": True, "refresh_every": 20, "table_size": 8, "table_samples": 64}),
    "AEPO, conservative": ("AEPO", {**ENERGY, "critic.kind": "conservative", "table_size": 8, "table_samples": 64}),
    "QGPO": ("QGPO", ENERGY),
    "QGPO, without observations": ("QGPO", {**ENERGY, "diffusion.conditional": False}),
}
CASES |= {name: (name, {}) for name in algorithms.ALGORITHMS if name not in CASES}


class DoubleData(D4RLDataModule):
    """The same transitions in the precision of the networks."""

    def train_dataloader(self) -> BlockSampler:
        loader = super().train_dataloader()
        if self.trainer.precision == "64-true":
            loader.table = loader.table.double()
        return loader


def train(case: str, devices: int, folder: Path, precision: str) -> dict[str, Tensor]:
    """Return the weights after 50 updates."""
    name, options = CASES[case]
    random = np.random.default_rng(0)
    observations = random.normal(size=(61, OBSERVATION_DIM))
    data = DoubleData.from_arrays(
        {
            "observations": observations[:-1],
            "next_observations": observations[1:],  # else every transition would be an episode
            "actions": random.uniform(-1, 1, (60, ACTION_DIM)),
            "rewards": random.normal(size=60),
            "terminals": np.arange(60) % 6 == 5,
            "timeouts": np.zeros(60, bool),
        },
        batch_size=BATCH_SIZE,
        block_size=7,
        steps_per_epoch=20,
    )
    torch.manual_seed(0)
    tiny = made_up.tiny_options(name)
    phases = {"pretrain_steps": 15} if "pretrain_steps" in tiny else {}
    algorithm = getattr(algorithms, name)(OBSERVATION_DIM, ACTION_DIM, **made_up.nested({**tiny, **phases, **options}))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=[EMATargets(), DistributedTraining()],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(algorithm, datamodule=data)
    assert algorithm.gradient_step == STEPS
    return {name: value.detach().clone() for name, value in algorithm.state_dict().items()}


def work(rank: int, port: int, folder: Path, precision: str) -> None:
    """As one of two ranks, train all cases and keep the weights; then what the callback is made of."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    result: dict[str, Any] = {case: train(case, 2, folder, precision) for case in CASES}
    rows = torch.arange(6.0).view(6, 1)
    result["gathered"] = gather_rows(rows[rank::2])
    result["averages"] = average([rows[: 2 + rank][:2] + rank, torch.tensor(float(rank))])
    shares = gather_objects(EPISODES if rank == 0 else [])
    result["scores"] = Scores.of([episode for share in shares for episode in share], None)
    algorithm = algorithms.DTQL(OBSERVATION_DIM, ACTION_DIM, hidden_dim=8)
    check_equal(algorithm)
    with torch.no_grad():
        algorithm.critic["v"].layers[0].bias[0] += 1e-6 * rank
    with pytest.raises(RunFailure, match=r"differ by gradient step 0, first in critic.v.layers.0.bias"):
        check_equal(algorithm)
    torch.save(result, folder / f"rank_{rank}.pt")


EPISODES = [Episode(0, 2.0, 5, True), Episode(1, 4.0, 7, False)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module", params=["64-true", pytest.param("32-true", marks=pytest.mark.slow)])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ranks(precision: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `work` kept on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (free_port(), folder, precision), nprocs=2)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest distance between tensors of the same name, relative to the second's norm."""
    assert one.keys() == other.keys()
    # Its gradient is zero, as it cancels in the contrastive loss: Adam makes steps of what rounding leaves of it.
    kept = [name for name in one if not (name == "energy.layers.8.bias" and one[name].dtype == torch.float32)]
    return max(float((one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-12)) for name in kept)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_process_does(case: str, precision: str, ranks: list[dict[str, Any]], tmp_path: Path):
    first, second = (each[case] for each in ranks)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    relative = difference(first, train(case, 1, tmp_path, precision))
    print(f"{case} ({precision}): largest relative difference of weights {relative:.1e}")
    # In float32 the optimizer magnifies what rounding leaves of gradients near zero.
    assert relative < (1e-6 if precision == "64-true" else 1e-4)


def test_what_ranks_exchange(ranks: list[dict[str, Any]]):
    for each in ranks:
        assert each["gathered"].flatten().tolist() == [0, 1, 2, 3, 4, 5]
        assert [one.flatten().tolist() for one in each["averages"]] == [[0.5, 1.5], [0.5]]
        # one rank has all episodes, the other none; metrics of both are those of one process
        assert each["scores"] == Scores.of(EPISODES, None)


# ---------------------------------------------------------------- shares of noise and rows, without processes


def shares(draw: Callable[[algorithms.OfflineAlgorithm], Tensor], ranks: int) -> list[Tensor]:
    drawn = []
    for rank in range(ranks):
        algorithm = algorithms.DTQL(OBSERVATION_DIM, ACTION_DIM, hidden_dim=8)  # any: the noise is the base class's
        algorithm.noise.rank, algorithm.noise.ranks = rank, ranks
        drawn.append(draw(algorithm))
    return drawn


def test_noise_of_the_ranks_is_that_of_one_process():
    for rows in (4, 7):
        draws: list[Callable[[Any], Tensor]] = [
            lambda one, n=rows: one.noise.normal(3 * n // one.noise.ranks, 2),
            lambda one, n=rows: one.noise.uniform(3 * n // one.noise.ranks),
            lambda one, n=rows: one.noise.stratified(3 * n // one.noise.ranks),
        ]
        for draw in draws:
            (whole,) = shares(draw, 1)
            parts = shares(draw, 3)
            assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)
    one, two = shares(lambda each: each.noise.normal(5, shared=True), 2)
    assert torch.equal(one, two)


def test_stratified_times_are_sorted_and_spread_evenly_on_each_rank():
    # what BDPO.continuation relies on: the rows of step 1 come first, and are floor(b / N) or ceil(b / N) of b
    for seed in range(20):
        for times in shares(
            lambda each, seed=seed: each.noise.generator.manual_seed(seed) and each.noise.stratified(13), 4
        ):
            steps = (5 * times).long()
            assert torch.equal(steps, steps.sort().values)
            assert 13 // 5 <= int((steps == 0).sum()) <= -(-13 // 5)


def test_ranks_share_out_the_minibatches_of_one_process():
    table = torch.arange(40.0).view(10, 4)
    widths = (1, 1, 1, 0, 1)
    (whole,) = [block.observations for block in BlockSampler(table, widths, 6, 5, 5, seed=3)]
    parts = [next(iter(BlockSampler(table, widths, 6, 5, 5, seed=3, rank=r, ranks=3))).observations for r in range(3)]
    assert torch.equal(torch.stack(parts, 2).flatten(1, 2), whole)


# ---------------------------------------------------------------- what is refused, and who waits


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data.batch_size=9"], "data.batch_size: 9 cannot be shared out evenly over 2 devices"),
        (["--model.init_args.critic.batch_size=5"], "model.init_args.critic.batch_size: 5 cannot be shared out"),
        (["--trainer.strategy=ddp_spawn"], "trainer.strategy: DDPStrategy (spawn) cannot train here; use auto or ddp"),
        ([], "trainer.devices: several need a command line of their own"),
    ],
)
def test_what_cannot_work_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
):
    assert main(made_up.words(tmp_path / "runs", "QGPO", "--trainer.devices=2", *extra)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {message}")


def test_sharded_parameters_are_refused():
    trainer: Any = SimpleNamespace(max_steps=1, strategy=FSDPStrategy())
    with pytest.raises(UserError, match="FSDPStrategy"):
        check_trainer(trainer)
    check_trainer(lightning.Trainer(accelerator="cpu", devices=1, strategy=DDPStrategy(), max_steps=1, logger=False))


def test_other_ranks_wait_for_a_dataset_that_the_first_one_makes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    metadata = tmp_path / "offrl/pointmaze/umaze-v0/data/metadata.json"
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:  # as a collection ends
            metadata.parent.mkdir(parents=True)
            metadata.write_text("{}")

    monkeypatch.setattr(time, "sleep", sleep)
    D4RLDataModule("offrl/pointmaze/umaze-v0").prepare_data()
    assert len(looks) == 3
    assert sources.find_source("bandit/8gaussians").is_here("bandit/8gaussians")
    assert not sources.find_source("offrl/pointmaze/large-v0").is_here("offrl/pointmaze/large-v0")


def test_ranks_by_the_variables_of_each_launcher(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert launched_rank() == 0
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert launched_rank() == 3
    monkeypatch.setenv("LOCAL_RANK", "1")  # on the second of two nodes with two devices each
    monkeypatch.setenv("RANK", "2")
    assert launched_rank() == 2


# ---------------------------------------------------------------- the command line

TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")


@contextmanager
def started(words: list[str], command: tuple[str, ...] = (), **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command line of the package in a session of its own, of which nothing is left in the end."""
    process = subprocess.Popen(
        [sys.executable, *command, "-m", "lit_offrl", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def run(words: list[str], *command: str) -> tuple[str, str]:
    """Run a command line that must succeed; return what it says on stdout and stderr."""
    with started(words, command) as process:
        out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out, err


def load(folder: Path, name: str = "last.ckpt") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / name, weights_only=True)
    return content


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def shared_run(minari_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of two ranks, and what was said."""
    root = tmp_path_factory.mktemp("shared")
    out, _ = run(tiny_words(root, *TWO))
    return run_folder(root), out


@pytest.fixture(scope="module")
def run_alone(minari_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run by one process."""
    root = tmp_path_factory.mktemp("alone")
    assert main(tiny_words(root)) == 0
    return run_folder(root)


def test_a_run_of_two_ranks_is_one_run(shared_run: tuple[Path, str], run_alone: Path):
    folder, out = shared_run
    assert out.count("run folder") == out.count("finished 90 gradient steps") == 1
    assert "shared by 2 ranks" in out
    names = [{path.name.split(".")[0] for path in each.rglob("*")} for each in (folder, run_alone)]
    assert names[0] == names[1]
    # float32 sums in another order, 90 steps
    assert difference(load(folder)["state_dict"], load(run_alone)["state_dict"]) < 1e-4
    assert torch.equal(load(folder)["offrl"]["noise"], load(run_alone)["offrl"]["noise"])
    ours, theirs = (table(each / "metrics.csv") for each in (folder, run_alone))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in (name for name, value in one.items() if name.startswith("train/") and value):
            np.testing.assert_allclose(float(one[name]), float(other[name]), rtol=1e-3, atol=1e-4)


def test_rollouts_are_shared_out_and_reduced(shared_run: tuple[Path, str], run_alone: Path):
    folder, _ = shared_run
    ours, theirs = (table(each / "eval.csv") for each in (folder, run_alone))
    played = [[(row["step"], row["actor"], row["seed"]) for row in rows] for rows in (ours, theirs)]
    assert played[0] == played[1]
    final = [float(row["return"]) for row in ours if (row["step"], row["actor"]) == ("90", "policy")]
    scores = json.loads((folder / "results.json").read_text())["scores"]
    assert scores["episodes"] == len(final) == 3
    np.testing.assert_allclose(scores["return_mean"], np.mean(final))
    np.testing.assert_allclose(scores["return_std"], np.std(final), atol=1e-6)


def test_resuming_with_the_same_number_of_ranks_is_exact(shared_run: tuple[Path, str], tmp_path: Path):
    whole, _ = shared_run
    folder = run_folder(tmp_path)
    shutil.copytree(whole, folder)
    _, err = run(
        ["fit", f"--ckpt_path={folder}/checkpoints/step_0000040.ckpt", f"--trainer.default_root_dir={tmp_path}"]
    )
    assert "warning" not in err
    one, other = load(whole), load(folder)
    assert one["callbacks"]["DistributedTraining"] == {"ranks": 2}
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    assert torch.equal(one["offrl"]["noise"], other["offrl"]["noise"])
    assert table(whole / "eval.csv") == table(folder / "eval.csv")


def test_resuming_with_another_number_of_ranks_warns_and_goes_on(
    shared_run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole, _ = shared_run
    folder = run_folder(tmp_path)
    shutil.copytree(whole, folder)
    alone = ["--trainer.devices=1", "--trainer.strategy=auto", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", f"--ckpt_path={folder}/checkpoints/step_0000040.ckpt", *alone]) == 0
    assert "warning: the checkpoint was made by 2 rank(s), 1 go on" in capsys.readouterr().err
    assert load(folder)["global_step"] == 90
    assert difference(load(folder)["state_dict"], load(whole)["state_dict"]) < 1e-4  # float32, 50 steps


LONG = ("--trainer.max_steps=100000", "--data.block_size=10", "--model.init_args.pretrain_steps=100000")


@contextmanager
def long_run(root: Path, *extra: str) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """Start a run of two ranks that does not end by itself; yield it, the second rank's process and the run folder."""
    folder = root / "qgpo" / "data" / "seed_0"
    options = (*LONG, *TWO, "--checkpoint.keep_every_n_epochs=0", *extra)
    with started(made_up.words(root, "QGPO", *options)) as process:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (second,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield process, int(second), folder


def test_a_request_to_stop_on_one_rank_stops_all(tmp_path: Path):
    with long_run(tmp_path / "runs") as (process, second, folder):
        os.kill(second, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert out.count("go on with") == 1
    assert "Traceback" not in err
    results = json.loads((folder / "results.json").read_text())
    assert (results["status"], results["gradient_steps"]) == ("interrupted", load(folder)["global_step"])


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("rank", "blow"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_the_job(tmp_path: Path, rank: int, blow: signal.Signals):
    timeout = 600 if blow == signal.SIGKILL else 30  # of a rank that waits for another; death is noticed at once
    with long_run(tmp_path / "runs", f"--distributed.timeout_s={timeout}") as (process, second, folder):
        struck = time.monotonic()
        os.kill(second if rank else process.pid, blow)
        assert process.wait(timeout=120) != 0
        while blow == signal.SIGKILL and is_running(second):
            assert time.monotonic() < struck + 60
            time.sleep(0.05)
        print(f"the job had ended {time.monotonic() - struck:.1f} s after {blow.name} to rank {rank}")
        if blow == signal.SIGSTOP:
            os.kill(second, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    if rank and process.returncode != -signal.SIGKILL:  # by Lightning's launcher, if it looked first
        assert process.returncode == 1
        assert "error: another rank has died or hangs; the last checkpoint is intact" in err
    assert load(folder)["global_step"] >= 10


@pytest.mark.slow
def test_torchrun(tmp_path: Path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    out, _ = run(made_up.words(tmp_path / "runs", "QGPO", *TWO), *launcher)
    assert out.count("finished 60 gradient steps") == out.count("shared by 2 ranks") == 1
    assert made_up.checkpoints(tmp_path / "runs").joinpath("step_0000060.ckpt").exists()


@pytest.mark.slow
def test_slurm(tmp_path: Path):
    words = made_up.words(tmp_path / "runs", "QGPO", *TWO)
    job = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NODEID": "0",
        "MASTER_PORT": str(free_port()),
    }
    tasks = [{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    with started(words, **tasks[0]) as first, started(words, **tasks[1]) as second:
        outputs = [process.communicate(timeout=180) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert "shared by 2 ranks" in outputs[0][0]
    assert outputs[1][0] == ""
    # another number of devices than of tasks: Lightning knows SLURM's settings
    with started([*words, "--trainer.devices=3", "--data.batch_size=12", "--overwrite=true"], **tasks[0]) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "devices=3" in err
