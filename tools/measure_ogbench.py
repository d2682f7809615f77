"""Measure how many steps per second one core makes in each of OGBench's environments, and what a reset takes.

    python tools/measure_ogbench.py [--steps 1000]

Actions are random. Seconds are those that the process had a core, so that other processes do not matter.
"""

from __future__ import annotations

import argparse
import time

from lit_offrl.data.info import EnvironmentInfo
from lit_offrl.data.sources.ogbench import OGBENCH_FILES, OGBENCH_NAMESPACE, environment_name, task_name
from lit_offrl.envs.make import make_env


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    print("| environment | observation | action | limit | steps per s | reset, ms | build, s |")
    print("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(environment_name(task_name(file)) for file in OGBENCH_FILES):
        begin = time.process_time()
        env = make_env(EnvironmentInfo(OGBENCH_NAMESPACE + name, {}, None))
        observation, _ = env.reset(seed=0)
        built = time.process_time()
        for seed in range(5):
            env.reset(seed=seed)
        start = time.process_time()
        for _ in range(steps):
            env.step(env.action_space.sample())
        end = time.process_time()
        sizes = f"{len(observation)} | {env.action_space.shape[0]} | {env.spec.max_episode_steps:,}"
        label = name.removesuffix("-singletask-v0")
        times = f"{steps / (end - start):,.0f} | {200 * (start - built):.0f} | {built - begin:.1f}"
        print(f"| {label} | {sizes} | {times} |", flush=True)
        env.close()


if __name__ == "__main__":
    main()
