"""The `export` subcommand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lit_offrl.cli.parser import CommandParser
from lit_offrl.errors import require

if TYPE_CHECKING:
    from torch import Tensor

    from lit_offrl.policy import Policy


def run_export(words: list[str]) -> int:
    """Run `export`; return the exit code."""
    parser = CommandParser(
        prog="python -m lit_offrl export",
        description="Write a trained policy to a file that acts without this package, and compare both.",
    )
    parser.add_argument("--ckpt_path", required=True, type=Path, metavar="FILE", help="the checkpoint")
    parser.add_argument("--format", required=True, metavar="NAME", help="onnx, torch_export or torchscript")
    parser.add_argument("--actor", default="policy", help="which actor of the algorithm, e.g. behavior (policy)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="by default RUN/export/ACTOR_FORMAT/policy.SUFFIX")
    parser.add_argument(
        "--data.dataset",
        dest="dataset",
        metavar="ID",
        help="compare at 1,000 of its states; by default, at normal states of the mean and deviation in the checkpoint",
    )
    options = parser.parse_args(words)

    from lit_offrl.export.formats import FORMATS
    from lit_offrl.export.parity import typical_observations
    from lit_offrl.export.write import MANIFEST, check_output, export_policy
    from lit_offrl.policy import load_policy

    folder = options.ckpt_path.parent
    run = folder.parent if folder.name == "checkpoints" else folder
    suffix = FORMATS[options.format].suffix if options.format in FORMATS else ""
    output = options.output or run / "export" / f"{options.actor}_{options.format}" / f"policy{suffix}"
    check_output(output, options.format)
    policy = load_policy(options.ckpt_path, options.actor)
    observations = states_of(options.dataset, policy) if options.dataset else typical_observations(policy)
    parity = export_policy(policy, output, options.format, observations)
    size = output.stat().st_size / 1e6
    sys.stdout.write(f"{parity}\nwrote {output} ({size:.2f} MB) and {MANIFEST} beside it\n")
    return 0


def states_of(dataset: str, policy: Policy) -> Tensor:
    """Return states of a dataset, spread evenly over it, `[n, observation_dim]`."""
    import numpy as np
    import torch

    from lit_offrl.data import sources
    from lit_offrl.export.parity import STATES

    transitions, _ = sources.load(dataset)
    width, found = policy.spec.observation_dim, transitions.observation_dim
    require(found == width, "--data.dataset", f"of observations of {width} dimensions", found)
    rows = np.linspace(0, len(transitions) - 1, min(STATES, len(transitions))).astype(int)
    return torch.from_numpy(transitions.observations[rows])
