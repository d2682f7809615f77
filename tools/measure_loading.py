"""Measure how long datasets of a million transitions take to load, and how much memory loading needs.

    python tools/measure_loading.py [--transitions 1000000] [--folder DIR]

Writes a file of every format into a temporary folder and loads it twice, each time in a new process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

OBSERVATIONS, ACTIONS = 29, 8
SHAPES = {"long": 1000, "short": 83}  # steps per episode

LOAD = """
import re, sys, time
from pathlib import Path
import h5py, torch
from lit_offrl.data import sources, transitions
from lit_offrl.data.formats import d4rl, files

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before, begin = peak(), time.perf_counter()
table, _ = sources.load(sys.argv[1])
seconds = time.perf_counter() - begin
size = sum(array.nbytes for array in table.arrays().values())
print(len(table), seconds, (peak() - before) / size)
"""


def episodes(transitions: int, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield random episodes of `steps` steps each."""
    rng = np.random.default_rng(0)
    for _ in range(transitions // steps):
        yield {
            "observations": rng.standard_normal((steps + 1, OBSERVATIONS)),
            "actions": rng.standard_normal((steps, ACTIONS), np.float32),
            "rewards": rng.standard_normal(steps),
            "terminations": np.zeros(steps, bool),
            "truncations": np.arange(steps) == steps - 1,
        }


def minari_hdf5(folder: Path, transitions: int, steps: int) -> str:
    """Write a file as Minari writes HDF5; return its path."""
    import h5py

    with h5py.File(folder / "main_data.hdf5", "w", track_order=True) as file:
        for index, episode in enumerate(episodes(transitions, steps)):
            for name, array in episode.items():
                shape = (None, *array.shape[1:])
                file.create_dataset(f"episode_{index}/{name}", data=array, chunks=True, maxshape=shape)
    return str(folder / "main_data.hdf5")


def minari_arrow(folder: Path, transitions: int, steps: int) -> str:
    """Write a dataset as Minari writes Arrow; return its id."""
    import pyarrow as pa

    data = folder / "tests" / "arrow-v0" / "data"
    for index, episode in enumerate(episodes(transitions, steps)):
        columns = {}
        for name, array in episode.items():
            padding = ((0, steps + 1 - len(array)), *((0, 0) for _ in array.shape[1:]))
            padded = np.pad(array, padding)
            values = pa.array(padded.reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(values, padded.shape[1]) if padded.ndim == 2 else values
        batch = pa.RecordBatch.from_pydict(columns)
        (data / str(index)).mkdir(parents=True)
        with pa.ipc.new_file(str(data / str(index) / "part-0.arrow"), batch.schema) as writer:
            writer.write_batch(batch)
    (data / "metadata.json").write_text(json.dumps({"data_format": "arrow"}))
    return "tests/arrow-v0"


def flat(transitions: int, steps: int) -> dict[str, np.ndarray]:
    """Return random transitions as flat arrays; each episode has `steps` steps."""
    rng = np.random.default_rng(0)
    return {
        "observations": rng.standard_normal((transitions, OBSERVATIONS), np.float32),
        "actions": rng.standard_normal((transitions, ACTIONS), np.float32),
        "rewards": rng.standard_normal(transitions, np.float32),
        "terminals": np.zeros(transitions, bool),
        "timeouts": np.arange(transitions) % steps == steps - 1,
    }


def d4rl_hdf5(folder: Path, transitions: int, steps: int) -> str:
    """Write a file as D4RL does; return its id."""
    import h5py

    with h5py.File(folder / "hopper_medium-v2.hdf5", "w") as file:
        for name, array in flat(transitions, steps).items():
            file.create_dataset(name, data=array, compression="gzip", compression_opts=1)
    return "hopper-medium-v2"


def flat_npz(folder: Path, transitions: int, steps: int) -> str:
    """Write one file of flat arrays; return its path."""
    np.savez(folder / "flat.npz", **flat(transitions, steps))
    return str(folder / "flat.npz")


def npz_episodes(folder: Path, transitions: int, steps: int) -> str:
    """Write one file per episode; return the path of the folder."""
    (folder / "episodes").mkdir()
    for index, episode in enumerate(episodes(transitions, steps)):
        np.savez(folder / "episodes" / f"{index}.npz", **episode)
    return str(folder / "episodes")


FORMATS: dict[str, Callable[[Path, int, int], str]] = {
    "Minari HDF5": minari_hdf5,
    "Minari Arrow": minari_arrow,
    "D4RL HDF5": d4rl_hdf5,
    "flat .npz": flat_npz,
    "folder of .npz": npz_episodes,
}


def load(dataset: str, folder: Path) -> tuple[int, float, float]:
    """Load in a new process; return the number of transitions, seconds, and peak memory relative to the table."""
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(folder), "D4RL_DATASET_DIR": str(folder)}
    command = [sys.executable, "-c", LOAD, dataset]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    count, seconds, growth = output.split()
    return int(count), float(seconds), float(growth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    options = parser.parse_args()
    print("| format | episodes of | transitions | MB | 1st load s | 2nd load s | 1st memory / table | 2nd |")
    print("|---|---|---|---|---|---|---|---|")
    for name, write in FORMATS.items():
        for steps in SHAPES.values():
            with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
                folder = Path(temporary)
                dataset = write(folder, options.transitions, steps)
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
                (count, first, growth), (_, second, growth_again) = load(dataset, folder), load(dataset, folder)
            print(
                f"| {name} | {steps} | {count:,} | {size:.0f} | {first:.1f} | {second:.2f} | "
                f"{growth:.2f} | {growth_again:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
