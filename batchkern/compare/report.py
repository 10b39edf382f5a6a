"""The report of a comparison: tables, a verdict in words, plots, results.csv, and one HTML page with all of them."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from batchkern.compare.arms import BASELINE, BUDGETS, cost
from batchkern.compare.statistics import CONVERGED
from batchkern.compare.tables import TEST_ACCURACY, Rows, about_tests, effect_rows, judged, shown_arm, shown_reach
from batchkern.errors import only_warned, require
from batchkern.files import write_file
from batchkern.plots import plot_accuracy, plot_diagnostics, plot_differences
from batchkern.rundir import METRICS
from batchkern.strategies import parse

REPORT, CSV = "report.html", "results.csv"
BUDGET_PLOTS = {"epochs": "accuracy-epochs.png", "updates": "accuracy-updates.png", "cost": "accuracy-cost.png"}
SECONDS_PLOT, DIFFERENCES_PLOT, DIAGNOSTICS_PLOT = "accuracy-seconds.png", "differences.png", "diagnostics.png"
REPORT_FILES = (REPORT, CSV, *BUDGET_PLOTS.values(), SECONDS_PLOT, DIFFERENCES_PLOT, DIAGNOSTICS_PLOT)
Results = Mapping[str, Any]


def write_report(out: Path, results: Results) -> None:
    """Writes all :data:`REPORT_FILES` of this comparison; results.json must already be written."""
    jinja2 = require("jinja2", "train")
    write_file(out / CSV, _csv(results).encode(errors="backslashreplace"))
    plots = _write_plots(out, results)
    images = {name: "data:image/png;base64," + base64.b64encode((out / name).read_bytes()).decode() for name in plots}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files(__package__).joinpath("report.html.jinja").read_text())
    page = template.render(
        title=title(results["settings"]),
        style=files(__package__).joinpath("page.css.jinja").read_text(),
        strategies=_strategies(results["settings"]),
        results=results,
        budgets={
            budget: {
                "name": BUDGETS[budget],
                "verdict": verdict(results, budget),
                "effects": effects(results, budget),
                "costs": costs(results, budget),
                "plot": images.get(BUDGET_PLOTS[budget]),
            }
            for budget in results["settings"]["budgets"]
        },
        images=images,
        names={"differences": DIFFERENCES_PLOT, "seconds": SECONDS_PLOT, "diagnostics": DIAGNOSTICS_PLOT},
        notes=notes(results),
        failed=[outcome for outcome in results["runs"] if outcome["error"]],
        settings=json.dumps(results["settings"], indent=1),
    )
    write_file(out / REPORT, page.encode(errors="backslashreplace"))


def title(settings: Mapping[str, Any]) -> str:
    count = len(settings["seeds"])
    return f"{settings['model']} on {settings['train']['name']}, {count} seed{'s' * (count > 1)}"


def _strategies(settings: Mapping[str, Any]) -> dict[str, str]:
    """The description of each strategy of the arms: the first paragraph of its docstring."""
    used = {strategy.name: strategy for arm in settings["arms"] for strategy in parse(arm, passive="")}
    return {name: " ".join((strategy.__doc__ or "").split("\n\n")[0].split()) for name, strategy in used.items()}


# --- words -----------------------------------------------------------------------------------------------------------


def verdict(results: Results, budget: str) -> list[str]:
    """The conclusions from the paired differences of one budget."""
    entries = [entry for entry in _entries(results, budget) if entry["arm"] != BASELINE]
    if not entries:
        return ["For this budget, every arm has the same training as for the first budget: see there."]
    said = judged(entries)
    if len(entries) + 1 < len(results["settings"]["arms"]):
        said.append("All other arms have the same training as for the first budget: see there.")
    elif not said:
        said.append("Fewer than two pairs of runs have ended: an effect cannot be distinguished from chance.")
    return said


def notes(results: Results) -> list[str]:
    """How to read the tables."""
    settings, environment = results["settings"], results["environment"]
    seeds = len(settings["seeds"])
    about = ["Test accuracy after the last epoch."]
    about += about_tests(seeds, _tests(results), "the same seed has the same initial weights and order of the data.")
    about += [
        "All results are on one test set, with settings that were not tuned for any arm: another data set, network or "
        "learning rate may lead to other conclusions.",
        "Reach: the budget that an arm used, in epochs of the baseline, until its test accuracy first reached the "
        "best accuracy that the baseline of the same seed had after any epoch (median over the seeds; in brackets the "
        "number of seeds that reached it). Converged: the arm's own epoch in which its training loss, over the samples "
        f"that it visited, first came within {CONVERGED:.0%} of its total decrease of its minimum (median over the "
        "seeds). Gap: accuracy on the training set minus accuracy on the test set. Cost: passes of samples, a backward "
        "pass counted as two, relative to the baseline.",
        *_about_noise(settings),
        f"Seconds are for training without evaluation; {environment['jobs']} runs at a time, "
        f"{environment['threads_per_run']} CPU threads each, on {environment['cores']} cores.",
    ]
    return about


def _tests(results: Results) -> int:
    """The number of p-values that were corrected together; a training that is used for two budgets is tested once."""
    epochs = results["settings"]["arm_epochs"]
    pairs = set()
    for entry in results["summary"]:
        for name, test in entry["difference"].items():
            if test and test["p_corrected"] is not None:
                reference = BASELINE if name == "baseline" else entry["control"]
                pairs.add((entry["arm"], entry["epochs"], reference, epochs[reference][entry["budget"]]))
    return len(pairs)


def _about_noise(settings: Mapping[str, Any]) -> list[str]:
    if not settings["noise"]:
        return []
    return [
        f"{settings['noise']:.0%} of the training labels are wrong, but no test labels: in the gap, a wrong label that "
        "was learnt counts as correct, so a perfect model would have a negative gap."
    ]


# --- tables ----------------------------------------------------------------------------------------------------------


def effects(results: Results, budget: str) -> Rows:
    """Headings, then a row for each arm: its accuracy, and its differences."""
    return effect_rows(_entries(results, budget), key="test_accuracy")


def costs(results: Results, budget: str) -> Rows:
    """Headings, then a row for each arm: when it was as good as the baseline, its generalisation gap, and its cost."""
    shown = {
        "passive": any(entry["passive_updates"] for entry in _entries(results, budget)),
        "converged": any(entry.get("converged") for entry in _entries(results, budget)),
    }
    headings = ["arm", "reach", "converged", "gap (points)", "epochs", "updates", "passive", "cost", "seconds"]
    rows: Rows = [tuple(heading for heading in headings if shown.get(heading, True))]
    for entry in _entries(results, budget):
        if not entry["test_accuracy"]:
            rows.append((shown_arm(entry), *[""] * (len(rows[0]) - 1)))
            continue
        cells = [shown_reach(entry["reach"])]
        if shown["converged"]:
            cells.append(f"{entry['converged']['median']:g}" if entry.get("converged") else "")
        cells += [TEST_ACCURACY.value(entry["gap"]), str(entry["epochs"]), f"{entry['updates']:,.0f}"]
        if shown["passive"]:
            cells.append(f"{entry['passive_updates']:,.0f}" if entry["passive_updates"] else "")
        cells += ["" if entry["cost"] is None else f"{entry['cost']:.2f}", f"{entry['seconds']:,.1f}"]
        rows.append((shown_arm(entry), *cells))
    return rows


def _entries(results: Results, budget: str) -> list[Mapping[str, Any]]:
    """The arms of a budget. For a second budget, the baseline and the arms whose training differs from the first
    budget."""
    first = results["settings"]["budgets"][0]
    epochs = results["settings"]["arm_epochs"]
    return [
        entry
        for entry in results["summary"]
        if entry["budget"] == budget
        and (budget == first or entry["arm"] == BASELINE or epochs[entry["arm"]][budget] != epochs[entry["arm"]][first])
    ]


# --- files -----------------------------------------------------------------------------------------------------------


def _csv(results: Results) -> str:
    """A line for each run: its description, and the numbers of its last epoch. ``batchkern analyse`` can read it."""
    settings, runs = results["settings"], results["runs"]
    own = ("arm", "epochs", "seed", "directory", "error")
    finals = [outcome["final"] or {} for outcome in runs]
    numbers = dict.fromkeys(key for row in finals for key, value in row.items() if isinstance(value, int | float))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*own, "budget", "control", "cost", *numbers])
    for outcome, row in zip(runs, finals, strict=True):
        epochs = settings["arm_epochs"].get(outcome["arm"], {})
        budgets = " ".join(b for b in settings["budgets"] if epochs.get(b) == outcome["epochs"])
        told = [*(outcome[key] for key in own), budgets, settings["controls"].get(outcome["arm"], "")]
        told.append(cost(row["samples_forward"], row["samples_backward"]) if row else "")
        writer.writerow([*told, *(row.get(key, "") for key in numbers)])
    return text.getvalue()


def _write_plots(out: Path, results: Results) -> list[str]:
    settings = results["settings"]
    seeds = f"mean and range of {len(settings['seeds'])} seeds" if len(settings["seeds"]) > 1 else "one seed"
    heading = f"{settings['model']} on {settings['train']['name']}: {seeds}"
    labels = {
        "epochs": "epochs",
        "updates": "updates of the model (passive ones not counted)",
        "cost": "passes of samples, backward twice",
    }
    drawn: list[str] = []

    def draw(name: str, plot: Callable[..., None], *args: Any) -> None:
        with only_warned(f"{out / name} is not drawn"):
            plot(out / name, *args)
            drawn.append(name)

    by_budget = {budget: _rows_of_arms(out, results, budget) for budget in settings["budgets"]}
    for budget, arms in by_budget.items():
        draw(BUDGET_PLOTS[budget], plot_accuracy, arms, budget, labels[budget], heading)
    arms = next(iter(by_budget.values()))
    draw(SECONDS_PLOT, plot_accuracy, arms, "seconds", "seconds of training (without evaluation)", heading)
    groups = {
        f"arm less {what}, equal {budget}": [
            (entry["arm"], entry["difference"][name])
            for entry in _entries(results, budget)
            if entry["difference"].get(name)
        ]
        for budget in settings["budgets"]
        for name, what in (("baseline", "baseline"), ("control", "random control"))
    }
    draw(DIFFERENCES_PLOT, plot_differences, {name: group for name, group in groups.items() if group})
    draw(DIAGNOSTICS_PLOT, plot_diagnostics, arms)
    return drawn


def _rows_of_arms(out: Path, results: Results, budget: str) -> dict[str, list[list[dict[str, Any]]]]:
    """The metrics of every finished run, by arm; each row also has the epochs and the cost used so far."""
    from batchkern.records import read_metrics

    arms: dict[str, list[list[dict[str, Any]]]] = {}
    for arm, epochs in results["settings"]["arm_epochs"].items():
        arms[arm] = []
        for outcome in results["runs"]:
            if (outcome["arm"], outcome["epochs"]) == (arm, epochs[budget]) and not outcome["error"]:
                rows = read_metrics(out / outcome["directory"] / METRICS)
                for row in rows:
                    row["epochs"] = row["epoch"] + 1
                    row["cost"] = cost(row["samples_forward"], row["samples_backward"])
                arms[arm].append(rows)
    return arms
