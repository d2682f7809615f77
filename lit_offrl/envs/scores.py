"""Normalized scores: which return scores 0, which 100, and who measured the two."""

from __future__ import annotations

from lit_offrl.data.info import DatasetInfo, ScoreReference
from lit_offrl.data.sources import source_of


def reference_for(info: DatasetInfo) -> ScoreReference | None:
    """Return the reference that the dataset's own source gives; None where that is unknown or its range is empty."""
    reference = source_of(info).reference(info)
    return reference if reference is not None and reference.minimum < reference.maximum else None
