"""Collects a dataset of the catalog and stores it as a Minari dataset, completely or not at all.

Datasets of OGBench's robot arm have OGBench's own files beside it (`collect.ogbench_files`).

Episodes are appended to a journal (`collect.journal`); when all are there, they are written to the dataset. So a killed
collection continues where it stopped, and memory holds one episode at a time. An episode depends on its number alone:
shards on several machines record every n-th one into journals of their own, which the collection takes up.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import lit_offrl
from lit_offrl.collect.catalog import CATALOG, CollectedDataset, ManipulationDataset, MazeDataset
from lit_offrl.collect.episodes import Episode, make_environment
from lit_offrl.collect.journal import Journal, stored_records
from lit_offrl.collect.ogbench_files import write_ogbench
from lit_offrl.collect.workers import ordered_records
from lit_offrl.data.sources.minari import minari_root
from lit_offrl.data.sources.ogbench import INSTALL
from lit_offrl.errors import RunFailure, UserError, did_you_mean, one_line
from lit_offrl.system.cores import available_cores
from lit_offrl.system.progress import progress_bar

HIDDEN = ".lit_offrl"  # Minari skips hidden folders when it lists datasets
_EPISODE_BYTES = 20_000  # upper bound of what HDF5 needs for an episode besides its numbers


def collect_dataset(
    dataset_id: str,
    *,
    steps: int | None = None,
    seed: int = 0,
    processes: int | None = None,
    root: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Collect a dataset of the catalog into Minari's local root and return its folder.

    The bytes of the file depend on the id, `steps` and `seed` only (on one machine, with the same versions of the
    simulator). The dataset appears when it is complete. A call continues an earlier collection of the same id and seed
    that was stopped. While another process collects the dataset, it waits and returns the result of that process.

    Args:
        dataset_id: A key of the catalog.
        steps: Number of transitions; the last episode is truncated there. None for the catalog's number.
        seed: Seed of the dataset.
        processes: Number of worker processes; None for two, or one on a machine with one core.
        root: Folder of the datasets; None for Minari's local root.
        overwrite: Replace a dataset of this id, when the new one is complete.
        progress: Show a progress bar.

    Raises:
        UserError: The id is unknown, the dataset exists and `overwrite` is false, a number is out of range, or a
            package is missing.
        RunFailure: A worker process died, or the disk is full.
    """
    root = minari_root() if root is None else Path(root)
    folder = root / dataset_id
    dataset, steps, processes = check_collection(dataset_id, steps, seed, processes, folder, overwrite)
    title, recorded_steps = _title(dataset, seed), dataset.recorded_steps(steps)
    work_folder = working_folder(dataset_id, root)
    replaced = work_folder / "replaced"
    notice = f"waiting for another process that is collecting {dataset_id}" if progress else None
    with _locked(work_folder / "lock", notice) as waited:
        if replaced.exists() and not folder.exists():  # a process was killed between two renames of `publish`
            replaced.replace(folder)
        if folder.exists() and waited and _made_with(folder, steps, seed):
            return folder
        if folder.exists() and not overwrite:
            raise _exists(dataset_id, folder)
        building = work_folder / "building"
        shutil.rmtree(building, ignore_errors=True)  # left by a process that was killed
        try:
            with Journal(work_folder / "journal", title) as journal:
                _take_up_shards(journal, work_folder, title, recorded_steps)
                _fill(journal, dataset, recorded_steps, seed, processes, progress)
                _require_space(journal)
                _write(building, dataset, journal, steps, seed)
                publish(building, root, dataset_id, replaced)
                journal.remove()
                for shard in work_folder.glob("shard_*"):
                    shard.unlink()
        except OSError as error:
            raise RunFailure(
                f"collecting {dataset_id} stopped ({one_line(error)}); the same call goes on from where it was"
            ) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def collect_shard(
    dataset_id: str,
    shard: int,
    shards: int,
    *,
    steps: int | None = None,
    seed: int = 0,
    processes: int | None = None,
    root: Path | None = None,
    progress: bool = True,
) -> Path:
    """Record every `shards`-th episode of a dataset, from number `shard`, for `collect_dataset` to take up.

    A shard ends with its share of the steps. `collect_dataset` records the few episodes by which shards with longer
    ones fall behind.

    Args:
        dataset_id: A key of the catalog.
        shard: Number of the shard, from 0.
        shards: Number of shards.
        steps: Number of transitions of the whole dataset; None for the catalog's number.
        seed: Seed of the dataset.
        processes: Number of worker processes; None for two, or one on a machine with one core.
        root: Folder of the datasets; None for Minari's local root.
        progress: Show a progress bar.

    Returns:
        The journal.

    Raises:
        UserError: The id is unknown, or a number is out of range.
        RunFailure: A worker process died, or the disk is full.
    """
    dataset, steps, processes = check_collection(dataset_id, steps, seed, processes)
    if not 0 <= shard < shards:
        raise UserError(f"shard: {shard}/{shards} must be one of 0/{shards} to {shards - 1}/{shards}")
    title, share = _title(dataset, seed), -(-dataset.recorded_steps(steps) // shards)
    path = working_folder(dataset_id, root) / f"shard_{shard}_of_{shards}"
    try:
        with _locked(path.with_suffix(".lock"), None), Journal(path, title) as journal:
            _fill(journal, dataset, share, seed, processes, progress, shard, shards)
    except OSError as error:
        raise RunFailure(f"collecting stopped ({one_line(error)}); the same call goes on from where it was") from error
    return path


def working_folder(dataset_id: str, root: Path | None = None) -> Path:
    """Return the folder of a collection that is not complete."""
    return (minari_root() if root is None else root) / HIDDEN / dataset_id.replace("/", "-")


def check_collection(
    dataset_id: str,
    steps: int | None,
    seed: int,
    processes: int | None,
    folder: Path | None = None,
    overwrite: bool = False,
) -> tuple[CollectedDataset, int, int]:
    """Return the dataset, and the numbers of steps and processes.

    Raises:
        UserError: The id is unknown, a number is out of range, or the dataset's folder exists and `overwrite` is false.
    """
    if dataset_id not in CATALOG:
        raise UserError(
            f"'{dataset_id}' cannot be collected{did_you_mean(dataset_id, CATALOG)}; these can: {', '.join(CATALOG)}"
        )
    dataset = CATALOG[dataset_id]
    steps = dataset.steps if steps is None else steps
    if steps < 1:
        raise UserError(f"steps: {steps} transitions are not a dataset; ask for at least 1")
    if seed < 0:
        raise UserError(f"seed: {seed} is negative; seeds start at 0")
    processes = min(2, available_cores()) if processes is None else processes
    if processes < 1:
        raise UserError(f"processes: {processes} cannot collect anything; ask for at least 1")
    if folder is not None and folder.exists() and not overwrite:
        raise _exists(dataset_id, folder)
    return dataset, steps, processes


def _exists(dataset_id: str, folder: Path) -> UserError:
    return UserError(f"'{dataset_id}' already lies in {folder}: use it, or collect it anew with overwrite")


def _title(dataset: CollectedDataset, seed: int) -> bytes:
    """Return everything that the episodes depend on; a collection continues only if it is the same."""
    return json.dumps({"dataset": asdict(dataset), "seed": seed, "versions": _versions(dataset)}).encode()


def _versions(dataset: CollectedDataset) -> dict[str, str]:
    packages = ("gymnasium", "gymnasium-robotics", "mujoco", "numpy", "minari", "h5py", *dataset.packages)
    try:
        versions = {name: importlib.metadata.version(name) for name in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"collecting {dataset.id} needs the package {error.name}: {INSTALL}") from error
    return {"lit_offrl": lit_offrl.__version__, **versions}


def _take_up_shards(journal: Journal, folder: Path, title: bytes, steps: int) -> None:
    """Append what shards have recorded, in order, until the journal holds at least `steps` steps."""
    for shards in {int(path.name.rpartition("_")[2]) for path in folder.glob("shard_0_of_*[0-9]")}:
        sources = [stored_records(folder / f"shard_{shard}_of_{shards}", title) for shard in range(shards)]
        # One episode of each shard in turn, as long as all have one.
        for number, record in enumerate(chain.from_iterable(zip(*sources))):  # noqa: B905 (they differ in length)
            if journal.steps >= steps:
                return
            if number == journal.episodes:
                journal.append(record)


def _fill(
    journal: Journal,
    dataset: CollectedDataset,
    steps: int,
    seed: int,
    processes: int,
    progress: bool,
    shard: int = 0,
    shards: int = 1,
) -> None:
    """Collect every `shards`-th episode, from `shard`, until the journal holds at least `steps` steps."""
    if journal.steps >= steps:
        return
    word = "resuming" if journal.episodes else "collecting"
    first = shard + journal.episodes * shards
    with (
        closing(ordered_records(dataset.id, seed, processes, first, shards)) as source,  # type: ignore[type-var]
        progress_bar(f"{word} {dataset.id}", steps, initial=journal.steps, disable=not progress) as bar,
    ):
        while journal.steps < steps:
            before = journal.steps
            journal.append(next(source))
            bar.update(min(journal.steps, steps) - before)


def _require_space(journal: Journal) -> None:
    """Raise `OSError` unless the disk has room for the dataset: HDF5 ends the process on a full disk."""
    needed = 2 * journal.path.stat().st_size + _EPISODE_BYTES * journal.episodes
    free = shutil.disk_usage(journal.path.parent).free
    if free < needed:
        raise OSError(f"{free / 1e6:.0f} MB are free, up to {needed / 1e6:.0f} MB are needed")


def _write(building: Path, dataset: CollectedDataset, journal: Journal, steps: int, seed: int) -> None:
    """Write the journal's first `steps` steps as a Minari dataset under the temporary root `building`."""
    import minari
    from gymnasium.spaces import Dict
    from minari.data_collector import EpisodeBuffer

    from lit_offrl.system.files import no_files_left

    env = make_environment(dataset)
    env.close()
    assert env.spec is not None
    spec = replace(env.spec, additional_wrappers=())  # without those of this package, which Minari cannot rebuild
    low, high = dataset.reference or (None, None)
    is_dictionary = isinstance(env.observation_space, Dict)
    tally = _Tally()

    def buffers() -> Iterator[Any]:
        for episode in journal.read(steps):
            tally.add(episode)
            yield EpisodeBuffer(
                observations=episode.observations if is_dictionary else episode.observations["observation"],
                actions=episode.actions,
                rewards=episode.rewards,
                terminations=episode.terminations,
                truncations=episode.truncations,
            )

    building.mkdir(parents=True)
    with at_minari_root(building), no_files_left(), warnings.catch_warnings():  # Minari builds the environment, too
        warnings.simplefilter("ignore")  # Minari asks for an e-mail address, gymnasium for newer environments
        stored = minari.create_dataset_from_buffers(
            dataset.id,
            buffers(),
            env=spec,
            eval_env=spec,
            observation_space=env.observation_space,
            action_space=env.action_space,
            algorithm_name=dataset.algorithm,
            author="lit_offrl",
            description=dataset.description,
            ref_min_score=low,
            ref_max_score=high,
            data_format="hdf5",
        )
        stored.storage.update_metadata(_metadata(dataset, tally, steps, seed))
    if isinstance(dataset, ManipulationDataset):
        write_ogbench(building / dataset.id / "data", dataset, journal, steps)


class _Tally:
    """Counts of a dataset's episodes, by kind."""

    def __init__(self) -> None:
        self.episodes: Counter[str] = Counter()
        self.transitions: Counter[str] = Counter()
        self.successes: Counter[str] = Counter()
        self.falls = 0
        self._returns: dict[str, float] = {}

    def add(self, episode: Episode) -> None:
        self.episodes[episode.kind] += 1
        self.transitions[episode.kind] += len(episode)
        self.successes[episode.kind] += episode.success
        self.falls += episode.fell
        self._returns[episode.kind] = self._returns.get(episode.kind, 0.0) + float(episode.rewards.sum())

    @property
    def mean_returns(self) -> dict[str, float]:
        return {kind: total / self.episodes[kind] for kind, total in self._returns.items()}


def _metadata(dataset: CollectedDataset, tally: _Tally, steps: int, seed: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "seed": seed,
        "steps": steps,
        **dataset.behavior,
        "license": dataset.license,
        "episodes": tally.episodes,
        "transitions": tally.transitions,
        "mean_returns": tally.mean_returns,
        "falls": tally.falls,
        "versions": _versions(dataset),
    }
    if isinstance(dataset, MazeDataset):
        facts["successes"] = tally.successes
        facts["success_fraction"] = tally.successes.total() / tally.episodes.total()
    metadata = {"reference_note": dataset.reference_note, "collection": facts}
    if dataset.observation_keys is not None:
        metadata["observation_keys"] = list(dataset.observation_keys)
    return metadata


def publish(building: Path, root: Path, dataset_id: str, replaced: Path) -> None:
    """Move the finished dataset to its place and remove the old one."""
    folder = root / dataset_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Minari marks the folders above a dataset as namespaces.
    for source in building.rglob("namespace_metadata.json"):
        target = root / source.relative_to(building)
        if not target.exists():
            source.replace(target)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.replace(replaced)
    (building / dataset_id).replace(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _made_with(folder: Path, steps: int, seed: int) -> bool:
    metadata = json.loads((folder / "data" / "metadata.json").read_text())
    collection = metadata.get("collection", {})
    return (collection.get("steps"), collection.get("seed")) == (steps, seed)


@contextmanager
def _locked(path: Path, notice: str | None) -> Iterator[bool]:
    """Hold an exclusive lock; yield whether another process held it first.

    Args:
        path: The lock file.
        notice: Printed to standard error if the lock has to be waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    waited = False
    try:
        lock.acquire(blocking=False)
    except Timeout:
        waited = True
        if notice:
            print(notice, file=sys.stderr)
        lock.acquire()
    try:
        yield waited
    finally:
        lock.release()


@contextmanager
def at_minari_root(root: Path) -> Iterator[None]:
    """Set Minari's local root, which Minari reads from this environment variable only."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root.absolute())  # Minari changes the working folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
