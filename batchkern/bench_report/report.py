"""The report of the benchmarks: a page with all tables of the given files; written into a folder, it also has plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchkern.bench_report.comparisons import findings, reproduced, strategies
from batchkern.bench_report.markdown import paragraphs
from batchkern.bench_report.operations import detail, name
from batchkern.bench_report.results import COMPARISON, REPRODUCTION, Results, facts, read_text, rendering
from batchkern.bench_report.tables import about, accuracy, confident, growth_table, language, sweeps, training
from batchkern.compare.arms import BUDGETS
from batchkern.errors import UserError, require
from batchkern.files import make_directory, slug, write_file
from batchkern.plots import plot_fractions
from batchkern.strategies import STRATEGIES

REPORT = "report.md"
FIRST_LINE = "<!-- made by batchkern bench report -->"


def page(found: Sequence[Results], plots: bool = False) -> str:
    """The report of all files, as Markdown. With ``plots`` it links to the plots that :func:`write_report` writes into
    the same folder."""
    sections = []
    for results in found:
        with rendering(results):
            sections.append(_section(results, plots))
    return paragraphs(FIRST_LINE, "# Benchmarks", *sections) + "\n"


def _section(results: Results, plots: bool) -> str:
    heading = f"## {results.path.absolute().parent.name}/{results.path.name}"
    if results.sort == COMPARISON:
        return paragraphs(heading, facts(results), *_comparison(results))
    if results.sort == REPRODUCTION:
        return paragraphs(heading, facts(results), reproduced(results))
    operations = results.rows("operations")
    by_op = {
        op: [row for row in operations if row["op"] == op] for op in dict.fromkeys(row["op"] for row in operations)
    }
    parts = {
        "Not measured": "\n".join(
            f"- {what} {case}"
            for key, what in (("failed", "failed:"), ("left_out", "left out:"))
            for case in results.rows(key)
        ),
        **{f"`{op}`": detail(rows) for op, rows in by_op.items()},
        "Growth": growth_table(results),
        "Fraction of the floor": _images(results) if plots else "",
        "Training": training(results),
        "Accuracy": paragraphs(accuracy(results), confident(results)),
        "Language model": language(results),
    }
    written = [paragraphs(f"### {part}", text) for part, text in parts.items() if text]
    return paragraphs(heading, facts(results), *written)


def _comparison(results: Results) -> list[str]:
    tables = [
        paragraphs(f"### At {BUDGETS[budget]}", strategies(results, budget))
        for budget in results.content["settings"]["budgets"]
    ]
    found = {strategy: findings(results.content, strategy) for strategy in STRATEGIES}
    return tables + [paragraphs(f"### {strategy}", "\n".join(lines)) for strategy, lines in found.items() if lines]


def _images(results: Results) -> str:
    return "\n\n".join(f"![{title}]({file})" for file, (title, _, _) in _figures(results).items())


def _figures(results: Results) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """The plots of all sweeps that have fractions of a floor: file name -> title, label of the sizes, lines."""
    found = {}
    for sweep in sweeps(results.rows("growth")):
        row = next(iter(sweep.values()))
        lines = {
            name(variant).strip("`"): points
            for variant, line in sweep.items()
            if (points := _points(line["sizes"], line.get("fractions") or []))
        }
        if lines:
            title = ", ".join(part for part in (row["op"], about(row)) if part)
            file = slug(f"{results.path.absolute().parent.name}-{results.path.stem}-{row['along']}-{title}") + ".png"
            found[file] = (title, row["along"], lines)
    return found


def _points(sizes: Sequence[float], fractions: Sequence[float | None]) -> list[tuple[float, float]]:
    return [(size, fraction) for size, fraction in zip(sizes, fractions, strict=False) if fraction is not None]


def write_report(found: Sequence[Results], out: Path) -> list[str]:
    """Writes report.md, and a plot for each sweep that has fractions of a floor; returns the names of the files.

    Raises:
        UserError: ``out`` has files of these names that do not belong to an earlier report, or cannot be written.
    """
    text = page(found, plots=True)  # before anything is written, since a damaged file raises an error
    figures = {file: figure for results in found for file, figure in _figures(results).items()}
    if figures:
        require("matplotlib", "train")
    _claim(out, list(figures))
    for file, (title, along, lines) in figures.items():
        plot_fractions(out / file, lines, along, title)
    write_file(out / REPORT, text.encode())
    return [REPORT, *figures]


def _claim(out: Path, figures: Sequence[str]) -> None:
    """Creates the folder. Only files of an earlier report may be replaced: a page that begins with :data:`FIRST_LINE`,
    and the plots to which it links.

    Raises:
        UserError: another file has one of the names, or the folder cannot be used.
    """
    make_directory(out)
    try:
        old = read_text(out / REPORT) if (out / REPORT).exists() else ""
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    ours = old.startswith(FIRST_LINE)
    taken = [REPORT] if old and not ours else []
    taken += [name for name in figures if (out / name).exists() and not (ours and f"({name})" in old)]
    if taken:
        raise UserError(f"{out / taken[0]} exists and is not of an earlier report; give another --out")
