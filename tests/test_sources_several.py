"""Several datasets as one, and a share of the episodes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATASET, tiny_words
from numpy.typing import NDArray

from lit_offrl.cli import main
from lit_offrl.data import sources
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.envs.make import environment_for
from lit_offrl.envs.protocol import protocol_of
from lit_offrl.envs.scores import reference_for
from lit_offrl.errors import UserError

EPISODES, LENGTH = 10, 5


def write(path: Path, seed: int, width: int = 3, **more: NDArray[np.bool_]) -> str:
    """Write episodes of five steps; the table's last step has no mark of its own."""
    generator, n = np.random.default_rng(seed), EPISODES * LENGTH
    ends = np.arange(n) % LENGTH == LENGTH - 1
    observations = generator.normal(size=(n, width))
    successors = np.roll(observations, -1, axis=0)
    successors[ends] = generator.normal(size=(EPISODES, width))
    arrays = {
        "observations": observations,
        "actions": generator.uniform(-1, 1, (n, 2)),
        "rewards": generator.normal(size=n),
        "next_observations": successors,
        "terminals": np.zeros(n, bool),
        "timeouts": ends & (np.arange(n) < n - 1),
    }
    np.savez(path, **(arrays | more))
    return str(path)


def test_episodes_that_go_on_after_terminal_steps_stay_whole_beside_others(tmp_path: Path):
    ends = np.arange(EPISODES * LENGTH) % LENGTH == LENGTH - 1
    solved = np.arange(EPISODES * LENGTH) % LENGTH == 2
    first = write(tmp_path / "a.npz", 0, ends=ends, terminals=solved, timeouts=ends)
    second = write(tmp_path / "b.npz", 1)
    table, _ = sources.load(f"[{first}, {second}]")
    np.testing.assert_array_equal(table.episode_starts, np.arange(0, 2 * EPISODES * LENGTH, LENGTH))


def test_two_files_are_one_table(tmp_path: Path):
    first, second = write(tmp_path / "a.npz", 0), write(tmp_path / "b.npz", 1)
    table, info = sources.load(f"[{first}, '{second}']")
    parts = [sources.load(path) for path in (first, second)]
    for name, array in table.arrays().items():
        both = np.concatenate([part.arrays()[name] for part, _ in parts])
        np.testing.assert_array_equal(array, both, err_msg=name)
    assert len(table.episode_starts) == 2 * EPISODES, "no episode goes on in the next file"
    other = sources.load(f"[{second}, {first}]")[1]
    assert len({info.sha256, other.sha256, *(part.sha256 for _, part in parts)}) == 4
    module = D4RLDataModule(f"[{first},{second}]", normalize_observations=True)
    observations = module.table()[0][:, :3]
    torch.testing.assert_close(observations.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(observations.std(0, correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_datasets_that_do_not_go_together(minari_root: Path, tmp_path: Path):
    first, wide = write(tmp_path / "a.npz", 0), write(tmp_path / "b.npz", 1, width=4)
    for names, complaint in (
        ([first, wide], "has 3 observation and 2 action dimensions, .* 4 observation and 2 action dimensions: train"),
        ([first], "must name two datasets or more"),
        ([first, first], "must name two datasets or more, each of them once"),
        ([first, ""], "must name two datasets or more"),
        ([first, "bandit/moons"], "bandit/moons is a 2-D set, which is trained on alone"),
        ([first, "nonsense"], "'nonsense' is no dataset id"),
        ([first, str(tmp_path / "c.npz")], "no file .*c.npz"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            sources.load(f"[{', '.join(names)}]")
        assert "\n" not in str(error.value)


def test_environment_and_reference_of_several(minari_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    alone = sources.load(DATASET)[1]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for copy in (DATASET, "offrl/pointmaze/again-v0", "mine/maze-v0", "mine/medium-v0"):
        shutil.copytree(minari_root / DATASET, tmp_path / copy)
    info = sources.load(f"[{DATASET}, offrl/pointmaze/again-v0]")[1]
    assert environment_for(info) == environment_for(alone)
    assert protocol_of(info, environment_for(info)) == protocol_of(alone, environment_for(alone))
    assert reference_for(info) == reference_for(alone) is not None
    assert info.observation_keys == alone.observation_keys
    assert reference_for(sources.load(f"[{DATASET}, mine/maze-v0]")[1]) is None, "one is measured here, one by others"
    metadata = tmp_path / "mine" / "medium-v0" / "data" / "metadata.json"
    metadata.write_text(metadata.read_text().replace("PointMaze_UMaze", "PointMaze_Medium"))
    with pytest.raises(
        UserError, match=r"is evaluated in PointMaze_UMaze.*, mine/medium-v0 PointMaze_Medium.*one by one"
    ):
        sources.load(f"[{DATASET}, mine/medium-v0]")
    own = f"[{write(tmp_path / 'a.npz', 0)}, {write(tmp_path / 'b.npz', 1)}]"
    named = D4RLDataModule(own, environment="Hopper-v5").info
    assert environment_for(named).env_id == "Hopper-v5"
    assert protocol_of(named, environment_for(named)).rules == "own"


def test_training_on_several_resumes_exactly(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    names = [write(tmp_path / f"{name}.npz", seed) for seed, name in enumerate("ab")]
    words = ["--evaluation.enabled=false", f"--data.dataset=[{', '.join(names)}]", "--data.reward=raw"]
    words += ["--data.steps_per_epoch=10", "--trainer.max_steps=20", "--model.init_args.pretrain_steps=5"]
    whole, parts = ([*tiny_words(tmp_path / each), *words] for each in ("whole", "parts"))
    assert main(whole) == 0
    assert main([*parts, "--trainer.max_steps=10"]) == 0
    assert main([*parts, "--ckpt_path=auto"]) == 0
    folders = [tmp_path / each / "dtql" / "a+b" / "seed_0" for each in ("whole", "parts")]
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert results[0]["transitions"] == 2 * EPISODES * LENGTH
    assert results[0]["dataset_sha256"] == sources.load(f"[{', '.join(names)}]")[1].sha256
    weights = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    write(tmp_path / "b.npz", 7)
    capfd.readouterr()
    assert main([*whole, "--ckpt_path=auto"]) == 2
    assert "was trained on other data of the name a+b" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------- a share of the episodes


def episodes_of(module: D4RLDataModule, held_out: bool = False) -> set[float]:
    """Return the first rewards of the episodes of a table, which tell them apart."""
    table, widths = module.table(held_out)
    return set(table[::LENGTH, sum(widths[:2])].tolist())


@pytest.fixture
def module(tmp_path: Path) -> Callable[..., D4RLDataModule]:
    path = write(tmp_path / "a.npz", 0)
    return lambda **options: D4RLDataModule(path, **options)


def test_a_share_of_the_episodes(module: Callable[..., D4RLDataModule]):
    shares = [episodes_of(module(episode_fraction=share)) for share in (0.01, 0.3, 0.5, 1.0)]
    assert [len(share) for share in shares] == [1, 3, 5, 10]
    assert shares[0] < shares[1] < shares[2] < shares[3], "a smaller share is part of a larger one"
    assert episodes_of(module(episode_fraction=0.3, seed=5)) == shares[1]


def test_a_share_leaves_the_held_out_episodes_as_they_are(module: Callable[..., D4RLDataModule]):
    held = episodes_of(module(validation_fraction=0.2), held_out=True)
    some = module(validation_fraction=0.2, episode_fraction=0.5)
    assert episodes_of(some, held_out=True) == held
    training = episodes_of(some)
    assert len(training) == 4
    assert not training & held
    assert training < episodes_of(module(validation_fraction=0.2))
