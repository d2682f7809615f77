"""Reads run folders: results.json, eval.csv and config.yaml."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lit_offrl.data.info import ScoreReference
from lit_offrl.errors import UserError

# Settings that may differ between the seeds of one row without a note.
IGNORED_SETTINGS = {
    "seed_everything", "default_root_dir", "ckpt_path", "overwrite", "pretrained", "devices", "accelerator",
}  # fmt: skip


@dataclass(frozen=True)
class Score:
    """Mean score of one actor of one run: normalized, or the mean return where the run has no reference."""

    value: float
    episodes: int | None


@dataclass(frozen=True)
class Run:
    """One run folder; None where a value is unknown.

    Attributes:
        algorithm: Name of the algorithm; `distinguish_runs` adds a folder where several runs have the same name.
        algorithm_id: The name as results.json gives it.
        ablation: Name of the ablation that was trained, e.g. `no_q`; None for the algorithm as it is.
        dataset: Id of the dataset; `distinguish_runs` adds a digest or a scale where one id has several.
        dataset_id: The id as results.json gives it.
        source: Source of the dataset, e.g. `d4rl`.
        sha256: Digest of the dataset.
        rules: Id of the rules of its episodes, see `lit_offrl.envs.protocol`; None in older runs.
        step: Gradient steps of the checkpoint that was scored.
        reference: Scale of the scores; None for returns.
        scores: Final scores by actor; `policy` is the algorithm's own policy.
        data_score: The dataset's mean return on the same scale.
        evaluations: (gradient step, mean score) of the policy during training, in order.
        episodes: Scores of the episodes of the last of these evaluations.
        bandit: Measures by actor of a run on a 2-D bandit, else empty.
        beta: Inverse temperature of the bandit's target.
        time: Entries of results.json's `time`, e.g. `act_ms`.
        device: Name of the device that it was trained on.
    """

    path: Path
    algorithm: str
    algorithm_id: str
    ablation: str | None
    dataset: str
    dataset_id: str
    source: str | None
    sha256: str | None
    rules: str | None
    seed: int | None
    finished: bool
    step: int | None
    reference: ScoreReference | None
    scores: Mapping[str, Score]
    data_score: float | None
    evaluations: Sequence[tuple[int, float]]
    episodes: Sequence[float]
    bandit: Mapping[str, Mapping[str, float | None]]
    beta: float | None
    time: Mapping[str, float | None]
    device: str | None

    @property
    def trained_until(self) -> int:
        """Gradient step of the last evaluation during training; 0 without evaluations."""
        return self.evaluations[-1][0] if self.evaluations else 0

    @property
    def root(self) -> str:
        """The folder above `<algorithm>/<dataset>/seed_<k>`; the run folder itself where its name is different."""
        path = self.path.as_posix()
        name = f"{self.algorithm}-{Path(self.ablation).stem}" if self.ablation else self.algorithm
        for dataset in (self.dataset_id, Path(self.dataset_id).stem):
            path = path.removesuffix(f"/{name}/{dataset}/seed_{self.seed}")
        return path


# What files that nobody checked can cause, the nesting of JSON and the length of a CSV field included.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, csv.Error)


def find_runs(folders: Sequence[Path], warn: Callable[[str], object]) -> list[Run]:
    """Read every results.json below the folders, sorted by path within each folder.

    Args:
        folders: Folders to search.
        warn: Called with one line for each results.json that cannot be read.

    Raises:
        UserError: A folder is missing, or no folder holds a readable results.json.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}")
    files = {file.resolve(): file for folder in folders for file in sorted(folder.rglob("results.json"))}
    runs = []
    for file in files.values():
        try:
            runs.append(_read_run(file))
        except UNREADABLE as error:  # noqa: PERF203
            reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
            warn(f"{file} cannot be read and is skipped: {reason}")
    if not runs:
        where = " ".join(map(str, folders))
        raise UserError(f"no results.json below {where}" if not files else f"no readable results.json below {where}")
    return runs


def _read_run(file: Path) -> Run:
    results: dict[str, Any] = json.loads(file.read_text())
    if not isinstance(results, dict):
        raise ValueError("it holds no JSON object")
    json.dumps(results, ensure_ascii=False).encode()  # half a surrogate pair cannot be written again
    entry = results.get("score_reference") or {}
    low, high = _number(entry.get("min")), _number(entry.get("max"))
    reference = None
    if entry.get("name") is not None and low is not None and high is not None:
        measure: Literal["return", "success"] = "success" if entry.get("measure") == "success" else "return"
        reference = ScoreReference(str(entry["name"]), low, high, measure)
        if not low < high:
            raise ValueError(f"the bounds of its reference, {low:g} and {high:g}, are no range")
    key = "return_mean" if reference is None else "normalized"
    actors = {"policy": results.get("scores") or {}, **(results.get("comparison") or {})}
    values = {name: (_number(each.get(key)), each.get("episodes")) for name, each in actors.items()}
    data_return = _number(results.get("dataset_return_mean"))
    bandit = dict(results.get("bandit") or {})
    beta = _number(bandit.pop("beta", None))
    measures = {"policy": bandit, **(results.get("bandit_comparison") or {})} if bandit else {}
    episodes = _episodes(file.with_name("eval.csv"), reference)
    seed, step = results["seed"], results.get("scored_step")
    return Run(
        path=file.parent,
        algorithm=str(results["algorithm"]),
        algorithm_id=str(results["algorithm"]),
        ablation=None if results.get("ablation") is None else Path(str(results["ablation"])).stem,
        dataset=str(results["dataset"]),
        dataset_id=str(results["dataset"]),
        source=results.get("dataset_source"),
        sha256=results.get("dataset_sha256"),
        seed=None if seed is None else int(seed),
        rules=(results.get("protocol") or {}).get("rules"),
        finished=results.get("status") == "finished",
        step=None if step is None else int(step),
        reference=reference,
        scores={name: Score(value, episodes) for name, (value, episodes) in values.items() if value is not None},
        data_score=reference.score(data_return, None) if reference and data_return is not None else data_return,
        evaluations=[(at, sum(each) / len(each)) for at, each in episodes.items()],
        episodes=[*episodes.values()][-1] if episodes else [],
        bandit={actor: {name: _number(value) for name, value in each.items()} for actor, each in measures.items()},
        beta=beta,
        time={name: _number(value) for name, value in dict(results.get("time") or {}).items()},
        device=results.get("device"),
    )


def _number(value: object) -> float | None:
    """Return a finite number, or None."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _episodes(file: Path, reference: ScoreReference | None) -> dict[int, list[float]]:
    """Return the scores of the policy's episodes during training, by gradient step in order."""
    if not file.is_file():
        return {}
    column = "return" if reference is None else "normalized_score"
    episodes: dict[int, list[float]] = defaultdict(list)
    with file.open(newline="") as lines:
        rows = csv.reader(lines)  # a dictionary for each row would take twice the time
        place = {name: i for i, name in enumerate(next(rows, []))}
        for row in rows:
            try:
                if row[place["actor"]] == "policy" and row[place["stage"]] == "fit":
                    episodes[int(row[place["step"]])].append(float(row[place[column]]))
            except (KeyError, IndexError, ValueError):  # noqa: PERF203
                continue  # a killed process can leave an incomplete last row
    return {step: each for step, each in sorted(episodes.items()) if each}


def distinguish_runs(runs: Sequence[Run]) -> list[Run]:
    """Rename runs so that those of one algorithm, dataset, scale and seed have different names.

    If a dataset id has several files or scales, the digest or the scale is added to the dataset. If the same seed lies
    in several folders, the folder is added to the algorithm.
    """
    digests, scales, keys = defaultdict(set), defaultdict(set), defaultdict(list)
    for run in runs:
        digests[run.dataset_id].add(run.sha256)
        scales[run.dataset_id].add(run.reference)
    renamed = []
    for run in runs:
        dataset = run.dataset_id
        if len(digests[run.dataset_id]) > 1:
            dataset += f" [sha256 {(run.sha256 or 'unknown')[:8]}]"
        if len(scales[run.dataset_id]) > 1 and run.reference is not None:
            dataset += f" [{run.reference.minimum:g} to {run.reference.maximum:g}]"
        renamed.append(replace(run, dataset=dataset))
        keys[run.algorithm, bool(run.bandit)].append((dataset, run.reference, run.seed, run.beta, run.ablation))
    ambiguous = {name for name, each in keys.items() if len(set(each)) < len(each)}
    parts = {run.root: Path(run.root).parts for run in runs}
    common = len(os.path.commonprefix([each[:-1] for each in parts.values()]))  # noqa: RUF071 (of tuples, not of strings)
    return [
        replace(run, algorithm=f"{run.algorithm} ({'/'.join(parts[run.root][common:])})")
        if (run.algorithm, bool(run.bandit)) in ambiguous
        else run
        for run in renamed
    ]


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return the sorted names of settings in which the runs' config.yaml differ, without `IGNORED_SETTINGS`."""
    files = [file for run in runs if (file := run.path / "config.yaml").is_file()]
    settings = [{line.strip() for line in file.read_text(errors="replace").splitlines()} for file in files]
    if len(settings) < 2:
        return []
    differing = settings[0].union(*settings) - settings[0].intersection(*settings)
    names = {line.partition(":")[0].lstrip("- ") for line in differing if ":" in line and not line.startswith("#")}
    return sorted(names - IGNORED_SETTINGS)
