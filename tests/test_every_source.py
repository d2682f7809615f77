"""DTQL trained on one dataset of each source, and scored in the real environment."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pyarrow
import pytest
from conftest import tiny_words
from minari.data_collector import EpisodeBuffer
from pyarrow import parquet
from tiny import tiny_options

from lit_offrl.cli import main
from lit_offrl.data.sources.d4rl import D4RL_FILES

ENVIRONMENT = "Hopper-v5"
NAMED = f"--data.environment={ENVIRONMENT}"
EPISODES = 6
OGBENCH = "ogbench/pointmaze-medium-navigate-singletask-v0"
Log = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def log() -> list[Log]:
    """Random hops; all end in falls. Observations are T + 1."""
    env = gymnasium.make(ENVIRONMENT)
    env.action_space.seed(0)
    episodes = []
    for seed in range(EPISODES):
        observations, actions, rewards, fell = [env.reset(seed=seed)[0]], [], [], False
        while not fell:
            actions.append(env.action_space.sample())
            observation, reward, fell, _, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
        ends = np.arange(1, len(actions) + 1) == len(actions)
        episodes.append(
            {
                "observations": np.array(observations),
                "actions": np.array(actions),
                "rewards": np.array(rewards),
                "terminals": ends,
                "timeouts": np.zeros_like(ends),
            }
        )
    return episodes


def flat(log: list[Log]) -> Log:
    columns = {key: np.concatenate([episode[key] for episode in log]) for key in log[0] if key != "observations"}
    return columns | {"observations": np.concatenate([episode["observations"][:-1] for episode in log])}


def npz(log: list[Log], folder: Path) -> str:
    np.savez(folder / "log.npz", **flat(log))
    return str(folder / "log.npz")


def hdf5(log: list[Log], folder: Path) -> str:
    path = folder / "log.hdf5"
    with h5py.File(path, "w") as file:
        for key, array in flat(log).items():
            file[key] = array
    return str(path)


def episode_folder(log: list[Log], folder: Path) -> str:
    (folder / "episodes").mkdir()
    for index, episode in enumerate(log):
        np.savez(folder / "episodes" / f"{index}.npz", **episode)
    return str(folder / "episodes")


def csv(log: list[Log], folder: Path) -> str:
    """One table with the number of the episode; 17 digits keep a number of double precision."""
    arrays = flat(log)
    episode = np.repeat(np.arange(len(log)), [len(each["rewards"]) for each in log])
    vectors = {f"{name}_{i}": column for name in ("observations", "actions") for i, column in enumerate(arrays[name].T)}
    columns = {**vectors, "reward": arrays["rewards"], "terminal": arrays["terminals"], "episode": episode}
    table = np.column_stack([*columns.values()])
    np.savetxt(folder / "log.csv", table, "%.17g", delimiter=",", header=",".join(columns), comments="")
    return str(folder / "log.csv")


def lerobot(log: list[Log], folder: Path) -> str:
    """The layout of version 3, with a column per vector."""
    arrays = flat(log)
    columns = {
        "observation.state": arrays["observations"].astype(np.float32),
        "action": arrays["actions"].astype(np.float32),
        "next.reward": arrays["rewards"].astype(np.float32),
        "next.done": arrays["terminals"],
        "episode_index": np.repeat(np.arange(len(log)), [len(each["rewards"]) for each in log]),
    }
    features = {
        name: {"dtype": str(array.dtype), "shape": [*array.shape[1:]] or [1]} for name, array in columns.items()
    }
    info = {"codebase_version": "v3.0", "total_frames": len(arrays["rewards"]), "features": features}
    (folder / "robot" / "meta").mkdir(parents=True)
    (folder / "robot" / "meta" / "info.json").write_text(json.dumps(info))
    (folder / "robot" / "data" / "chunk-000").mkdir(parents=True)
    table = pyarrow.table({name: array.tolist() for name, array in columns.items()})
    parquet.write_table(table, folder / "robot" / "data" / "chunk-000" / "file-000.parquet")
    return str(folder / "robot")


def robomimic(log: list[Log], folder: Path) -> str:
    with h5py.File(folder / "low_dim.hdf5", "w") as file:
        for index, episode in enumerate(log):
            demo = file.create_group(f"data/demo_{index}")
            demo["obs/state"], demo["next_obs/state"] = episode["observations"][:-1], episode["observations"][1:]
            demo["actions"], demo["rewards"] = episode["actions"], episode["rewards"]
            demo["dones"] = episode["terminals"].astype(np.int64)
    return str(folder / "low_dim.hdf5")


def d4rl(log: list[Log], folder: Path) -> str:
    Path(hdf5(log, folder)).rename(folder / Path(D4RL_FILES["hopper-random-v2"]).name)
    return "hopper-random-v2"


def minari_dataset(log: list[Log], folder: Path, data_format: str) -> str:
    dataset = f"tests/{data_format}/hops-v0"
    buffers = [
        EpisodeBuffer(
            id=index,
            observations=episode["observations"],
            actions=episode["actions"],
            rewards=episode["rewards"],
            terminations=episode["terminals"],
            truncations=episode["timeouts"],
        )
        for index, episode in enumerate(log)
    ]
    minari.create_dataset_from_buffers(
        dataset,
        buffers,
        env=gymnasium.make(ENVIRONMENT),
        ref_min_score=0.0,
        ref_max_score=100.0,
        data_format=data_format,
    )
    return dataset


SOURCES = {
    "npz": (npz, "file", [NAMED], None),
    "hdf5": (hdf5, "file", [NAMED], None),
    "folder": (episode_folder, "file", [NAMED], None),
    "csv": (csv, "file", [NAMED], None),
    "lerobot": (lerobot, "file", [NAMED], None),
    "robomimic": (robomimic, "file", [NAMED], None),
    "in-d4rl": (npz, "file", ["--data.environment=D4RL/hopper-v2"], None),
    "d4rl": (d4rl, "d4rl", [], "d4rl"),
    "minari-hdf5": (lambda log, folder: minari_dataset(log, folder, "hdf5"), "minari", [], "minari"),
    "minari-arrow": (lambda log, folder: minari_dataset(log, folder, "arrow"), "minari", [], "minari"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_dtql_trains_on_it(kind: str, log: list[Log], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write, source, options, reference = SOURCES[kind]
    dataset = write(log, tmp_path)
    once = "--trainer.check_val_every_n_epoch=100"  # at the end of training only
    assert main(tiny_words(tmp_path / "runs", f"--data.dataset={dataset}", "--data.reward=raw", once, *options)) == 0
    (path,) = (tmp_path / "runs").rglob("results.json")
    results = json.loads(path.read_text())
    assert results["dataset_source"] == source
    assert results["gradient_steps"] == 90
    assert results["scores"]["episodes"] == 3
    assert results["scores"]["return_mean"] > 0
    assert results["score_reference"]["name"] == reference
    rules = "d4rl-1" if "d4rl" in kind else "minari" if "minari" in kind else "own"
    assert results["protocol"]["rules"] == rules
    assert results["protocol"]["mujoco2_contacts"] is (True if rules == "d4rl-1" else None)
    # Only D4RL's rules lose a transition here: the file's last row.
    assert results["transitions"] == sum(len(episode["rewards"]) for episode in log) - (kind == "d4rl")


@pytest.mark.parametrize("algorithm", ["DTQL", "QC"])
def test_a_file_of_ogbench(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two walks of the point, each over the goal and on; the score is of successes, not of returns."""
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    x = np.concatenate([np.linspace(start, start + 10, 51) for start in (15, 16)])
    positions = np.stack([x, np.full_like(x, 20)], axis=1).astype(np.float32)
    np.savez(
        tmp_path / "pointmaze-medium-navigate-v0.npz",
        observations=positions,
        actions=np.tile(np.float32([1, 0]), (102, 1)),
        terminals=np.arange(102) % 51 == 50,
        qpos=positions,
        qvel=np.zeros_like(positions),
    )
    options = {
        "model": algorithm,
        **{f"model.init_args.{name}": value for name, value in tiny_options(algorithm).items()},
        "data.dataset": OGBENCH,
        "data.batch_size": 8,
        "evaluation.final_episodes": 3,
        "evaluation.max_episode_steps": 20,
        "trainer.max_steps": 60,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": tmp_path / "runs",
        "trainer.enable_progress_bar": False,
    }
    assert main(["fit", *(f"--{name}={value}" for name, value in options.items())]) == 0
    (path,) = (tmp_path / "runs").rglob("results.json")
    results = json.loads(path.read_text())
    assert results["transitions"] == 100
    assert results["dataset_source"] == "ogbench"
    assert results["dataset_return_mean"] == -(50 - 11), (
        "11 states of a walk lie within 1 of the goal, the others pay -1"
    )
    assert results["score_reference"] == {"name": "ogbench", "min": 0, "max": 1, "measure": "success"}
    assert results["protocol"]["rules"] == "ogbench-1.2"
    assert results["protocol"]["environment"] == "ogbench/pointmaze-medium-singletask-v0"
    assert results["scores"]["normalized"] == 100 * results["scores"]["success_rate"]
    rows = (path.parent / "eval.csv").read_text().splitlines()
    assert all(float(row.split(",")[-1]) == 100 * float(row.split(",")[-2]) for row in rows[1:])
