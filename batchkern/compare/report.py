"""What a comparison shows: tables, a verdict in words, plots, results.csv, and all of it on one page of HTML."""

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
    """All of :data:`REPORT_FILES` that this comparison has; results.json is written already."""
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
    """What each strategy of the arms does, in the first sentence of its class."""
    used = {strategy.name: strategy for arm in settings["arms"] for strategy in parse(arm, passive="")}
    return {name: " ".join((strategy.__doc__ or "").split("\n\n")[0].split()) for name, strategy in used.items()}


# --- words -----------------------------------------------------------------------------------------------------------


def verdict(results: Results, budget: str) -> list[str]:
    """What the paired differences of one budget allow to say."""
    entries = [entry for entry in _entries(results, budget) if entry["arm"] != BASELINE]
    if not entries:
        return ["Every arm uses up this budget in the same training as the first one: see there."]
    said = judged(entries)
    if len(entries) + 1 < len(results["settings"]["arms"]):
        said.append("All other arms train for as long as in the first budget: see there.")
    elif not said:
        said.append("Fewer than two pairs of runs have ended: there is no telling chance from effect.")
    return said


def notes(results: Results) -> list[str]:
    """How to read the tables."""
    settings, environment = results["settings"], results["environment"]
    seeds = len(settings["seeds"])
    about = ["Test accuracy after the last epoch."]
    about += about_tests(seeds, _tests(results), "the same seed has the same initial weights and order of the data.")
    about += [
        "All on one test set, and with settings that were not tuned for any arm: another data set, network or learning "
        "rate may well decide otherwise.",
        "Reach: epochs of the baseline, by what is used of the budget, until an arm's test accuracy first reached the "
        "best that the baseline of its seed ever had after an epoch (median over the seeds; in brackets how many got "
        "there). Converged: the arm's own epoch in which its training loss, over the samples that it visited, came to "
        f"its least, but for {CONVERGED:.0%} of its whole fall (median over the seeds). Gap: accuracy on the training "
        "set less that on the test set. Cost: passes of samples, a backward pass counted as two, relative to the "
        "baseline.",
        *_about_noise(settings),
        f"Seconds are of training alone; {environment['jobs']} at a time, {environment['threads_per_run']} CPU threads "
        f"each, on {environment['cores']} cores.",
    ]
    return about


def _tests(results: Results) -> int:
    """How many p-values were corrected together: a training that serves two budgets is tested once."""
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
        f"{settings['noise']:.0%} of the training labels are wrong, and no test label is: the gap counts wrong labels "
        "that were learnt as right, so that a perfect model would have a negative one."
    ]


# --- tables ----------------------------------------------------------------------------------------------------------


def effects(results: Results, budget: str) -> Rows:
    """Headings, then a row for each arm: its accuracy, and by how much it differs."""
    return effect_rows(_entries(results, budget), key="test_accuracy")


def costs(results: Results, budget: str) -> Rows:
    """Headings, then a row for each arm: how soon it was as good as the baseline, how it generalises, what it cost."""
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
    """The arms of a budget: of a second one the baseline, and those whose training is not that of the first."""
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
    """A line for each run: what it is, and the single numbers of its last epoch. ``batchkern analyse`` reads it."""
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
    """The metrics of every run that ended, by arm, each row with what it had used of each budget."""
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
