"""Writes a report as Markdown, HTML, LaTeX and CSV."""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_offrl.report import tables
from lit_offrl.report.rows import Comparison, Report, Task
from lit_offrl.report.statistics import RESAMPLES
from lit_offrl.report.tables import Table

METHOD = (
    "The score of a run is the policy's final score, after the last gradient step unless a note says otherwise. "
    "SD: sample standard deviation over seeds (divisor n - 1). SE: SD / sqrt(n).",
    "IQM: interquartile mean, the mean without the floor(n/4) lowest and the floor(n/4) highest of n runs. "
    f"[95%]: percentile interval of a stratified bootstrap ({RESAMPLES:,} resamples, fixed random seed) that draws "
    "seeds with replacement within each dataset. With fewer than about 5 seeds such intervals are too narrow; with a "
    "single seed there is none.",
    "last k: mean over seeds and over the last k evaluations during training. best (optimistic): each run's best "
    "evaluation, chosen with knowledge of the environment; do not publish it as a result. episodes: of each run's "
    "final evaluation. steps: gradient steps of the checkpoint that was scored.",
    "Over datasets: IQM of all runs together; mean of the datasets' means; performance profile, the share of runs "
    "above a score, averaged over datasets; probability of improvement, the share of pairs of runs on the same dataset "
    "in which the first algorithm scores higher (ties count half), averaged over datasets (Agarwal et al. 2021, "
    "arXiv 2108.13264).",
    "Scores of different references are neither compared nor combined. Published figures are shown, as printed, only "
    "beside D4RL's own file of the same id and version; environments and protocols of the papers may differ. "
    "The papers of EDA and AEPO do not print the versions of their datasets, so their figures are not shown.",
)
CURVES = (
    "Evaluations during training: mean over seeds and 95% interval. Dashed: the dataset's mean. Dotted: final scores "
    "of the behavior models, or of the policies without their Q."
)
SELECTION = (
    "Policy selection: the score of the best of some policies against the episodes by which it is chosen. Bands: 95% "
    "of the draws. Dashed: a perfect choice."
)


class Heading(NamedTuple):
    """A heading."""

    text: str
    level: int = 2


class Picture(NamedTuple):
    """A picture: the name of its PNG file and a caption."""

    name: str
    caption: str


Block = Heading | Picture | Table | list[str] | str  # a list is printed with bullets, a string is a paragraph


def curve_name(task: Task) -> str:
    """Return the file name of the learning curves of a task."""
    return f"curve_{_anchor(f'{task.dataset} {task.scale}')}.png"


def selection_name(task: Task) -> str:
    """Return the file name of the curve of policy selection of a task."""
    return f"selection_{_anchor(f'{task.dataset} {task.scale}')}.png"


def _anchor(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def document(report: Report, pictures: Sequence[str]) -> list[Block]:
    """Return the parts of a report in order; its pictures are those of `pictures`."""
    blocks: list[Block] = [Heading("Report of runs", 1)]
    if len(report.tasks) > 1:
        blocks.append(tables.overview(report))
    if (controls := tables.controls(report)) is not None:
        blocks.append(controls)
    for comparison in report.comparisons:
        blocks += _comparison(comparison)
    for task in report.tasks:
        blocks += [Heading(f"{task.dataset} ({task.scale})"), tables.details(report, task)]
        blocks += [*tables.published_lines(report.published[task]), Picture(curve_name(task), CURVES)]
        if (costs := tables.costs(report, task)) is not None:
            blocks.append(costs)
        if selections := report.selections_of(task):
            blocks += [tables.selection_table(selections), Picture(selection_name(task), SELECTION)]
    if report.bandits:
        blocks += [Heading("2-D bandits"), tables.bandits(report.bandits)]
    if report.notes:
        blocks += [Heading("Notes"), report.notes]
    return [block for block in blocks if not isinstance(block, Picture) or block.name in pictures]


def _comparison(comparison: Comparison) -> list[Block]:
    title = Heading(f"Over datasets ({comparison.scale})")
    names = ", ".join(comparison.scores)
    if not comparison.tasks:
        hint = "report folders of algorithms that share one"
        return [title, f"No dataset has runs of all {len(comparison.scores)} algorithms; {hint}."]
    blocks: list[Block] = [title, tables.aggregates(comparison)]
    if comparison.left_out:
        left_out = ", ".join(task.dataset for task in comparison.left_out)
        blocks.append(f"Left out, because not all of {names} have runs there: {left_out}.")
    if len(comparison.scores) > 1:
        blocks.append(tables.improvement_table(comparison))
    blocks.append(Picture(f"profiles_{comparison.scale}.png", "Performance profiles, with 95% intervals."))
    blocks.append(Picture(f"improvement_{comparison.scale}.png", "Probability of improvement, with 95% intervals."))
    return blocks


def to_markdown(blocks: Iterable[Block]) -> str:
    """Return the blocks as Markdown with aligned tables, which is readable as plain text."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {_inert(block.text)}\n")
        elif isinstance(block, Picture):
            parts.append(f"![{block.caption}]({block.name})\n")
        elif isinstance(block, Table):
            parts.append(f"{_markdown_table(block)}\n\n{_inert(block.caption)}\n")
        elif isinstance(block, list):
            parts.append("".join(f"- {_inert(line)}\n" for line in block))
        else:
            parts.append(f"{_inert(block)}\n")
    return "\n".join(parts)


def _inert(text: str) -> str:
    """Return text whose names of datasets and algorithms can be neither tags nor links in Markdown."""
    return text.replace("<", "&lt;").replace("](", "]\\(")


def _markdown_table(table: Table) -> str:
    columns = list(zip(table.columns, *table.rows, strict=True))
    for i, column in enumerate(columns):
        is_text = i < table.text_columns
        cells = [_inert(cell).replace("|", "\\|") for cell in column]
        width = max(3, *map(len, cells))
        rule = f":{'-' * (width - 1)}" if is_text else f"{'-' * (width - 1)}:"
        header, *rest = [cell.ljust(width) if is_text else cell.rjust(width) for cell in cells]
        columns[i] = (header, rule, *rest)
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


MOST_HEADINGS_WITHOUT_CONTENTS = 3


def to_html(blocks: Iterable[Block], pictures: Mapping[str, bytes]) -> str:
    """Return the blocks as one HTML page without other files: style and pictures are inside."""
    parts, contents = [], []
    for block in blocks:
        if isinstance(block, Heading):
            text, name = html.escape(block.text), html.escape(_anchor(block.text))
            parts.append(f'<h{block.level} id="{name}">{text}</h{block.level}>')
            if block.level > 1:
                contents.append(f'<li><a href="#{name}">{text}</a></li>')
        elif isinstance(block, Picture):
            data = base64.b64encode(pictures[block.name]).decode()
            text = html.escape(block.caption)
            image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
            parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
        elif isinstance(block, Table):
            parts.append(_html_table(block))
        elif isinstance(block, list):
            parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in block) + "</ul>")
        else:
            parts.append(f"<p>{html.escape(block)}</p>")
    method = "\n".join(f"<p>{html.escape(text)}</p>" for text in METHOD)
    if len(contents) > MOST_HEADINGS_WITHOUT_CONTENTS:
        parts.insert(1, f"<nav><ul>{''.join(contents)}</ul></nav>")  # after the title
    body, style = "\n".join(parts), Path(__file__).with_name("page.css").read_text()
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n<title>Report of runs</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n{body}\n<footer>\n<h2>How to read it</h2>\n{method}\n</footer>\n"
        "</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="word"' if i < table.text_columns else "" for i in range(len(cells))]
        inside = "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{inside}</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    return (
        f'<figure><div class="table"><table>\n<thead>{row(table.columns, "th")}</thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div><figcaption>{html.escape(table.caption)}</figcaption></figure>"
    )


def to_latex(report: Report) -> str:
    r"""Return the overview, the comparisons and the bandits as LaTeX tables, which need `\usepackage{booktabs}`."""
    shown = [tables.overview(report)] if report.tasks else []
    for comparison in report.comparisons:
        if comparison.tasks:
            shown.append(tables.aggregates(comparison))
            if len(comparison.scores) > 1:
                shown.append(tables.improvement_table(comparison))
    if report.bandits:
        shown.append(tables.bandits(report.bandits))
    return "% needs \\usepackage{booktabs}\n" + "\n".join(map(_latex_table, shown))


def _latex_table(table: Table) -> str:
    columns = "l" * table.text_columns + "r" * (len(table.columns) - table.text_columns)
    header, *rows = [" & ".join(map(_latex, row)) + r" \\" for row in (table.columns, *table.rows)]
    lines = "\n    ".join([r"\toprule", header, r"\midrule", *rows, r"\bottomrule"])
    return rf"""\begin{{table}}
  \centering
  \caption{{{_latex(table.caption)}}}
  \begin{{tabular}}{{{columns}}}
    {lines}
  \end{{tabular}}
\end{{table}}
"""


MINUS = "\N{MINUS SIGN}"
SPECIAL = {
    "\\": r"\textbackslash ",
    "~": r"\textasciitilde ",
    "^": r"\textasciicircum ",
    MINUS: "$-$",
    "±": r"$\pm$",
    ">": "$>$",
    "<": "$<$",
}
LATEX = str.maketrans(SPECIAL | {character: f"\\{character}" for character in "&%$#_{}"})


def _latex(text: str) -> str:
    return re.sub(r"(?<![\w$])-(?=\d)", MINUS, text).translate(LATEX)


def to_csv(report: Report) -> str:
    """Return the rows of `tables.flat_rows` as CSV; unknown values are empty."""
    rows = tables.flat_rows(report)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _no_formula(cell) for name, cell in row.items()} for row in rows)
    return text.getvalue()


def _no_formula(cell: Any) -> Any:
    """Return a cell that a spreadsheet takes for text where it would take it for a formula; numbers stay."""
    is_formula = isinstance(cell, str) and re.match(r"[=+@\t\r]|-(?![\d.])", cell)
    return f"'{cell}" if is_formula else cell
