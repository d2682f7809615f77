"""The `report` subcommand."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lit_offrl.cli.parser import CommandParser
from lit_offrl.errors import UserError, require

if TYPE_CHECKING:
    from lit_offrl.report.rows import Report


def run_report(words: list[str]) -> int:
    """Run `report FOLDER ...`; return the exit code."""
    parser = CommandParser(
        prog="python -m lit_offrl report",
        description="Tables, learning curves and confidence intervals of the runs below some folders.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="where runs lie, e.g. runs/")
    parser.add_argument("--output", type=Path, metavar="DIR", help="by default report/ in the first FOLDER")
    parser.add_argument("--all", action="store_true", help="include runs that are not finished, marked")
    parser.add_argument("--last", type=int, default=5, metavar="K", help="average the last K evaluations, too (5)")
    parser.add_argument("--best", action="store_true", help="show each run's best evaluation, too; it is optimistic")
    options = parser.parse_args(words)
    require(options.last >= 1, "--last", "at least 1", options.last)

    from lit_offrl.report.page import document, to_markdown
    from lit_offrl.report.rows import Report
    from lit_offrl.report.runs import find_runs

    runs = find_runs(options.folders, warn=lambda line: sys.stderr.write(f"warning: {line}\n"))
    used = [run for run in runs if run.finished or options.all]
    if not used:
        raise UserError(f"none of {len(runs)} runs is finished: --all reports them nevertheless")
    notes = [f"{len(runs) - len(used)} of {len(runs)} runs are not finished and left out; --all includes them."]
    notes *= len(used) < len(runs)
    report = Report(used, last=options.last, best=options.best, notes=notes)
    output = options.output or options.folders[0] / "report"
    written = _write(report, output)
    sys.stdout.write(to_markdown(document(report, [])))
    pictures = sum(name.endswith(".png") for name in written)
    others = ", ".join(name for name in written[1:] if not name.endswith(".png"))
    sys.stdout.write(f"wrote {output / written[0]}; beside it {others} and {pictures} pictures\n")
    return 0


def _write(report: Report, output: Path) -> list[str]:
    """Write all files; return their names."""
    from lit_offrl.report import page, plots

    colors = plots.colors_of(report.algorithms)
    figures = {page.curve_name(task): plots.learning_curves(report, task, colors) for task in report.tasks}
    for comparison in report.comparisons:
        if comparison.tasks:
            figures[f"profiles_{comparison.scale}.png"] = plots.profiles(comparison, colors)
            if 1 < len(comparison.scores) <= plots.MOST_COMPARED:
                figures[f"improvement_{comparison.scale}.png"] = plots.improvement(comparison)
    for task in report.tasks:
        if selections := report.selections_of(task):
            figures[page.selection_name(task)] = plots.policy_selection(selections)
    pictures = {name: plots.png(figure) for name, figure in figures.items() if figure is not None}
    document = page.document(report, list(pictures))
    method = "\n\n".join(("", "## How to read it", *page.METHOD)) + "\n"
    files: dict[str, bytes] = {
        "report.html": page.to_html(document, pictures).encode(),
        "report.md": (page.to_markdown(document) + method).encode(),
        "report.tex": page.to_latex(report).encode(),
        "report.csv": page.to_csv(report).encode(),
        **pictures,
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=output) as folder:  # all files, or none
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            for name in files:
                Path(folder, name).replace(output / name)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}): choose another with --output") from error
    return list(files)
