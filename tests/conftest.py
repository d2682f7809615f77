"""Shared fixtures: a small dataset collected in the real environment, and a tiny training command on it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

os.environ["LIT_OFFRL_TRACEBACK"] = "1"  # an exception that nothing explains must not hide behind its line

# The campaign of faults (`pytest -m faults`) tries more than the default run, and other values each time.
settings.register_profile("quick", max_examples=6, deadline=None, derandomize=True, database=None)
settings.register_profile("faults", max_examples=60, deadline=None, database=None, print_blob=True)

DATASET = "offrl/pointmaze/umaze-v0"
TALLY_FILE = pytest.StashKey[str]()
REPOSITORY = Path(__file__).parent.parent


def is_campaign(config: pytest.Config) -> bool:
    return "faults" in config.option.markexpr and "not faults" not in config.option.markexpr


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the campaign run all tests of its files, those of the default run included."""
    for item in items:
        if is_campaign(config) and item.path.name.startswith("test_faults"):
            item.add_marker("faults")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("faults" if is_campaign(config) else "quick")
    if is_campaign(config) and "LIT_OFFRL_TALLY" not in os.environ:  # workers inherit it
        handle, os.environ["LIT_OFFRL_TALLY"] = tempfile.mkstemp(prefix="tally_")
        os.close(handle)
        config.stash[TALLY_FILE] = os.environ["LIT_OFFRL_TALLY"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tries and passes of the campaign."""
    tally = config.stash.get(TALLY_FILE, None)
    if tally is None:
        return
    kinds: dict[str, list[int]] = {}
    for line in Path(tally).read_text().splitlines():
        passed, _, kind = line.partition(" ")
        kinds.setdefault(kind, []).append(int(passed))
    terminalreporter.section("campaign of faults")
    for kind, results in sorted(kinds.items()):
        terminalreporter.write_line(f"{kind:45} {len(results):5} tries {sum(results):5} passes")
    everything = [each for results in kinds.values() for each in results]
    terminalreporter.write_line(f"{'all':45} {len(everything):5} tries {sum(everything):5} passes")
    Path(tally).unlink()


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)  # the networks of the tests are too small for more
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # nor may the commands that they start wait for one another


@pytest.fixture(scope="session", autouse=True)
def _no_files_left(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[None]:
    """Check that the tests, and the processes that they start, leave no files in the temporary folder."""
    assert pytestconfig.cache is not None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(pytestconfig.cache.mkdir("torchinductor"))  # kept for the next time
    folder = tmp_path_factory.mktemp("t", numbered=False)  # a short name, because the paths of sockets must be short
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    yield
    assert not [path.name for path in folder.iterdir() if path.is_file()]


@pytest.fixture(scope="session")
def minari_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Minari root of the tests' own, with a small collected dataset."""
    root = tmp_path_factory.mktemp("minari")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["D4RL_DATASET_DIR"] = str(tmp_path_factory.mktemp("d4rl"))
    os.environ["OGBENCH_DATASET_DIR"] = str(tmp_path_factory.mktemp("ogbench"))
    os.environ["LIT_OFFRL_D4RL_URL"] = os.environ["LIT_OFFRL_OGBENCH_URL"] = "http://127.0.0.1:9/"  # nobody answers
    from lit_offrl.collect.recorder import collect_dataset

    collect_dataset(DATASET, steps=1500, seed=0, processes=1, progress=False)
    return root


def tiny_words(root: Path, *extra: str, command: str = "fit") -> list[str]:
    """Return the words of a tiny training: 90 steps, 30 of them pretraining, epochs of 40."""
    options = {
        "data.dataset": DATASET,
        "data.batch_size": 8,
        "data.block_size": 7,
        "data.steps_per_epoch": 40,
        "data.reward": "minus_one",
        "data.normalize_observations": True,
        "model": "DTQL",
        "model.init_args.hidden_dim": 16,
        "model.init_args.critic.hidden_dim": 16,
        "model.init_args.acting.candidates": 3,
        "model.init_args.nll_weight": 1.0,
        "model.init_args.behavior_sampling_steps": 2,
        "model.init_args.pretrain_steps": 30,
        "evaluation.episodes": 2,
        "evaluation.final_episodes": 3,
        "evaluation.num_envs": 2,
        "trainer.max_steps": 90,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": root,
        "trainer.enable_progress_bar": False,
        "checkpoint.keep_every_n_epochs": 1,
    }
    return [command, *(f"--{name}={value}" for name, value in options.items()), *extra]


@pytest.fixture
def tiny(minari_root: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`tiny_words` with the dataset in place and, unless told otherwise, a root of the test's own."""

    def words(*extra: str, command: str = "fit", root: Path = tmp_path / "runs") -> list[str]:
        return tiny_words(root, *extra, command=command)

    return words


def run_folder(root: Path, seed: int = 0) -> Path:
    return root / "dtql" / DATASET / f"seed_{seed}"
