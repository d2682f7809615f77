"""What run folders hold: results.json, eval.csv and config.yaml, and which runs belong together."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_offrl.envs.scores import ScoreReference
from lit_offrl.errors import UserError

# Entries of config.yaml that may differ between the runs of one row.
OWN_SETTINGS = ("seed_everything", "default_root_dir", "ckpt_path", "overwrite", "pretrained", "devices", "accelerator")


@dataclass(frozen=True)
class Score:
    """Mean score of one actor of one run: normalized where the run has a reference, else its mean return.

    Attributes:
        value: The score.
        episodes: Number of episodes that it is the mean of; None where unknown.
    """

    value: float
    episodes: int | None


@dataclass(frozen=True)
class Run:
    """One run folder; None where a value is unknown.

    Attributes:
        path: The folder.
        algorithm: Name of the algorithm; with the folder that the run lies in where that tells runs apart.
        dataset: Id of the dataset; with its digest or scale where one id stands for several.
        dataset_id: The plain id.
        source: Where the dataset comes from, e.g. `d4rl`.
        sha256: Digest of the dataset.
        seed: Seed of training.
        finished: Whether the run ended by itself.
        step: Gradient steps after which it was scored.
        reference: Scale of the scores; None for returns.
        scores: Final scores by actor; `policy` is the algorithm's own.
        data_score: The dataset's own mean return, on the same scale.
        evaluations: (gradient step, mean score) of the policy during training, in order.
        bandit: Measures by actor, of a run on a 2-D bandit.
        beta: Inverse temperature of the bandit's target.
    """

    path: Path
    algorithm: str
    dataset: str
    dataset_id: str
    source: str | None
    sha256: str | None
    seed: int | None
    finished: bool
    step: int | None
    reference: ScoreReference | None
    scores: Mapping[str, Score]
    data_score: float | None
    evaluations: Sequence[tuple[int, float]]
    bandit: Mapping[str, Mapping[str, float | None]]
    beta: float | None

    @property
    def trained_until(self) -> int:
        """Gradient steps at the last evaluation during training; 0 without one."""
        return self.evaluations[-1][0] if self.evaluations else 0

    @property
    def root(self) -> str:
        """The folder above `<algorithm>/<dataset>/seed_<k>`, or the run folder itself where it has another name."""
        name = Path(self.dataset_id)
        path = self.path.as_posix()
        for dataset in (name.as_posix(), name.stem):
            path = path.removesuffix(f"/{self.algorithm}/{dataset}/seed_{self.seed}")
        return path


def find_runs(folders: Sequence[Path], warn: Callable[[str], object]) -> list[Run]:
    """Read every results.json below the folders, in the order of their paths.

    Args:
        folders: Where to look.
        warn: Called with one line for each file that cannot be read.

    Raises:
        UserError: A folder is missing, or there is nothing to read in any.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}")
    files = {file.resolve(): file for folder in folders for file in sorted(folder.rglob("results.json"))}
    runs = []
    for file in files.values():
        try:
            runs.append(_read_run(file))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # noqa: PERF203
            what = f"no entry {error}" if isinstance(error, KeyError) else str(error)
            warn(f"{file} cannot be read and is skipped: {what}")
    if not runs:
        where = " ".join(map(str, folders))
        raise UserError(f"no results.json below {where}" if not files else f"no readable results.json below {where}")
    return runs


def _read_run(file: Path) -> Run:
    results: dict[str, Any] = json.loads(file.read_text())
    if not isinstance(results, dict):
        raise ValueError("it holds no JSON object")
    reference = _reference(results.get("score_reference") or {})
    actors = {"policy": results.get("scores") or {}, **(results.get("comparison") or {})}
    scores = {name: _score(each, reference) for name, each in actors.items()}
    data_return = _number(results.get("dataset_return_mean"))
    bandit = dict(results.get("bandit") or {})
    beta = _number(bandit.pop("beta", None))
    measures = {"policy": bandit, **(results.get("bandit_comparison") or {})} if bandit else {}
    seed, step = results["seed"], results.get("scored_step")
    return Run(
        path=file.parent,
        algorithm=str(results["algorithm"]),
        dataset=str(results["dataset"]),
        dataset_id=str(results["dataset"]),
        source=results.get("dataset_source"),
        sha256=results.get("dataset_sha256"),
        seed=None if seed is None else int(seed),
        finished=results.get("status") == "finished",
        step=None if step is None else int(step),
        reference=reference,
        scores={name: score for name, score in scores.items() if score is not None},
        data_score=reference.normalize(data_return) if reference and data_return is not None else data_return,
        evaluations=_evaluations(file.with_name("eval.csv"), reference),
        bandit={actor: {name: _number(value) for name, value in each.items()} for actor, each in measures.items()},
        beta=beta,
    )


def _reference(entry: Mapping[str, Any]) -> ScoreReference | None:
    low, high = _number(entry.get("min")), _number(entry.get("max"))
    if entry.get("name") is None or low is None or high is None:
        return None
    return ScoreReference(str(entry["name"]), low, high)


def _score(entry: Mapping[str, Any], reference: ScoreReference | None) -> Score | None:
    value = _number(entry.get("return_mean" if reference is None else "normalized"))
    return None if value is None else Score(value, entry.get("episodes"))


def _number(value: object) -> float | None:
    """Return a finite number, or None."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _evaluations(file: Path, reference: ScoreReference | None) -> list[tuple[int, float]]:
    if not file.is_file():
        return []
    column = "return" if reference is None else "normalized_score"
    episodes: dict[int, list[float]] = defaultdict(list)
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if (row.get("actor"), row.get("stage")) != ("policy", "fit"):
                continue
            try:
                episodes[int(row["step"])].append(float(row[column]))
            except (KeyError, TypeError, ValueError):
                continue  # a killed process may have left a partial last row
    return sorted((step, sum(each) / len(each)) for step, each in episodes.items())


# ---------------------------------------------------------------- which runs belong together


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """Name the runs so that no two of one algorithm, dataset, scale and seed have the same name.

    Where an id stands for several data files or scales, the dataset's name tells which. Where the same seed lies in
    several folders, the algorithm's name tells which folder.
    """
    files, scales, places = defaultdict(set), defaultdict(set), defaultdict(list)
    for run in runs:
        files[run.dataset_id].add(run.sha256)
        scales[run.dataset_id].add(run.reference)
    named = []
    for run in runs:
        dataset = run.dataset_id
        if len(files[run.dataset_id]) > 1:
            dataset += f" [sha256 {(run.sha256 or 'unknown')[:8]}]"
        if len(scales[run.dataset_id]) > 1 and run.reference is not None:
            dataset += f" [{run.reference.minimum:g} to {run.reference.maximum:g}]"
        named.append(replace(run, dataset=dataset))
        places[run.algorithm, bool(run.bandit)].append((dataset, run.reference, run.seed, run.beta))
    roots = _short({run.root for run in runs})
    ambiguous = {kind for kind, each in places.items() if len(set(each)) < len(each)}
    return [
        replace(run, algorithm=f"{run.algorithm} ({roots[run.root]})")
        if (run.algorithm, bool(run.bandit)) in ambiguous
        else run
        for run in named
    ]


def _short(roots: Iterable[str]) -> dict[str, str]:
    """Return the part of each path that comes after what all have in common."""
    parts = {root: Path(root).parts for root in roots}
    common = 0
    while len({each[: common + 1] for each in parts.values()}) == 1 and all(
        len(p) > common + 1 for p in parts.values()
    ):
        common += 1
    return {root: "/".join(each[common:]) for root, each in parts.items()}


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return the names of settings in which the runs' config.yaml differ, besides seeds and places; sorted."""
    settings: list[set[str]] = []
    for run in runs:
        file = run.path / "config.yaml"
        if file.is_file():
            settings.append({line.strip() for line in file.read_text(errors="replace").splitlines()})
    if len(settings) < 2:
        return []
    differing = settings[0].union(*settings) - settings[0].intersection(*settings)
    names = {line.partition(":")[0].lstrip("- ") for line in differing if ":" in line and not line.startswith("#")}
    return sorted(names - set(OWN_SETTINGS))
