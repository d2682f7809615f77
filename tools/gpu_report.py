"""Everything that a GPU decides, in one report: correctness, speed, kernels, distance to the floor, seeds side by side.

    python tools/gpu_report.py --output gpu.md
    python tools/gpu_report.py --device cpu --batch-sizes 64 --sections losses,speed --rounds 1

Sections, each of which can be chosen by `--sections`:

- `losses`: losses of a block of every phase from the same state, batch and noise, by their largest relative change:
  eager and compiled updates on the device to eager ones on the CPU, a CUDA graph to eager ones on the device.
- `speed`: gradient steps per second of every phase at each batch size, eager, compiled, captured (`benchmark.py`).
- `kernels`: kernels per step, the share of their time in matrix products, and how far a step is from the floor: the
  time that its FLOPs take at the measured rate of large products, or that Adam takes to read and write its numbers at
  the measured rate of copies, whichever is longer.
- `seeds`: steps per second of several processes that train at once on one device, in all and beside one alone.
  Start NVIDIA's MPS daemon before to measure with it; the report says whether it runs.
- `run`: the README's first command on the device: seconds of training and of evaluation, and the score.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import benchmark
import torch
from benchmark import TRANSITIONS
from torch.profiler import ProfilerActivity, profile

from lit_offrl.algorithms.loop import train_block
from lit_offrl.algorithms.noise import Draw
from lit_offrl.batch import Batch

PRODUCTS = ("gemm", "gemv", "mm", "cutlass", "sgemm", "wgmma", "xmma", "cublas")  # in names of kernels and operators
BLOCK = 5
SEEDS_AT_ONCE = (1, 2, 5)
SECONDS_OF_SEEDS = 10.0


def settings(given: argparse.Namespace, variants: Sequence[str]) -> Iterator[benchmark.Setting]:
    """Yield every algorithm at every batch size."""
    for name in given.algorithms.split(","):
        for batch_size in map(int, given.batch_sizes.split(",")):
            yield benchmark.Setting(name, given.shape, batch_size, {}, given.device, variants)


def variants_on(device: str) -> list[str]:
    """Return the ways to run an update on a device."""
    return ["eager", "compiled", *(["captured"] if torch.device(device).type == "cuda" else [])]


# ------------------------------------------------------------------------------------------------------ correctness


def block_losses(
    setting: benchmark.Setting, phase: str, variant: str, device: str, noise_of_cpu: bool
) -> dict[str, float]:
    """Return the means that a block of updates reports, with batches drawn on the CPU, and perhaps the noise, too."""
    own = benchmark.Setting(setting.name, setting.shape, setting.batch_size, setting.options, device, (variant,))
    algorithm = own.build()
    benchmark.enter(algorithm, phase)
    if noise_of_cpu:
        noise = algorithm.noise
        noise._generator = torch.Generator().manual_seed(0)

        def draw_from_stream(draw: Draw) -> torch.Tensor:
            return draw.distribution(*draw.shape, generator=noise.generator).to(algorithm.device)

        noise.draw_from_stream = draw_from_stream  # type: ignore[method-assign]
    benchmark.VARIANTS[variant](algorithm)
    length = algorithm.segment_length
    block = next(benchmark.sampler(setting.shape, setting.batch_size, BLOCK, TRANSITIONS, "cpu", length))
    return train_block(algorithm, Batch(*(each if each is None else each.to(device) for each in block)))


def losses(given: argparse.Namespace) -> str:
    """Return the table of differences between the CPU and the device."""
    lines: list[list[benchmark.Cell]] = []
    for setting in settings(given, ("eager",)):
        if setting.batch_size != int(given.batch_sizes.split(",")[0]):
            continue  # one batch size shows it
        for phase in setting.build().phases():
            cells: list[benchmark.Cell] = [f"{setting.name}: {phase.name}"]
            for variant in ("eager", "compiled", "captured"):
                if variant not in variants_on(given.device):
                    cells.append(None)
                    continue
                # A CUDA graph draws its noise on the device: it is compared with eager updates there.
                on_cpu = variant != "captured"
                expected = block_losses(setting, phase.name, "eager", "cpu" if on_cpu else given.device, on_cpu)
                found = block_losses(setting, phase.name, variant, given.device, on_cpu)
                worst = max(abs(found[name] - value) / max(abs(value), 1e-3) for name, value in expected.items())
                cells.append(f"{worst:.1e}")
            lines.append(cells)
    return benchmark.table(("largest relative difference", "eager", "compiled", "captured"), lines)


# ------------------------------------------------------------------------------------------------------------ speed


def speed(given: argparse.Namespace) -> str:
    """Return gradient steps per second."""
    rows = [
        row
        for setting in settings(given, variants_on(given.device))
        for row in benchmark.training_rows(setting)
        if row.variant in benchmark.VARIANTS
    ]
    results = benchmark.measure(rows, given.rounds, given.device)
    rates: dict[tuple[str, int], dict[str, float]] = {}
    for row, result in zip(rows, results, strict=True):
        assert row.batch_size is not None
        rates.setdefault((f"{row.subject}: {row.what}", row.batch_size), {})[row.variant] = 1 / result.median
    lines: list[list[benchmark.Cell]] = [
        [name, str(batch_size), *(each.get(variant) for variant in ("eager", "compiled", "captured"))]
        for (name, batch_size), each in rates.items()
    ]
    return benchmark.table(("gradient steps per second", "batch", "eager", "compiled", "captured"), lines)


# ---------------------------------------------------------------------------------------------------------- kernels


def copy_rate(device: str, size: int = 1 << 26) -> float:
    """Return the bytes per second that a copy reads and writes, the best of several."""
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    taken = []
    for _ in range(8):
        started = benchmark.now(device)
        target.copy_(source)
        taken.append(benchmark.now(device) - started)
    return 2 * 4 * size / min(taken)


def kernels(given: argparse.Namespace) -> str:
    """Return kernels per step, the share of matrix products, and the distance to the floor, of eager updates."""
    on_gpu = torch.device(given.device).type == "cuda"
    gemm, copies = benchmark.gemm_rate(given.device, 4096 if on_gpu else 1024), copy_rate(given.device)
    lines: list[list[benchmark.Cell]] = []
    for setting in settings(given, ("eager",)):
        for phase in setting.build().phases():
            work = benchmark.our_steps(setting, phase.name, "eager", BLOCK)
            flops = benchmark.count_flops(work) or 0.0  # warms up, too
            started = benchmark.now(given.device)
            work()
            step = (benchmark.now(given.device) - started) / BLOCK
            activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
            with profile(activities=[activity]) as profiled:
                work()
            events = [event for event in profiled.key_averages() if own_time(event, on_gpu) > 0]
            total = sum(own_time(event, on_gpu) for event in events)
            products = sum(
                own_time(event, on_gpu) for event in events if any(word in event.key.lower() for word in PRODUCTS)
            )
            parameters = moving_parameters(setting, phase.name)
            # Adam reads weight, gradient and two moments, and writes three of them.
            floor = max(flops / gemm, 4 * 7 * parameters / copies)
            lines.append(
                [
                    f"{setting.name}: {phase.name}",
                    str(setting.batch_size),
                    sum(event.count for event in events) / BLOCK,
                    f"{products / total:.0%}" if total else None,
                    1e3 * step,
                    1e3 * floor,
                    f"{step / floor:.1f}" if floor else None,
                ]
            )
    head = ("", "batch", "kernels per step", "time in products", "ms", "floor ms", "times the floor")
    unit = f"Large products {gemm / 1e12:.2f} TFLOP/s, copies {copies / 1e9:.0f} GB/s, both measured here."
    return f"{unit}\n\n{benchmark.table(head, lines)}"


def moving_parameters(setting: benchmark.Setting, phase: str) -> int:
    """Return the number of weights that the optimizers move in a phase."""
    algorithm = setting.build()
    benchmark.enter(algorithm, phase)
    length = algorithm.segment_length
    blocks = benchmark.sampler(setting.shape, setting.batch_size, 1, TRANSITIONS, setting.device, length)
    train_block(algorithm, next(blocks))
    return sum(weight.numel() for adam in algorithm.optimizer_set.adams.values() for weight in adam.state)


def own_time(event: Any, on_gpu: bool) -> float:
    """Return the time that a profiled operation took by itself, on the device."""
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)


# ------------------------------------------------------------------------------------------------------------ seeds


def train_for(seconds: float, setting: benchmark.Setting, begin: Any, counts: Any) -> None:
    """Count the steps of the last phase in some seconds, together with the other processes."""
    phase = setting.build().phases()[-1].name
    work = benchmark.our_steps(setting, phase, setting.variants[0], BLOCK)
    for _ in range(benchmark.WARM_UP):
        work()
    begin.wait()
    steps, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        work()
        if torch.device(setting.device).type == "cuda":
            torch.cuda.synchronize()
        steps += BLOCK
    counts.put(steps)


def seeds(given: argparse.Namespace) -> str:
    """Return the rates of several processes on one device."""
    context = multiprocessing.get_context("spawn")
    fastest = variants_on(given.device)[-1] if torch.device(given.device).type == "cuda" else "eager"
    lines: list[list[benchmark.Cell]] = []
    for setting in settings(given, (fastest,)):
        alone = None
        for number in SEEDS_AT_ONCE:
            begin, counts = context.Barrier(number), context.Queue()
            processes = [
                context.Process(target=train_for, args=(given.seconds, setting, begin, counts)) for _ in range(number)
            ]
            for process in processes:
                process.start()
            rate = sum(counts.get(timeout=600) for _ in processes) / given.seconds
            for process in processes:
                process.join()
            alone = alone or rate
            lines.append(
                [setting.name, str(setting.batch_size), str(number), fastest, rate, f"{rate / alone:.2f}"],
            )
    head = ("steps per second in all", "batch", "processes", "variant", "steps/s", "times one alone")
    mps = "runs" if shutil.which("nvidia-cuda-mps-control") and os.environ.get("CUDA_MPS_PIPE_DIRECTORY") else "is off"
    return f"NVIDIA's MPS {mps}.\n\n{benchmark.table(head, lines)}"


# -------------------------------------------------------------------------------------------------------------- run


def run(given: argparse.Namespace) -> str:
    """Return what the first command of the README takes, from start to end."""
    accelerator = "gpu" if torch.device(given.device).type == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "lit_offrl", "fit", "--config=quick/dtql_antmaze"]
        command += [f"--trainer.accelerator={accelerator}", f"--trainer.default_root_dir={root}", *given.run_options]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode:
            return f"`{' '.join(command[2:6])}` failed: {done.stderr.strip().splitlines()[-1]}"
        (file,) = Path(root).rglob("results.json")
        results = json.loads(file.read_text())
    times = results["time"]
    lines: list[list[benchmark.Cell]] = [
        ["from start to end", f"{seconds:.0f} s"],
        ["training", f"{times['train_s']:.0f} s, {times['gradient_steps_per_s']:.0f} steps/s"],
        ["evaluation", f"{times['eval_s']:.0f} s ({times['eval_s'] / seconds:.0%})"],
        ["score", str(results["scores"]["normalized"])],
    ]
    return benchmark.table(("quick/dtql_antmaze", ""), lines)


# ------------------------------------------------------------------------------------------------- the command line

SECTIONS = {each.__name__: each for each in (losses, speed, kernels, seeds, run)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report, and write it where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--algorithms", default="DTQL,BDPO,EDA,AEPO,QGPO")
    parser.add_argument("--shape", default="hopper", help=f"of {','.join(benchmark.SHAPES)}")
    parser.add_argument("--batch-sizes", default="256,2048,4096")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=SECONDS_OF_SEEDS, help="of each measurement of seeds")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--run-options", type=shlex.split, default=[], help="further options of the run, in quotes")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    if torch.device(given.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here: --device cpu shows what the report looks like")
    chosen = given.sections.split(",")
    if unknown := sorted({*chosen} - {*SECTIONS}):
        parser.error(f"no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    parts = [f"# {benchmark.machine(given.device)}"]
    for name in chosen:
        parts.append(f"## {name}\n\n{SECTIONS[name](given)}")
        print(parts[-1], end="\n\n", flush=True)
    if given.output is not None:
        given.output.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
