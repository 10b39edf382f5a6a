"""The figures of comparisons of strategies (from results.json) and of reproductions (from reproduction.json): tables
for README.md and docs/, and findings for docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batchkern.bench_report.markdown import table
from batchkern.bench_report.results import COMPARISON, REPRODUCTION, Results
from batchkern.compare.report import costs, effects
from batchkern.errors import UserError
from batchkern.recipes.reproduction import HEADINGS, cells, tally
from batchkern.strategies import parse

KEPT = ("reach", "gap (points)", "epochs", "cost")
"""The columns of ``costs`` that are shown. Seconds are left out, because they depend on the other load of the
machine."""


def strategies(results: Results, budget: str) -> str:
    """A table with a row for each arm of a budget; empty if the results are not a comparison.

    Raises:
        UserError: the comparison has no such budget.
    """
    if results.sort != COMPARISON:
        return ""
    budgets = results.content["settings"]["budgets"]
    if budget not in budgets:
        raise UserError(f"{results.path} has the budgets {', '.join(budgets)}, not {budget!r}")
    headings, *lines = costs(results.content, budget)
    places = [headings.index(name) for name in KEPT]
    effect, *arms = effects(results.content, budget)
    rows = [
        [f"`{own[0]}`", *own[1:], *(cost[place] for place in places)] for own, cost in zip(arms, lines, strict=True)
    ]
    return table([*effect, *(headings[place] for place in places)], rows)


def reproduced(results: Results) -> str:
    """The size of the trainings, a table of the published and the measured figures, and the number of rows that agree;
    empty if the results are not a reproduction."""
    if results.sort != REPRODUCTION:
        return ""
    groups = results.content["groups"]
    sizes = dict.fromkeys(
        f"{group['epochs']} epoch{'s' * (group['epochs'] > 1)} of {group['train_rows']:,} images, "
        f"{group['seeds']} seeds"
        for group in groups
    )
    metrics = dict.fromkeys(group["metric"] for group in groups)
    what = f"`{results.content['name']}` at scale {results.content['scale']:g}: {'; '.join(sizes)}."
    rows = [[f"`{text}`" if place == 1 else text for place, text in enumerate(row)] for row in cells(groups)]
    shown = table([f"recipe (test {', '.join(metrics)}, %)", *HEADINGS[1:]], rows)
    return f"{what}\n\n{shown}\n\n{tally(groups)}"


def findings(results: dict[str, Any], strategy: str) -> list[str]:
    """A line for each arm that consists of this strategy alone, and for each budget for which the arm was trained
    separately."""
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
