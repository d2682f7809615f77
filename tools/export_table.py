"""Export every algorithm with small random networks in every format, and print the table of lit_offrl/export/README.md.

python tools/export_table.py
python tools/export_table.py --algorithms DTQL IQL --formats onnx
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # where the small networks are described


def main() -> None:
    from lit_offrl.algorithms import ALGORITHMS
    from lit_offrl.export.formats import FORMATS

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--algorithms", nargs="+", default=sorted(ALGORITHMS), metavar="NAME", help="by default all")
    parser.add_argument("--formats", nargs="+", default=[*FORMATS], metavar="NAME", help="by default all")
    options = parser.parse_args()
    print("| algorithm | noise inputs | " + " | ".join(options.formats) + " |")
    print("|---" * (2 + len(options.formats)) + "|")
    for name in options.algorithms:
        print(f"| {name} | {' | '.join(row(name, options.formats))} |", flush=True)


def row(name: str, formats: list[str]) -> list[str]:
    """Return the noise inputs of an algorithm, and for each format the largest difference and the size, or a reason."""
    from tiny import nested, tiny_options

    from lit_offrl.algorithms import ALGORITHMS
    from lit_offrl.errors import RunFailure, UserError
    from lit_offrl.export.formats import FORMATS
    from lit_offrl.export.graph import trace_policy
    from lit_offrl.export.parity import typical_observations
    from lit_offrl.export.write import write_and_compare
    from lit_offrl.policy import Policy

    torch.manual_seed(0)
    algorithm = ALGORITHMS[name](3, 2, **nested(tiny_options(name)))
    algorithm.gradient_step = 10**6  # at the end of the training
    policy = Policy(algorithm)
    try:
        graph = trace_policy(policy)
    except UserError as error:
        return [str(error), *["no"] * len(formats)]
    shapes = ("x".join("n" if size is None else str(size) for size in each.shape) for each in graph.noise)
    cells = [", ".join(f"{each.name} {shape}" for each, shape in zip(graph.noise, shapes, strict=True)) or "none"]
    for kind in formats:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "policy" + FORMATS[kind].suffix)
            try:
                parity = write_and_compare(policy, graph, path, kind, typical_observations(policy))
            except (UserError, RunFailure) as error:
                cells.append(str(error))
                continue
            beyond = f" ({parity.states_beyond} above 1e-5)" if parity.states_beyond else ""
            cells.append(f"{parity.max_difference:.0e}{beyond}, {path.stat().st_size / 1000:.0f} kB")
    return cells


if __name__ == "__main__":
    main()
