"""Fuzzing of data: truncations and flipped bits in every format, anything in every field of metadata. See FAULTS.md."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import DATASET
from faults import BANDIT, survives, trial
from hypothesis import given
from hypothesis import strategies as st

from lit_offrl.cli import main
from lit_offrl.data import sources
from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.envs.make import environment_for
from lit_offrl.errors import UserError
from lit_offrl.run_folder import RunFolder

ROWS = 60


def flat_arrays() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "observations": generator.normal(size=(ROWS, 3)).astype(np.float32),
        "actions": generator.uniform(-1, 1, (ROWS, 2)).astype(np.float32),
        "rewards": generator.normal(size=ROWS),
        "terminals": np.arange(ROWS) % 10 == 9,
        "timeouts": np.zeros(ROWS, bool),
    }


def npz(folder: Path) -> tuple[str, Path]:
    np.savez(folder / "log.npz", **flat_arrays())
    return str(folder / "log.npz"), folder / "log.npz"


def hdf5(folder: Path) -> tuple[str, Path]:
    with h5py.File(folder / "log.hdf5", "w") as file:
        for name, array in flat_arrays().items():
            file.create_dataset(name, data=array, compression="gzip")
    return str(folder / "log.hdf5"), folder / "log.hdf5"


def d4rl(folder: Path) -> tuple[str, Path]:
    _, file = hdf5(folder)
    return "hopper-medium-v2", file.rename(folder / "hopper_medium-v2.hdf5")


def episodes(folder: Path) -> tuple[str, Path]:
    (folder / "episodes").mkdir()
    for i in range(2):
        np.savez(folder / "episodes" / f"{i}.npz", **flat_arrays())
    return str(folder / "episodes"), folder / "episodes" / "1.npz"


def minari_hdf5(folder: Path, dataset: str = "some/data-v0") -> tuple[str, Path]:
    data = folder / dataset / "data"
    data.mkdir(parents=True)
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for i in range(3):
            group = file.create_group(f"episode_{i}")
            for name, array in flat_arrays().items():
                minari = {"terminals": "terminations", "timeouts": "truncations"}.get(name, name)
                extra = array[:1] if name == "observations" else array[:0]
                group[minari] = np.concatenate([array, extra])
    (data / "metadata.json").write_text(json.dumps(METADATA))
    return dataset, data / "main_data.hdf5"


def minari_arrow(folder: Path, suffix: str = "arrow") -> tuple[str, Path]:
    import pyarrow
    from pyarrow import ipc, parquet

    data = folder / "some" / "data-v0" / "data"
    arrays = flat_arrays()
    arrays = {"terminations": arrays.pop("terminals"), "truncations": arrays.pop("timeouts"), **arrays}

    def column(array: Any) -> Any:
        flat = pyarrow.array(array.ravel())
        return flat if array.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(flat, array.shape[1])

    table = pyarrow.table({name: column(array) for name, array in arrays.items()})
    for i in range(2):
        (data / str(i)).mkdir(parents=True)
        if suffix == "arrow":
            with ipc.new_file(str(data / str(i) / "data.arrow"), table.schema) as writer:
                writer.write_table(table)
        else:
            parquet.write_table(table, data / str(i) / "data.parquet")
    (data / "metadata.json").write_text(json.dumps({**METADATA, "data_format": suffix}))
    return "some/data-v0", data / "1" / f"data.{suffix}"


def minari_parquet(folder: Path) -> tuple[str, Path]:
    return minari_arrow(folder, "parquet")


def frames() -> tuple[Any, dict[str, Any]]:
    """Return the arrays as a table with a column of vectors, and LeRobot's description of it."""
    import pyarrow

    arrays = flat_arrays()
    columns = {
        "observation.state": pyarrow.array(arrays["observations"].tolist()),
        "action": pyarrow.array(arrays["actions"].tolist()),
        "next.reward": pyarrow.array(arrays["rewards"]),
        "episode_index": pyarrow.array(np.arange(ROWS) // 10),
    }
    shapes = {"observation.state": [3], "action": [2], "next.reward": [1], "episode_index": [1]}
    features = {
        key: {"dtype": "int64" if key == "episode_index" else "float32", "shape": shapes[key]} for key in shapes
    }
    return pyarrow.table(columns), {"codebase_version": "v3.0", "total_frames": ROWS, "features": features}


def one_parquet(folder: Path) -> tuple[str, Path]:
    from pyarrow import parquet

    parquet.write_table(frames()[0], folder / "log.parquet")
    return str(folder / "log.parquet"), folder / "log.parquet"


def one_csv(folder: Path) -> tuple[str, Path]:
    arrays = flat_arrays()
    columns = np.column_stack(
        [*arrays["observations"].T, *arrays["actions"].T, arrays["rewards"], np.arange(ROWS) // 10]
    )
    header = "obs_0,obs_1,obs_2,action_0,action_1,reward,episode"
    np.savetxt(folder / "log.csv", columns, delimiter=",", header=header, comments="")
    return str(folder / "log.csv"), folder / "log.csv"


def lerobot(folder: Path) -> tuple[str, Path]:
    from pyarrow import parquet

    rows, info = frames()
    file = folder / "robot" / "data" / "chunk-000" / "file-000.parquet"
    file.parent.mkdir(parents=True)
    parquet.write_table(rows, file)
    (folder / "robot" / "meta").mkdir()
    (folder / "robot" / "meta" / "info.json").write_text(json.dumps(info))
    return str(folder / "robot"), file


def robomimic(folder: Path) -> tuple[str, Path]:
    arrays = flat_arrays()
    with h5py.File(folder / "low_dim.hdf5", "w") as file:
        for i in range(2):
            demo = file.create_group(f"data/demo_{i}")
            demo["obs/object"] = demo["next_obs/object"] = arrays["observations"]
            demo["actions"], demo["rewards"] = arrays["actions"], arrays["rewards"]
            demo["dones"] = np.arange(ROWS) == ROWS - 1
    return str(folder / "low_dim.hdf5"), folder / "low_dim.hdf5"


METADATA = {
    "data_format": "hdf5",
    "observation_keys": None,
    "env_spec": json.dumps({"id": "Hopper-v5", "kwargs": {}, "max_episode_steps": 100}),
    "eval_env_spec": None,
    "action_space": json.dumps({"type": "Box", "shape": [2], "low": [-2.0, -2.0], "high": [2.0, 2.0]}),
    "ref_min_score": 0.0,
    "ref_max_score": 10.0,
}
MINARI = (minari_hdf5, minari_arrow, minari_parquet)
LOGS = (one_csv, one_parquet, lerobot, robomimic)
FORMATS = {each.__name__: each for each in (npz, hdf5, d4rl, episodes, *MINARI, *LOGS)}


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("MINARI_DATASETS_PATH", "D4RL_DATASET_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def loads_or_says_why(dataset: str) -> bool:
    try:
        transitions, _ = sources.load(dataset)
    except UserError:
        return False
    assert len(transitions) > 0
    return True


def remove_caches(folder: Path) -> None:
    for file in folder.rglob("*.cache.npz"):
        file.unlink()


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_bytes(name: str, roots: Path, capfd: pytest.CaptureFixture[str]):
    """Truncated anywhere, some bits flipped, a stretch overwritten."""
    dataset, file = FORMATS[name](roots)
    assert loads_or_says_why(dataset)
    whole = file.read_bytes()

    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        damaged = bytearray(whole)
        kind = data.draw(st.sampled_from(["truncated", "bits", "overwritten"]))
        if kind == "truncated":
            del damaged[data.draw(st.integers(0, len(whole) - 1)) :]
        elif kind == "bits":
            # Bits of headers are as likely as those of the much longer arrays.
            place = st.one_of(st.integers(0, 8 * min(len(whole), 2000) - 1), st.integers(0, 8 * len(whole) - 1))
            for bit in data.draw(st.lists(place, min_size=1, max_size=5)):
                damaged[bit // 8] ^= 1 << bit % 8
        else:
            begin = data.draw(st.integers(0, len(whole) - 1))
            piece = data.draw(st.binary(min_size=1, max_size=64))
            damaged[begin : begin + len(piece)] = piece
        file.write_bytes(bytes(damaged))
        remove_caches(roots)
        with trial(f"damaged bytes, {name}"):
            loads_or_says_why(dataset)

    attempt()


def test_a_damaged_cache_is_made_anew(roots: Path, capfd: pytest.CaptureFixture[str]):
    dataset, file = hdf5(roots)
    assert loads_or_says_why(dataset)
    cache = file.with_name(file.name + ".cache.npz")
    whole = cache.read_bytes()
    expected = sources.load(dataset)[0].rewards.tolist()

    @given(st.integers(0, 8 * len(whole) - 1), st.booleans())
    def attempt(bit: int, truncates: bool) -> None:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        cache.write_bytes(bytes(damaged[: bit // 8] if truncates else damaged))
        with trial("damaged cache"):
            assert sources.load(dataset)[0].rewards.tolist() == expected

    attempt()


ANY_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@pytest.mark.parametrize("field", sorted(METADATA))
def test_anything_in_a_field_of_metadata(field: str, roots: Path):
    dataset, file = minari_hdf5(roots)
    nested = field in ("env_spec", "eval_env_spec", "action_space")
    base = json.loads(METADATA[field] or METADATA["env_spec"]) if nested else {}

    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        value = data.draw(ANY_JSON)
        if nested and data.draw(st.booleans()):  # one entry of the field's own table
            value = {**base, data.draw(st.sampled_from(sorted(base))): value}
            value = json.dumps(value) if data.draw(st.booleans()) else value
        (file.parent / "metadata.json").write_text(json.dumps({**METADATA, field: value}))
        with trial("fields of metadata"):
            if loads_or_says_why(dataset):
                module = D4RLDataModule(dataset)
                assert module.action_units[0].isfinite().all()
                with suppress(UserError):
                    environment_for(module.info)

    attempt()


@pytest.mark.parametrize("field", ["total_frames", "features", "observation.state", "shape"])
def test_anything_in_the_description_of_a_lerobot_folder(field: str, roots: Path):
    dataset, _ = lerobot(roots)
    file = roots / "robot" / "meta" / "info.json"
    whole = json.loads(file.read_text())

    @given(ANY_JSON)
    def attempt(value: Any) -> None:
        info = json.loads(json.dumps(whole))
        places = {"observation.state": info["features"], "shape": info["features"]["observation.state"]}
        places.get(field, info)[field] = value
        file.write_text(json.dumps(info))
        with trial("fields of metadata"):
            loads_or_says_why(dataset)

    attempt()


def test_anything_as_metadata(roots: Path):
    dataset, file = minari_hdf5(roots)

    @given(st.one_of(st.binary(max_size=40), ANY_JSON.map(lambda tree: json.dumps(tree).encode())))
    def attempt(text: bytes) -> None:
        (file.parent / "metadata.json").write_bytes(text)
        with trial("fields of metadata"):
            loads_or_says_why(dataset)

    attempt()


@pytest.mark.parametrize("name", ["[" * 3000, "x" * 5000, ".", "", "../..", "a\0b", "offrl/../../x-v0", "bandit/"])
def test_hostile_names_of_datasets(name: str, roots: Path, capfd: pytest.CaptureFixture[str]):
    with trial("names of datasets"):
        words = [*BANDIT, f"--data.dataset={name}", f"--trainer.default_root_dir={roots}/runs"]
        assert survives(words, roots, capfd)[0] == 2


@pytest.mark.parametrize("dataset", [DATASET])
def test_a_dataset_with_the_wrong_digest_is_refused(
    dataset: str, minari_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    digest = sources.load(dataset)[1].sha256
    assert D4RLDataModule(dataset, sha256=digest).info.sha256 == digest
    own = [f"--data.dataset={dataset}", f"--data.sha256={'0' * 64}", f"--trainer.default_root_dir={tmp_path}"]
    words = [*BANDIT, *own]
    code, line = survives(words, tmp_path, capfd)
    assert code == 2
    assert "data.sha256" in line


def test_names_of_code_in_metadata_are_refused(roots: Path):
    dataset, file = minari_hdf5(roots)
    spec = {"id": "antigravity:Env-v0", "kwargs": {}}
    (file.parent / "metadata.json").write_text(json.dumps({**METADATA, "env_spec": spec}))
    with pytest.raises(UserError, match="names code"):
        sources.load(dataset)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    assert main([*BANDIT, f"--trainer.default_root_dir={root}"]) == 0
    return root


@pytest.mark.parametrize("name", ["results.json", "metrics.csv", "config.yaml"])
def test_damaged_files_of_a_run(name: str, finished_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """`report` leaves such a run out, and `--ckpt_path auto` goes on or says why not."""
    root = tmp_path / "runs"
    shutil.copytree(finished_run, root)
    folder = RunFolder(next(root.rglob("seed_0")))
    whole = (folder.path / name).read_bytes()

    @given(st.one_of(st.binary(max_size=40), st.integers(0, len(whole)), ANY_JSON))
    def attempt(damage: Any) -> None:
        if isinstance(damage, bytes):
            text = damage
        elif type(damage) is int and 0 <= damage <= len(whole):
            text = whole[:damage]
        else:
            text = json.dumps(damage).encode()
        (folder.path / name).write_bytes(text)
        with trial(f"damaged {name}"):
            survives(["report", str(root), "--output", str(tmp_path / "report")], root, capfd)
            if name != "metrics.csv":
                survives([*BANDIT, f"--trainer.default_root_dir={root}", "--ckpt_path=auto"], root, capfd)

    attempt()
