"""The tables of README.md and the findings in the cards of docs/, from the results.json of comparisons:
``python bench/strategy_tables.py FILE ...``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from batchkern.compare.report import costs, effects
from batchkern.strategies import STRATEGIES, parse

KEPT = ("reach", "gap (points)", "epochs", "cost")
"""Of the columns of costs; seconds depend on what else the machine did."""


def table(results: dict[str, Any], budget: str) -> str:
    """Markdown: a row for each arm of a budget."""
    headings, *lines = costs(results, budget)
    places = [headings.index(name) for name in KEPT]
    effect, *arms = effects(results, budget)
    rows = [[*effect, *(headings[place] for place in places)], ["---"] * (len(effect) + len(places))]
    rows += [
        [f"`{own[0]}`", *own[1:], *(cost[place] for place in places)] for own, cost in zip(arms, lines, strict=True)
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def findings(results: dict[str, Any], strategy: str) -> list[str]:
    """A line for each arm that is this strategy alone, at each budget that it has a training of its own for."""
    settings = results["settings"]
    noise = f", {settings['noise']:.0%} of the labels wrong" if settings["noise"] else ""
    data = (
        f"{Path(settings['train']['name']).stem} ({settings['train']['rows']:,} images{noise}), `{settings['model']}`"
    )
    lines = []
    for budget in settings["budgets"]:
        for arm, accuracy, baseline, p, control, control_p in effects(results, budget)[1:]:
            if [s.name for s in parse(arm, passive="")] != [strategy]:
                continue
            beside = f"; to `{settings['controls'][arm]}` {control} (p {control_p})" if control else ""
            lines.append(
                f"- {data}, equal {budget}: `{arm}` {accuracy} %; difference to the baseline {baseline} points "
                f"(p {p}){beside}."
            )
    return lines


if __name__ == "__main__":
    for path in sys.argv[1:]:
        found = json.loads(Path(path).read_text())
        for name in found["settings"]["budgets"]:
            print(f"\nAt equal {name}:\n\n{table(found, name)}")
        for name in STRATEGIES:
            print(f"\n{name}\n" + "\n".join(findings(found, name)))
