"""Every measured figure of README.md, of docs/benchmarks.md and of the cards is that of a file under bench/results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("jinja2")

from batchkern.bench_report import check
from batchkern.bench_report.comparisons import findings
from batchkern.bench_report.markers import blocks
from batchkern.compare import ARMS
from batchkern.strategies import STRATEGIES, parse

ROOT = Path(__file__).parent.parent
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
COMPARISONS = sorted(ROOT.glob("bench/results/*/*-compare-*.json"))

MEASURED = re.compile(
    r"""(?<![\w.]) \d[\d,.]* \s?
        (?: [num]?s | seconds? | minutes? | [kMGT]?B(?:/s)? | [KMG]iB | [kMGT]?flop/s | (?:tokens|samples|images)/s
          | % | times | x (?!\s?[\d`]) )
        (?![\w-])
      | \d \s? ± | ± \s? \d | \de[-+]\d""",
    re.VERBOSE,
)
"""A number and a unit; but not ``128 x 10``, which is a shape."""
NUMBER = re.compile(r"\| *[-+(]?\d[\d,.]*\)? *(?=\|)")
"""A cell of nothing else: the unit may stand above it."""
NOT_MEASURED = (
    "95 % interval",  # of the confidence that intervals have
)


def outside(text: str) -> list[tuple[int, str]]:
    """Lines, with their numbers, that neither lie between markers nor in fenced code."""
    made = {
        number
        for block in blocks(README, text)
        for number in range(block.line, block.line + len(block.inside) + 2)  # and the two markers
    }
    found, fenced = [], False
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and number not in made:
            found.append((number, line))
    return found


def unsourced(text: str, tables: bool) -> list[str]:
    """Lines of tables, or of prose, that hold figures without a source."""
    found = []
    for number, line in outside(text):
        plain = line
        for phrase in NOT_MEASURED:
            plain = plain.replace(phrase, "")
        row = line.lstrip().startswith("|")
        if row == tables and (MEASURED.search(plain) or (row and NUMBER.search(plain))):
            found.append(f"line {number}: {line}")
    return found


@pytest.mark.parametrize(
    "page",
    [README, BENCHMARKS, ROOT / "docs" / "token-selection.md", ROOT / "docs" / "recipes.md"],
    ids=lambda page: page.name,
)
def test_blocks_are_those_of_their_files(page):
    assert blocks(page, page.read_text())
    assert check(page) == []


@pytest.mark.parametrize("page", [README, BENCHMARKS], ids=lambda page: page.name)
def test_tables_with_figures_have_a_source(page):
    assert unsourced(page.read_text(), tables=True) == []


@pytest.mark.parametrize("page", [README, BENCHMARKS], ids=lambda page: page.name)
def test_prose_has_no_measured_figures(page):
    assert unsourced(page.read_text(), tables=False) == []


SOURCED = """
<!-- figures: operations some.json -->
| `op` | 5.8 ms |
takes 5.8 ms
<!-- end of figures -->
```text
5.8 ms
```
| `op`, 128 x 10 fp32, keep .2 | C++ | not yet measured | 4096 rows | |
of 2-core 2.8 GHz, 128 x 10, AVX-512, torch 2.11.0, keep 0.2, ten minutes; 95 % interval; 4096 rows; layers1 s
"""


FIGURES = (
    *("5.8 ms", "124 us", "3ns", "81.8 s", "1,024 seconds", "12 minutes", "131 MB", "12 B", "4.8 TB/s"),
    *("989 Tflop/s", "5,005 tokens/s", "17 %", "1.6 times", "2.5x", "8 x as fast", "about 3x.", "98.77 ± 0.58"),
    *("±0.5", "1.7e-08"),
)


@pytest.mark.parametrize("figure", FIGURES)
def test_what_is_a_figure_without_a_source(figure):
    assert unsourced(SOURCED, tables=True) == unsourced(SOURCED, tables=False) == []
    assert len(unsourced(f"{SOURCED}\n| `op` | {figure} |\n", tables=True)) == 1
    assert len(unsourced(f"{SOURCED}\nIt takes {figure}, we find.\n", tables=False)) == 1


@pytest.mark.parametrize("figure", ["5", "98.77", "1,438", "-0.5", "(0.41)"])
def test_a_cell_of_a_number_is_a_figure(figure):
    assert len(unsourced(f"{SOURCED}\n| `op` | {figure} |\n", tables=True)) == 1
    assert unsourced(f"{SOURCED}\n{figure}\n", tables=False) == []


def test_there_are_comparisons_of_five_seeds():
    compared = [json.loads(path.read_text())["settings"] for path in COMPARISONS]
    assert {settings["train"]["name"] for settings in compared} >= {"digits", "cifar10-train.parquet"}
    assert all(len(settings["seeds"]) >= 5 for settings in compared)


def test_the_page_has_every_budget_of_every_comparison():
    shown = {(block.path.resolve(), *block.arguments) for block in blocks(BENCHMARKS, BENCHMARKS.read_text())}
    budgets = {path: json.loads(path.read_text())["settings"]["budgets"] for path in COMPARISONS}
    assert {(path, budget) for path, named in budgets.items() for budget in named} <= shown


def test_the_page_has_the_selections_of_tokens_on_noisy_and_on_clean_text():
    page = ROOT / "docs" / "token-selection.md"
    (block,) = (block for block in blocks(page, page.read_text()) if block.kind == "language")
    settings = json.loads(block.path.read_text())["settings"]
    assert 0 in settings["noise"]
    assert len(settings["noise"]) > 1


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_findings_of_the_cards_are_those_measured(path):
    results = json.loads(path.read_text())
    found = {strategy: findings(results, strategy) for strategy in STRATEGIES}
    assert any(found.values())
    for strategy, lines in found.items():
        assert "\n".join(lines) in (ROOT / "docs" / "strategies" / f"{strategy}.md").read_text()


def test_each_strategy_of_the_papers_and_the_control_were_compared_on_both_sets():
    compared = [json.loads(path.read_text()) for path in COMPARISONS]
    for strategy in ("random", *(parse(arm, passive="digits")[0].name for arm in ARMS[1:])):
        names = {results["settings"]["train"]["name"] for results in compared if findings(results, strategy)}
        assert names >= {"digits", "cifar10-train.parquet"}, strategy
