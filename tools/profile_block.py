"""Measure how much wall time of a training block is spent outside `update`.

    python tools/profile_block.py [--dataset offrl/antmaze/umaze-v0] [--batch-size 256] [--blocks 6]

Trains DTQL with all loggers and callbacks of the command `fit`, and measures the time of `update`, of drawing a block,
and of everything else (Lightning's loop, logging, progress bar).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from lit_offrl.algorithms import DTQL
from lit_offrl.cli import main as command_line
from lit_offrl.data.transitions import BlockSampler


def timed(name: str, function: Callable[..., Any], seconds: dict[str, list[float]]) -> Callable[..., Any]:
    """Return `function` with a measurement: each call appends its duration to `seconds[name]`."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name].append(time.perf_counter() - started)

    return wrapper


def profile(dataset: str, batch_size: int, blocks: int, block_size: int = 50) -> dict[str, float]:
    """Return the mean seconds per block of each part, without the first two blocks, which warm up caches."""
    seconds: dict[str, list[float]] = defaultdict(list)
    ends: list[float] = []
    originals = (DTQL.update, DTQL.training_step, BlockSampler._block)
    step = timed("training step", DTQL.training_step, seconds)

    def training_step(self: DTQL, *args: Any) -> None:
        step(self, *args)
        ends.append(time.perf_counter())

    DTQL.update = timed("update", DTQL.update, seconds)  # type: ignore[method-assign]
    DTQL.training_step = training_step  # type: ignore[method-assign]
    BlockSampler._block = timed("gather", BlockSampler._block, seconds)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as root:
            code = command_line([
                "fit", "--model=DTQL", "--model.init_args.nll_weight=1", "--model.init_args.pretrain_steps=0",
                f"--data.dataset={dataset}", f"--data.batch_size={batch_size}", f"--data.block_size={block_size}",
                "--evaluation.enabled=false", f"--trainer.max_steps={(blocks + 2) * block_size}",
                f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu",
            ])  # fmt: skip
        if code != 0:
            raise SystemExit(code)
    finally:
        DTQL.update, DTQL.training_step, BlockSampler._block = originals  # type: ignore[method-assign]
    update = sum(seconds["update"][2 * block_size :]) / blocks
    inside = sum(seconds["training step"][2:]) / blocks
    return {
        "block": (ends[-1] - ends[1]) / blocks,
        "update": update,
        "targets, means, logging call": inside - update,
        "gathering the block": sum(seconds["gather"][2:]) / blocks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="offrl/antmaze/umaze-v0")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=6, help="number of measured blocks")
    options = parser.parse_args()
    parts = profile(options.dataset, options.batch_size, options.blocks)
    total = parts.pop("block")
    rest = total - sum(parts.values())
    print(f"{'one block of 50 updates':32} {1000 * total:8.1f} ms")
    for name, value in {**parts, "Lightning, loggers, callbacks": rest}.items():
        print(f"  {name:30} {1000 * value:8.1f} ms  {100 * value / total:5.1f}%")
    print(f"outside update: {100 * (1 - parts['update'] / total):.1f}%")


if __name__ == "__main__":
    main()
