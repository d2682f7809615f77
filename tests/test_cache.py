"""The flat cache: when it is used, when it is not, and what is left behind where it cannot be written."""

from __future__ import annotations

import json
import os
import resource
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest

from lit_offrl.data import sources
from lit_offrl.data.formats.cache import source_sha256
from lit_offrl.data.transitions import Transitions

EPISODES, STEPS = 40, 25


def write_minari(path: Path, seed: int = 0, steps: int = STEPS, width: int = 5) -> Path:
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        for i in range(EPISODES):
            group = file.create_group(f"episode_{i}")
            group["observations"] = rng.normal(size=(steps + 1, width))
            group["actions"] = rng.normal(size=(steps, 2)).astype(np.float32)
            group["rewards"] = rng.normal(size=steps)
            group["terminations"] = np.zeros(steps, bool)
            group["truncations"] = np.arange(steps) == steps - 1
    return path


def write_flat(path: Path, n: int = EPISODES * STEPS, width: int = 5, dtype: type = np.float32) -> Path:
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(n, width)).astype(dtype),
        "actions": rng.normal(size=(n, 2)).astype(dtype),
        "rewards": rng.normal(size=n).astype(dtype),
        "terminals": np.zeros(n, bool),
        "timeouts": np.arange(n) % STEPS == STEPS - 1,
    }
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    return path


def write_folder(path: Path) -> Path:
    path.mkdir()
    for i in range(3):
        np.savez(path / f"{i}.npz", observations=np.full((4, 2), i), actions=np.zeros((3, 1)), rewards=np.zeros(3))
    return path


def cache_of(source: Path) -> Path:
    return source.with_name(source.name + ".cache.npz")


def load(source: Path) -> Transitions:
    return sources.load(str(source))[0]


def mark(cache: Path) -> None:
    """Change a reward in the cache, so that one can see where a table came from."""
    with np.load(cache) as file:
        content = {name: file[name] for name in file.files}
    content["rewards"][0] = 12345
    np.savez(cache, **content)


def is_marked(transitions: Transitions) -> bool:
    return bool(transitions.rewards[0] == 12345)


def assert_equal(first: Transitions, second: Transitions) -> None:
    for name, array in first.arrays().items():
        np.testing.assert_array_equal(getattr(second, name), array)
        assert getattr(second, name).dtype == array.dtype


WRITERS: dict[str, Callable[[Path], Path]] = {
    "minari.hdf5": write_minari,
    "flat.h5": write_flat,
    "episodes": write_folder,
}


@pytest.fixture(params=WRITERS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path / request.param)


def test_the_second_load_reads_the_cache(source: Path):
    first, info = sources.load(str(source))
    assert cache_of(source).is_file()
    second, again = sources.load(str(source))
    assert_equal(first, second)
    assert again == info
    assert info.sha256 == source_sha256(source)
    mark(cache_of(source))
    assert is_marked(load(source))


def test_the_digest_is_that_of_the_file(tmp_path: Path):
    import hashlib

    path = write_flat(tmp_path / "flat.hdf5")
    assert sources.load(str(path))[1].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_observation_keys_are_remembered(tmp_path: Path):
    path = write_minari(tmp_path / "minari.hdf5")
    with h5py.File(path, "a") as file:
        for group in file.values():
            del group["observations"]
            group["observations/speed"] = np.zeros((STEPS + 1, 1))
            group["observations/place"] = np.ones((STEPS + 1, 1))
    for _ in range(2):
        assert sources.load(str(path))[1].observation_keys == ("place", "speed")


def test_a_changed_source_is_read_again(source: Path):
    load(source)
    mark(cache_of(source))
    changed = source if source.is_file() else source / "1.npz"
    status = changed.stat()
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert not is_marked(load(source))
    mark(cache_of(source))
    assert is_marked(load(source)), "and the cache is new"


def test_another_episode_in_a_folder_is_seen(tmp_path: Path):
    folder = write_folder(tmp_path / "episodes")
    assert len(load(folder)) == 9
    np.savez(folder / "3.npz", observations=np.zeros((4, 2)), actions=np.zeros((3, 1)), rewards=np.zeros(3))
    assert len(load(folder)) == 12


def truncated(cache: Path) -> None:
    cache.write_bytes(cache.read_bytes()[: cache.stat().st_size // 2])


def altered(cache: Path) -> None:
    content = bytearray(cache.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(8)
    cache.write_bytes(content)


def of_another_version(cache: Path) -> None:
    with np.load(cache) as file:
        content = {name: file[name] for name in file.files}
    header = json.loads(content["header"].tobytes()) | {"version": -1}
    np.savez(cache, **{**content, "header": np.frombuffer(json.dumps(header).encode(), np.uint8)})


@pytest.mark.parametrize(
    "damage", [truncated, altered, of_another_version, lambda cache: cache.write_bytes(b""), lambda c: np.savez(c, a=1)]
)
def test_a_broken_cache_is_replaced(tmp_path: Path, damage: Callable[[Path], None]):
    path = write_flat(tmp_path / "flat.hdf5")
    first = load(path)
    damage(cache_of(path))
    assert_equal(first, load(path))
    mark(cache_of(path))
    assert is_marked(load(path))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_flat(tmp_path / "flat.hdf5")
    with full_disk(20_000):
        transitions = load(path)
    assert len(transitions) == EPISODES * (STEPS - 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["flat.hdf5"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "flat.hdf5.cache.npz cannot be written" in lines[0]


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A folder in the cache's place, since a test that runs as root is stopped by no permission."""
    path = write_flat(tmp_path / "flat.hdf5")
    cache_of(path).mkdir()
    assert len(load(path)) == EPISODES * (STEPS - 1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["flat.hdf5", "flat.hdf5.cache.npz"]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_plain_arrays_need_no_cache(tmp_path: Path):
    path = write_flat(tmp_path / "flat.npz")
    load(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["flat.npz"]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("minari.hdf5", lambda path: write_minari(path, steps=1000, width=20)),
        ("flat.hdf5", lambda path: write_flat(path, 40_000, 20)),
        ("flat64.hdf5", lambda path: write_flat(path, 40_000, 20, np.float64)),
        ("flat64.npz", lambda path: write_flat(path, 40_000, 20, np.float64)),
    ],
)
def test_loading_needs_little_more_memory_than_the_table(tmp_path: Path, name: str, write: Callable[[Path], Path]):
    path = write(tmp_path / name)
    load(write_flat(tmp_path / "first.hdf5"))  # what is imported on the way is not counted
    for _ in range(2):
        tracemalloc.start()
        transitions = load(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        size = sum(array.nbytes for array in transitions.arrays().values())
        assert peak < 2.5 * size
