"""Time one action at one state, by `policy.act` and by ONNX Runtime, with the papers' networks and random weights.

python tools/latency.py
python tools/latency.py --methods iql dtql --seconds 5
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml

CONFIGS = Path(__file__).parents[1] / "conf"
OBSERVATION_DIM, ACTION_DIM = 17, 6  # walker2d's


def main() -> None:
    methods = [path.stem.removesuffix("_mujoco") for path in sorted(CONFIGS.glob("*_mujoco.yaml"))]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=methods, metavar="NAME", help="by default all of conf/")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each is timed (3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| method | policy.act p50 | p99 | ONNX Runtime p50 | p99 |\n|---|---|---|---|---|")
    for method in options.methods:
        print(row(method, options.seconds), flush=True)
    print(f"\nmilliseconds; load average at the end {os.getloadavg()[0]:.1f}")


def row(method: str, seconds: float) -> str:
    """Return the line of a method."""
    from lit_offrl.algorithms import ALGORITHMS
    from lit_offrl.errors import UserError
    from lit_offrl.policy import Policy

    model = yaml.safe_load((CONFIGS / f"{method}_mujoco.yaml").read_text())["model"]
    torch.manual_seed(0)
    algorithm = ALGORITHMS[model["class_path"]](OBSERVATION_DIM, ACTION_DIM, **model["init_args"])
    algorithm.gradient_step = 10**9  # at the end of the training
    policy = Policy(algorithm)
    state = np.zeros(OBSERVATION_DIM, dtype=np.float32)

    def act() -> object:
        return policy.act(state, 0.0)  # the reward is for the Decision Transformer

    cells = percentiles(act, seconds)
    try:
        cells += percentiles(in_onnx_runtime(policy, state), seconds)
    except UserError as error:
        cells += [str(error).partition(":")[2].strip()[:90], ""]
    return f"| {model['class_path']} | {' | '.join(cells)} |"


def in_onnx_runtime(policy, state: np.ndarray) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    """Return what draws noise and runs the exported policy."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    from lit_offrl.errors import UserError
    from lit_offrl.export.formats import write_onnx
    from lit_offrl.export.graph import trace_policy

    graph = trace_policy(policy)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "policy.onnx")
        try:
            write_onnx(graph, path)
        except Exception as error:
            raise UserError(f"export: no ONNX ({type(error).__name__})") from error
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    draws = {"normal": random.standard_normal, "exponential": random.standard_exponential}

    def act() -> object:
        noise = {
            each.name: draws[each.distribution]([1 if size is None else size for size in each.shape], dtype=np.float32)
            for each in graph.noise
        }
        return session.run(None, {"observations": state[None], **noise})

    return act


def percentiles(act: Callable[[], object], seconds: float) -> list[str]:
    """Return the median and the 99th percentile of a call, in milliseconds."""
    times, end = [], time.perf_counter() + seconds
    for _ in range(10):  # the first calls allocate memory
        act()
    while len(times) < 20 or time.perf_counter() < end:
        start = time.perf_counter()
        act()
        times.append(1000 * (time.perf_counter() - start))
    return [f"{value:.2f}" for value in np.percentile(times, [50, 99])]


if __name__ == "__main__":
    main()
