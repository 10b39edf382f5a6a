"""The figures of README.md and of the cards are those of the comparisons under bench/results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from batchkern.strategies import STRATEGIES

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("strategy_tables", ROOT / "bench" / "strategy_tables.py")
tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tables)
FILES = sorted(ROOT.glob("bench/results/*/*-compare-*.json"))


def test_there_are_comparisons_of_five_seeds():
    compared = [json.loads(path.read_text())["settings"] for path in FILES]
    assert {settings["train"]["name"] for settings in compared} >= {"digits", "cifar10-train.parquet"}
    assert all(len(settings["seeds"]) >= 5 for settings in compared)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_tables_and_findings_are_those_measured(path):
    results = json.loads(path.read_text())
    readme = (ROOT / "README.md").read_text()
    for budget in results["settings"]["budgets"]:
        assert tables.table(results, budget) in readme
    for strategy in STRATEGIES:
        lines = tables.findings(results, strategy)
        assert lines
        assert "\n".join(lines) in (ROOT / "docs" / "strategies" / f"{strategy}.md").read_text()
