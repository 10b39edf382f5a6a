"""The tables of README.md and docs/ from the results.json of a comparison: ``python bench/strategy_tables.py FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from batchkern.compare.report import costs, effects

KEPT = ("reach", "gap (points)", "epochs", "cost")
"""Of the columns of costs; seconds depend on what else the machine did."""


def rows(results: dict[str, Any], budget: str) -> list[list[str]]:
    """Headings and a row for each arm of a budget."""
    headings, *lines = costs(results, budget)
    places = [headings.index(name) for name in KEPT]
    effect, *arms = effects(results, budget)
    table = [[*effect, *(headings[place] for place in places)]]
    for own, cost in zip(arms, lines, strict=True):
        table.append([f"`{own[0]}`", *own[1:], *(cost[place] for place in places)])
    return table


def markdown(table: list[list[str]]) -> str:
    headings, *lines = table
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *lines))


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text())
    for name in found["settings"]["budgets"]:
        print(f"\nAt equal {name}:\n\n{markdown(rows(found, name))}")
