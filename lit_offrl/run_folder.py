"""The run folder: where a run's files lie, and how they are written so that a kill leaves none of them broken."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_offrl.data.sources import find_source
from lit_offrl.errors import UserError
from lit_offrl.system.files import temporary_lock, write_atomically

RUN_FILES = ("config.yaml", "metrics.csv", "eval.csv", "results.json", "actions.npy")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run: `<root>/<algorithm>/<dataset>/seed_<k>/`.

    Attributes:
        path: The folder.
    """

    path: Path

    @classmethod
    def of(cls, root: str | Path, algorithm: str, dataset: str, seed: int) -> RunFolder:
        """Return the folder of a run; a dataset given as a file or folder goes by its stem."""
        return cls(Path(root) / algorithm / find_source(dataset).run_name(dataset) / f"seed_{seed}")

    @classmethod
    def of_checkpoint(cls, checkpoint: str | Path) -> RunFolder:
        """Return the folder that a checkpoint belongs to.

        Raises:
            UserError: The checkpoint does not lie in a run folder.
        """
        path = Path(checkpoint)
        if path.parent.name != "checkpoints":
            path = path.absolute()
        if path.parent.name != "checkpoints":
            raise UserError(
                f"ckpt_path: {checkpoint} does not lie in the checkpoints/ of a run folder: put it there, and the "
                "run's config.yaml beside that folder (or name it with --config)"
            )
        return cls(path.parent.parent)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint to resume from."""
        return self.checkpoints / "last.ckpt"

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            UserError: It cannot be made or written to.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"the run folder {self.path} cannot be written ({error.strerror}): "
                "choose another with --trainer.default_root_dir"
            ) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one writer of the folder within this context; remove what killed processes left half-written.

        Raises:
            UserError: Another process writes here.
        """
        from filelock import Timeout

        with ExitStack() as held:
            try:
                held.enter_context(temporary_lock(self.path / ".lock", timeout_s=0))
            except Timeout:
                raise UserError(
                    f"another process writes into {self.path}: wait for it, or choose another --seed_everything or "
                    "--trainer.default_root_dir"
                ) from None
            for file in self.path.rglob(".*.tmp"):
                file.unlink(missing_ok=True)
            yield

    def is_used(self) -> bool:
        """Whether a run has left anything here."""
        return self.last_checkpoint.exists() or any((self.path / name).exists() for name in RUN_FILES)

    def results(self) -> dict[str, Any]:
        """Return what results.json says; nothing where there is none, or none that can be read."""
        try:
            content = json.loads((self.path / "results.json").read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def clear(self) -> None:
        """Remove what a run writes here, and nothing else."""
        patterns = [
            *RUN_FILES,
            "events.out.tfevents.*",
            "hparams.yaml",
            "checkpoints/*.ckpt",
            "hpc_ckpt_*.ckpt",  # of Lightning under SLURM, which would take it for the start of a new run
            "figures/*.png",
            "rollout.gif",
            "fqe.json",
            "fqe/events.out.tfevents.*",
        ]
        for pattern in patterns:
            for file in self.path.glob(pattern):
                file.unlink()

    def remove_if_empty(self, root: Path) -> None:
        """Remove the folder, and those above it up to `root`, as far as they hold nothing."""
        for folder in (self.checkpoints, self.path / "figures", self.path / "fqe", self.path, *self.path.parents):
            if not folder.is_relative_to(root):
                return
            with suppress(OSError):
                folder.rmdir()


class GrowingCSV:
    """A CSV file of one row per event, appended to; new columns may appear at any time.

    Args:
        path: The file.
        columns: Columns that come first, in this order.
        keep_until: Where the file exists: drop rows whose `step` is larger (they came after the checkpoint that the
            run is resumed from and will come again). None starts a new file.
        dropped_at_end: Of the rows at step `keep_until` itself, drop those with a value in a column that begins so.
    """

    def __init__(
        self,
        path: Path,
        columns: Iterable[str],
        keep_until: float | None = None,
        dropped_at_end: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.columns = list(columns)
        rows: list[dict[str, str]] = []
        if keep_until is not None and path.is_file():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or self.columns)
                # A killed process may have left a partial last row; its step is then missing or it lacks cells.
                rows = [row for row in reader if None not in row.values() and _step(row) <= keep_until]
            if dropped_at_end:
                rows = [row for row in rows if _step(row) < keep_until or not _has_value(row, dropped_at_end)]
        self._rewrite(rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row."""
        self.extend([row])

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows and hand them to the operating system."""
        rows = list(rows)
        new = [name for row in rows for name in row if name not in self.columns]
        if new:
            with self.path.open(newline="") as file:
                old = list(csv.DictReader(file))
            self.columns.extend(dict.fromkeys(new))
            self._rewrite(old)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerows(rows)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns, restval="")
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.path, write)


def _has_value(row: Mapping[str, str], beginnings: tuple[str, ...]) -> bool:
    return any(value for name, value in row.items() if name.startswith(beginnings))


def _step(row: Mapping[str, str]) -> float:
    try:
        return float(row["step"])
    except (KeyError, ValueError):
        return float("inf")
