"""Training on both ends of the range of Lightning versions that pyproject.toml declares."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

(DECLARED,) = re.findall(r'"lightning(>=[^"]+)"', (REPOSITORY / "pyproject.toml").read_text())
OLDEST = re.findall(r">=([\d.]+)", DECLARED)[0]

# One process per version does it all, because an import of torch takes longer than these trainings.
SCRIPT = """
import sys
from pathlib import Path

import lightning
from lightning.pytorch.strategies import DDPStrategy
from lit_offrl.cli import main

print("lightning", lightning.__version__, Path(lightning.__file__).parent.parent)
root = Path(sys.argv[1])
options = {
    "model": "DTQL",
    "model.init_args.hidden_dim": 16,
    "model.init_args.pretrain_steps": 20,
    "model.init_args.behavior_sampling_steps": 2,
    "data.dataset": "bandit/8gaussians",
    "data.batch_size": 8,
    "data.block_size": 8,
    "data.steps_per_epoch": 20,
    "bandit.samples": 50,
    "bandit.figures": False,
    "checkpoint.keep_every_n_epochs": 1,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
}

def words(folder, steps, *extra):
    given = {**options, "trainer.max_steps": steps, "trainer.default_root_dir": root / folder}
    return ["fit", *(f"--{name}={value}" for name, value in given.items()), *extra]

assert main(words("whole", 50)) == 0
assert main(words("parts", 20)) == 0
assert main(words("parts", 50, "--ckpt_path=last")) == 0
(last,) = (root / "parts").rglob("last.ckpt")
assert main(["validate", f"--ckpt_path={last}"]) == 0
# The package assigns the timeout of process groups, which would create a new attribute if this one were renamed.
assert "_timeout" in vars(DDPStrategy())
"""


def install(requirement: str, folder: Path) -> None:
    """Install one version of Lightning alone into a folder, or skip the test where pip cannot fetch the package."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"pip cannot fetch {requirement}: {done.stderr.strip().splitlines()[-1]}")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table without the measured times."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("requirement", [f"lightning=={OLDEST}", f"lightning{DECLARED}"], ids=["oldest", "newest"])
def test_fit_resume_and_validate(requirement: str, tmp_path: Path):
    packages, root = tmp_path / "packages", tmp_path / "runs"
    install(requirement, packages)
    paths = [str(packages), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    version, _, where = done.stdout.splitlines()[0].removeprefix("lightning ").partition(" ")
    assert where == str(packages)
    assert requirement != f"lightning=={OLDEST}" or version.removesuffix(".0") == OLDEST.removesuffix(".0")

    whole, parts = (next((root / name).rglob("results.json")).parent for name in ("whole", "parts"))
    trained, validated = (json.loads((folder / "results.json").read_text()) for folder in (whole, parts))
    assert (trained["stage"], trained["gradient_steps"]) == ("fit", 50)
    assert (validated["stage"], validated["gradient_steps"]) == ("validate", 50)
    assert trained["versions"]["lightning"] == version

    rows = read_csv(whole / "metrics.csv")
    # Epochs of 20 steps are blocks of 8, 8 and 4; the last epoch is cut at step 50.
    blocks = [8, 16, 20, 28, 36, 40, 48, 50]
    assert [int(float(row["step"])) for row in rows if row["train/behavior_loss"]] == blocks
    # Policy losses begin with the main phase: rows of pretraining have none, and no row repeats an earlier block.
    assert [int(float(row["step"])) for row in rows if row["train/policy_loss"]] == blocks[3:]
    losses = [row["train/behavior_loss"] for row in rows if row["train/behavior_loss"]]
    assert len(set(losses)) == len(blocks)
    resumed = read_csv(parts / "metrics.csv")
    assert [row for row in resumed if row["train/behavior_loss"]] == [row for row in rows if row["train/behavior_loss"]]
