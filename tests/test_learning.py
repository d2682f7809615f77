"""Learning on real data, with the quick settings a user is given; minutes each: `pytest -m slow`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_offrl.cli import main


@pytest.mark.slow
@pytest.mark.parametrize("maze", ["umaze", "medium"])
def test_quick_pointmaze_reaches_the_planner(maze: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    dataset = f"offrl/pointmaze/{maze}-v0"
    assert (
        main(
            [
                "fit",
                "--config=quick/dtql_pointmaze",
                f"--data.dataset={dataset}",
                f"--trainer.default_root_dir={tmp_path}",
            ]
        )
        == 0
    )
    results = json.loads((tmp_path / "dtql" / dataset / "seed_0" / "results.json").read_text())
    assert results["scores"]["success_rate"] >= 0.95 * results["score_reference"]["max"]
    assert results["dataset_return_mean"] < 0.6
