"""Collects a dataset of the catalog and stores it as a Minari dataset, whole or not at all."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lit_offrl
from lit_offrl.collect.catalog import CATALOG, CollectedDataset
from lit_offrl.collect.episodes import Episode, make_environment
from lit_offrl.collect.workers import ordered_episodes
from lit_offrl.data.local import minari_root
from lit_offrl.errors import UserError, did_you_mean
from lit_offrl.progress import progress_bar

_HIDDEN = ".lit_offrl"  # Minari skips hidden folders when it lists datasets


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

    The data depend on the id, `steps` and `seed` only, down to the bytes of the file (on one machine, with the same
    versions of the simulator). Nothing is seen of the dataset before it is whole. Where another process is collecting
    it already, this one waits and takes what that one made.

    Args:
        dataset_id: A key of the catalog.
        steps: Number of transitions; the last episode is cut off there. None for the catalog's number.
        seed: Seed of the dataset; another seed gives other episodes.
        processes: Number of worker processes; None for two, or one on a machine with one core.
        root: Where datasets lie; None for Minari's local root.
        overwrite: Replace a dataset of this id; it stays in place until the new one is whole.
        progress: Show a progress bar.

    Raises:
        UserError: The id is unknown, the dataset exists and is not to be overwritten, or a number makes no sense.
        RunFailure: A worker process died.
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
    processes = min(2, os.cpu_count() or 1) if processes is None else processes
    if processes < 1:
        raise UserError(f"processes: {processes} cannot collect anything; ask for at least 1")
    root = minari_root() if root is None else Path(root)
    folder = root / dataset_id
    if folder.exists() and not overwrite:
        raise _exists(dataset_id, folder)

    workshop = root / _HIDDEN / dataset_id.replace("/", "-")
    replaced = workshop / "replaced"
    notice = f"waiting for another process that is collecting {dataset_id}" if progress else None
    with _locked(workshop / "lock", notice) as waited:
        if replaced.exists() and not folder.exists():  # killed between taking the old away and putting the new there
            replaced.replace(folder)
        if folder.exists() and waited and _made_with(folder, steps, seed):
            return folder
        if folder.exists() and not overwrite:
            raise _exists(dataset_id, folder)
        building = workshop / "building"
        shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
        try:
            episodes = _collect(dataset, steps, seed, processes, progress)
            _write(building, dataset, episodes, steps, seed)
            _publish(building, root, dataset_id, replaced)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def _exists(dataset_id: str, folder: Path) -> UserError:
    return UserError(f"'{dataset_id}' already lies in {folder}: use it, or collect it anew with overwrite")


def _collect(dataset: CollectedDataset, steps: int, seed: int, processes: int, progress: bool) -> list[Episode]:
    episodes: list[Episode] = []
    missing = steps
    with (
        closing(ordered_episodes(dataset.id, seed, processes)) as source,  # type: ignore[type-var]
        progress_bar(f"collecting {dataset.id}", steps, disable=not progress) as bar,
    ):
        while missing:
            episodes.append(next(source).cut(missing))
            missing -= len(episodes[-1])
            bar.update(len(episodes[-1]))
    return episodes


def _write(building: Path, dataset: CollectedDataset, episodes: list[Episode], steps: int, seed: int) -> None:
    """Write the Minari dataset under the temporary root `building`."""
    import minari
    from minari.data_collector import EpisodeBuffer

    env = make_environment(dataset)
    env.close()
    building.mkdir(parents=True)
    with _minari_root(building), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an e-mail address, gymnasium for newer environments
        stored = minari.create_dataset_from_buffers(
            dataset.id,
            [
                EpisodeBuffer(
                    observations=episode.observations,
                    actions=episode.actions,
                    rewards=episode.rewards,
                    terminations=episode.terminations,
                    truncations=episode.truncations,
                )
                for episode in episodes
            ],
            env=env.spec,
            eval_env=env.spec,
            observation_space=env.observation_space,
            action_space=env.action_space,
            algorithm_name="planner with a low-level controller",
            author="lit_offrl",
            description=dataset.description,
            ref_min_score=dataset.reference[0],
            ref_max_score=dataset.reference[1],
            data_format="hdf5",
        )
        stored.storage.update_metadata(_metadata(dataset, episodes, steps, seed))


def _metadata(dataset: CollectedDataset, episodes: list[Episode], steps: int, seed: int) -> dict[str, Any]:
    mix = asdict(dataset.mix)
    noise = mix.pop("noise")
    return {
        "observation_keys": list(dataset.observation_keys),
        "reference_note": dataset.reference_note,
        "collection": {
            "seed": seed,
            "steps": steps,
            "behavior_mix": mix,
            "action_noise": noise,
            "success_fraction": sum(episode.success for episode in episodes) / len(episodes),
            "episodes": dict(sorted(Counter(episode.kind for episode in episodes).items())),
            "successes": dict(sorted(Counter(episode.kind for episode in episodes if episode.success).items())),
            "falls": sum(episode.fell for episode in episodes),
            "versions": {
                "lit_offrl": lit_offrl.__version__,
                **{
                    name: importlib.metadata.version(name)
                    for name in ("gymnasium", "gymnasium-robotics", "mujoco", "numpy", "minari", "h5py")
                },
            },
        },
    }


def _publish(building: Path, root: Path, dataset_id: str, replaced: Path) -> None:
    """Move the finished dataset to its place; what lay there goes."""
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
    """Hold the lock file; yield whether another process held it first, after telling the user so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        waited = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            if notice:
                print(notice, file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield waited  # closing the file unlocks it


@contextmanager
def _minari_root(root: Path) -> Iterator[None]:
    """Let Minari take `root` for its local root; it reads nothing but this variable."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
