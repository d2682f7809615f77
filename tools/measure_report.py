"""Measure time and memory of `report` on thousands of synthetic run folders.

    python tools/measure_report.py [--runs 5000]

25 algorithms, 40 tasks, 5 seeds, with 20 evaluations of 10 episodes each.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # where a run folder of a given score is written


def main() -> None:
    from test_report import write_run

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5000)
    count = parser.parse_args().runs
    draw = random.Random(0).gauss
    with tempfile.TemporaryDirectory() as root:
        for algorithm, task, seed in islice(product(range(25), range(40), range(5)), count):
            evaluations = {50_000 * (i + 1): [draw(50, 10) for _ in range(10)] for i in range(20)}
            score = draw(50 + algorithm, 10)
            names = f"algorithm_{algorithm}", f"suite/task_{task}-v0"
            write_run(Path(root), *names, seed, score, evaluations=evaluations)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lit_offrl", "report", root], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor, memory = used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
    print(f"{seconds:.1f} s, {processor:.1f} s of processor time, {memory:.0f} MB, {count:,} runs")


if __name__ == "__main__":
    main()
