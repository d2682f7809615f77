"""Collect every dataset of the catalog at its default size into Minari's local root, and print a table.

    python tools/collect_all.py [offrl/antmaze/umaze-v0 ...] [--processes 2]

Datasets that exist are not collected again; the table then has no time for them.
"""

from __future__ import annotations

import argparse
import time

from lit_offrl.collect.catalog import CATALOG
from lit_offrl.collect.recorder import collect_dataset
from lit_offrl.data.sources.minari import is_present, minari_root, read_metadata

COLUMNS = ("dataset", "steps", "episodes", "seconds", "mean return", "success", "mean score", "MB")


def describe(dataset_id: str, seconds: float | None) -> str:
    """Return the dataset's line of the table."""
    metadata = read_metadata(dataset_id)
    facts = metadata["collection"]
    episodes = metadata["total_episodes"]
    mean = sum(facts["mean_returns"][kind] * number for kind, number in facts["episodes"].items()) / episodes
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")  # none where success is the score
    size = (minari_root() / dataset_id / "data" / "main_data.hdf5").stat().st_size
    cells = (
        dataset_id,
        f"{metadata['total_steps']:,}",
        f"{episodes:,}",
        "-" if seconds is None else f"{seconds:.0f}",
        f"{mean:.4g}",
        f"{facts['success_fraction']:.2f}" if "success_fraction" in facts else "-",
        "-" if low is None else f"{100 * (mean - low) / (high - low):.1f}",
        f"{size / 1e6:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", help="ids; by default the whole catalog")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for dataset_id in arguments.datasets or CATALOG:
        seconds = None
        if not is_present(dataset_id):
            begin = time.monotonic()
            collect_dataset(dataset_id, processes=arguments.processes)
            seconds = time.monotonic() - begin
        print(describe(dataset_id, seconds), flush=True)


if __name__ == "__main__":
    main()
