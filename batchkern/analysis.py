"""Analysis of the results of any trainings, with the statistics of ``batchkern compare``: pairs by seed, intervals, and
tests that are corrected together.

    analysis = analyse(read_results(Path("results.csv")))
    for table in analysis.tables:
        print(table.title, table.effects, table.verdict)
"""

from __future__ import annotations

import base64
import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from batchkern.compare.statistics import differences, first_reaching, interval, median_reach
from batchkern.compare.tables import Metric, Rows, about_tests, effect_rows, judged, shown_arm, shown_reach
from batchkern.errors import UserError, only_warned, require
from batchkern.files import make_directory, write_file
from batchkern.plots import plot_differences, plot_metric
from batchkern.training_results import Curve, Results, Run
from batchkern.training_results import read_results as read_results

LESS_IS_BETTER = {
    *(
        "loss",
        "losses",
        "error",
        "errors",
        "err",
        "perplexity",
        "ppl",
        "nll",
        "rmse",
        "mse",
        "mae",
        "mape",
        "fid",
        "kid",
    ),
    *("wer", "cer", "ece", "brier", "latency", "seconds", "time", "memory"),
}
"""Words in the names of metrics for which lower values are better."""


@dataclass
class Table:
    """The arms on one data set, at one budget, by one metric."""

    title: str
    metric: Metric
    entries: list[dict[str, Any]]
    curves: dict[str, list[Curve]]
    """The curves of each arm, one per seed."""
    elsewhere: int = 0
    """Number of arms whose runs are the same as in an earlier table, where they are shown."""

    @property
    def effects(self) -> Rows:
        """Headings, then a row for each arm: its result, and its differences."""
        return effect_rows(self.entries, self.metric)

    @property
    def usage(self) -> Rows:
        """Headings, then a row for each arm: its steps and cost, and when it was as good as the best of the
        baseline."""
        shown = {
            "reach": lambda entry: shown_reach(entry["reach"], ".2f"),
            "cost": lambda entry: "" if entry["cost"] is None else f"{entry['cost']:.2f}",
            "steps": lambda entry: "" if entry["steps"] is None else f"{entry['steps']:,.0f}",
        }
        kept = {name: show for name, show in shown.items() if any(entry[name] for entry in self.entries)}
        rows: Rows = [("arm", "seeds", *kept)]
        for entry in self.entries:
            rows.append((shown_arm(entry), str(entry["seeds"]), *(show(entry) for show in kept.values())))
        return rows

    @property
    def verdict(self) -> list[str]:
        """The conclusions from the paired differences."""
        said = judged(self.entries, self.metric, "its control")
        if not said and len(self.entries) > 1:
            said.append("Fewer than two pairs of runs: an effect cannot be distinguished from chance.")
        if self.elsewhere:
            said.append("All other arms have the same runs at the first budget: see there.")
        return said or ["There is no other arm."]


@dataclass
class Analysis:
    """All tables; their tests are one family."""

    tables: list[Table]
    tests: int
    axis: str
    about: list[str]
    """Notes on the file for a reader of the tables."""

    @property
    def notes(self) -> list[str]:
        """How to read the tables."""
        entries = [entry for table in self.tables for entry in table.entries]
        pairing = "pairing helps if the runs of one seed have much in common, such as initial weights."
        notes = about_tests(max(entry["of"] for entry in entries), self.tests, pairing) if self.tests else []
        if any(entry["reach"] for entry in entries):
            notes.append(
                "Reach: when an arm was first as good as the best value of the baseline of the same seed, as a "
                f"fraction of its {self.axis} (median over the seeds; in brackets the seeds that reached it)."
            )
        if any(entry["cost"] for entry in entries):
            notes.append("Cost: relative to the baseline, over the seeds that both have.")
        short = dict.fromkeys(entry["arm"] for entry in entries if entry["seeds"] + len(entry["failed"]) < entry["of"])
        if short:
            notes.append(
                f"{', '.join(short)}: some seeds of the other arms are missing; pairs use the seeds that both have."
            )
        metrics = dict.fromkeys(table.metric for table in self.tables)
        directions = (f"{metric.name} ({'less' if metric.lower else 'more'} is better)" for metric in metrics)
        return [*notes, f"Metrics: {', '.join(directions)}.", *self.about]


# --- the tables ------------------------------------------------------------------------------------------------------


def analyse(
    results: Results | Sequence[Run],
    *,
    baseline: str = "baseline",
    controls: Mapping[str, str] | None = None,
    lower: Sequence[str] = (),
    higher: Sequence[str] = (),
) -> Analysis:
    """A table for each data set, budget and metric; all their tests are one family (Holm).

    Args:
        results: the result of :func:`read_results`, or a list of runs.
        baseline: the arm with which the others are compared.
        controls: a second arm with which an arm is compared, by arm, instead of the controls named by the runs.
        lower, higher: metrics for which lower, or higher, values are better. By default, lower is better for losses,
            errors, perplexity, seconds, time, memory and the like.

    Raises:
        UserError: there is no such arm or metric, an arm is its own control, or an arm is twice in one budget.

    Examples:
        >>> from pathlib import Path
        >>> from batchkern.analysis import analyse, read_results
        >>> rows = "baseline,0,0.5\\nbaseline,1,0.25\\nsam,0,0.75\\nsam,1,0.75\\n"
        >>> _ = Path("results.csv").write_text("arm,seed,accuracy\\n" + rows)
        >>> (table,) = analyse(read_results(Path("results.csv"))).tables
        >>> [(entry["arm"], entry["reached"]["mean"]) for entry in table.entries]
        [('baseline', 0.375), ('sam', 0.75)]
    """
    results = results if isinstance(results, Results) else Results(list(results))
    runs = results.runs
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if not metrics:
        raise UserError("no run has a metric: all have failed")
    for what, names in (("lower", lower), ("higher", higher)):
        if unknown := [name for name in names if name not in metrics]:
            raise UserError(f"{what}: there is no metric {unknown[0]!r}; there are {', '.join(metrics)}")
    if both := [name for name in lower if name in higher]:
        raise UserError(f"lower and higher: {both[0]!r} is in both")
    shown = {name: _shown(name, runs, name in lower, name in higher) for name in metrics}
    held_against = _held_against(runs, baseline, controls or {})
    about = [f"Not metrics, since they have no number: {', '.join(results.left_out)}."] if results.left_out else []
    if results.unused:
        about.append(f"Not analysed, since not selected (--metric): {', '.join(results.unused)}.")
    values: dict[Any, dict[str, float]] = {}
    tables, pairs = [], []
    for data in dict.fromkeys(run.data for run in runs):
        first: dict[str, frozenset[str]] = {}
        for budget in dict.fromkeys(budget for run in runs if run.data == data for budget in run.budgets):
            arms = _arms(runs, data, budget, baseline)
            told = _told(arms, first, baseline)
            first = {arm: own[0].group for arm, own in arms.items()} | first
            for metric in metrics:
                where = ", ".join(filter(None, (shown[metric].heading, data, f"equal {budget}" if budget else "")))
                if not any(metric in run.metrics for own in arms.values() for run in own):
                    about.append(f"No run has a value: {where}.")
                    continue
                entries = {arm: _entry(metric, arm, own, arms, baseline, shown[metric]) for arm, own in arms.items()}
                for arm, own in arms.items():
                    key = (data, own[0].group, arm, metric)
                    values[key] = {run.seed: run.metrics[metric] for run in own if metric in run.metrics}
                    control = held_against.get((data, arm), "")
                    if control and control not in arms:
                        about.append(f"{arm} has no control {control}: {where}.")
                    for name, other in (("baseline", baseline), ("control", control)):
                        if other in arms and other != arm:
                            pairs.append((entries[arm], name, (key, (data, arms[other][0].group, other, metric))))
                curves = {arm: [run.curves[metric] for run in own if metric in run.curves] for arm, own in arms.items()}
                lengths = {
                    arm: {x[-1] for x, _ in own} for arm, own in curves.items() if any(len(x) > 1 for x, _ in own)
                }
                if uneven := [arm for arm, ends in lengths.items() if len(ends) > 1]:
                    about.append(
                        f"Curves end at different {results.axis} for the seeds of {', '.join(uneven)}: {where}."
                    )
                about += _ended_early(metric, arms, baseline, results.axis, where)
                kept = [entries[arm] for arm in told]
                tables.append(Table(where, shown[metric], kept, curves if lengths else {}, len(arms) - len(told)))
    tests = differences(values, [pair for _, _, pair in pairs])
    for entry, name, pair in pairs:
        entry["difference"][name] = tests[pair]
        if tests[pair] is None and entry["seeds"] and values[pair[1]]:
            about.append(f"{entry['arm']} has no seed in common with its {name}.")
    tested = sum(test is not None and test["p"] is not None for test in tests.values())
    return Analysis(tables, tested, results.axis, list(dict.fromkeys(about)))


def _ended_early(metric: str, arms: Mapping[str, list[Run]], baseline: str, axis: str, where: str) -> list[str]:
    """A note on arms whose last value comes before their last line, unlike that of the baseline."""

    def shares(own: Sequence[Run]) -> list[float]:
        ended = [(run.curves[metric][0][-1], run.used.get(axis, 0.0)) for run in own if metric in run.curves]
        return [at / last for at, last in ended if last > 0]

    usual = min(shares(arms[baseline]), default=1.0)
    early = [arm for arm, own in arms.items() if min(shares(own), default=1.0) < usual]
    return [f"The last lines of {', '.join(early)} have no value; an earlier one counts: {where}."] if early else []


def _shown(name: str, runs: Sequence[Run], lower: bool, higher: bool) -> Metric:
    values = [run.metrics[name] for run in runs if name in run.metrics]
    words = {word.lower() for word in re.findall(r"[A-Z]*[a-z]+|[A-Z]+", name)}
    percent = "accuracy" in words and all(0 <= value <= 1 for value in values)
    return Metric(name, percent, lower or (bool(words & LESS_IS_BETTER) and not higher))


def _held_against(runs: Sequence[Run], baseline: str, controls: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """The control of each arm on each data set."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    held: dict[tuple[str, str], str] = {}
    for run in runs:
        control = controls.get(run.arm, run.control)
        if run.arm == baseline or not control:
            continue
        if control == run.arm:
            raise UserError(f"control: arm {control!r} is its own")
        if held.setdefault((run.data, run.arm), control) != control:
            raise UserError(f"control: arm {run.arm!r} has two, {held[run.data, run.arm]!r} and {control!r}")
    for what, name in (
        ("baseline", baseline),
        *(("control", x) for x in (*controls, *controls.values(), *held.values())),
    ):
        if name not in arms:
            raise UserError(f"{what}: there is no arm {name!r}; there are {', '.join(arms)}")
    return held


def _arms(runs: Sequence[Run], data: str, budget: str, baseline: str) -> dict[str, list[Run]]:
    """The runs of each arm on a data set at a budget; the baseline is the first."""
    arms: dict[str, list[Run]] = {baseline: []}
    for run in runs:
        if run.data == data and budget in run.budgets:
            arms.setdefault(run.arm, []).append(run)
    where = (f" on {data!r}" if data else "") + (f" at the budget {budget!r}" if budget else "")
    if not arms[baseline]:
        raise UserError(f"there is no run of the baseline {baseline!r}{where or ' without a budget'}")
    for arm, own in arms.items():
        if len({run.group for run in own}) > 1:
            raise UserError(
                f"arm {arm!r} appears twice{where}: in runs of this budget only, and in runs of several budgets"
            )
    return arms


def _told(arms: Mapping[str, list[Run]], first: Mapping[str, frozenset[str]], baseline: str) -> list[str]:
    """The arms to show: without those whose runs, like those of the baseline, are the runs of the first budget."""
    again = {arm for arm, own in arms.items() if first.get(arm) == own[0].group}
    return [arm for arm in arms if arm == baseline or arm not in again or baseline not in again]


def _entry(
    metric: str, arm: str, own: Sequence[Run], arms: Mapping[str, list[Run]], baseline: str, shown: Metric
) -> dict[str, Any]:
    ended = {run.seed: run for run in own if metric in run.metrics}
    plain = {run.seed: run for run in arms[baseline] if metric in run.metrics}
    reached: dict[str, Any] | None = None
    if ended:
        values = [run.metrics[metric] for run in ended.values()]
        mean, half = interval(values)
        reached = {"mean": mean, "half_width": half, "values": values}
    common = [(ended[seed], plain[seed]) for seed in ended if seed in plain]
    costs = [(a.used["cost"], b.used["cost"]) for a, b in common if "cost" in a.used and "cost" in b.used]
    used = sum(b for _, b in costs)
    steps = [run.used["steps"] for run in ended.values() if "steps" in run.used]
    return {
        "arm": arm,
        "reached": reached,
        "difference": {},
        "failed": [run.seed for run in own if metric not in run.metrics],
        "seeds": len(ended),
        "of": len({run.seed for runs in arms.values() for run in runs}),
        "reach": _reach([(a.curve(metric), b.curve(metric)) for a, b in common], shown.lower),
        "cost": sum(a for a, _ in costs) / used if used else None,
        "steps": statistics.fmean(steps) if steps else None,
    }


def _reach(curves: Sequence[tuple[Curve, Curve]], lower: bool) -> dict[str, Any] | None:
    """The reach, from pairs of an arm's curve and the baseline's, as fractions of what the baseline used."""
    sign, shares = -1 if lower else 1, []
    for (x, y), (base_x, base_y) in curves:
        if base_x[-1] > 0 and (len(x) > 1 or len(base_x) > 1):
            best = max(sign * value for value in base_y)
            shares.append(first_reaching([sign * value for value in y], [at / base_x[-1] for at in x], best))
    return median_reach(shares) if shares else None


# --- the page --------------------------------------------------------------------------------------------------------

PAGE, JSON = "analysis.html", "analysis.json"
PLOTS = re.compile(r"(differences|curves)-\d+\.png")


def write_analysis(analysis: Analysis, out: Path, name: str, *, overwrite: bool = False) -> list[str]:
    """Writes a self-contained HTML page, its plots, and the tables as JSON into ``out``; returns their names.

    Args:
        analysis: the result of :func:`analyse`.
        out: the directory, which is created.
        name: name of the analysed file, for the title.
        overwrite: replace the files of an existing analysis.

    Raises:
        UserError: such a file exists, or one cannot be written.

    Examples:
        >>> from pathlib import Path
        >>> from batchkern.analysis import analyse, read_results, write_analysis
        >>> _ = Path("results.csv").write_text("arm,seed,accuracy\\nbaseline,0,0.5\\nsam,0,0.75\\n")
        >>> analysis = analyse(read_results(Path("results.csv")))
        >>> sorted(write_analysis(analysis, Path("analysed"), "made-up results"))
        ['analysis.html', 'analysis.json', 'differences-1.png']
    """
    jinja2 = require("jinja2", "train")
    content = {
        "kind": "batchkern analysis",
        "of": name,
        "tests": analysis.tests,
        "tables": [{"title": t.title, "metric": t.metric.name, "arms": t.entries} for t in analysis.tables],
        "notes": analysis.notes,
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    make_directory(out)
    there = sorted(file for file in os.listdir(out) if file in (PAGE, JSON) or PLOTS.fullmatch(file))
    if there and not overwrite:
        raise UserError(f"{out / there[0]} already exists; give overwrite (--overwrite) to replace it")
    for file in there:
        (out / file).unlink()  # an analysis with fewer tables has fewer plots
    write_file(out / JSON, text.encode())
    images: list[list[tuple[str, str]]] = []
    for number, table in enumerate(analysis.tables, 1):
        own = []
        for what in ("differences", *(["curves"] if any(table.curves.values()) else [])):
            plot = out / f"{what}-{number}.png"
            with only_warned(f"{plot} is not drawn"):
                _draw(plot, table, what, analysis.axis)
                own.append((plot.name, "data:image/png;base64," + base64.b64encode(plot.read_bytes()).decode()))
        images.append(own)
    folder = files("batchkern.compare")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(folder.joinpath("analysis.html.jinja").read_text()).render(
        name=name,
        style=folder.joinpath("page.css.jinja").read_text(),
        tables=list(zip(analysis.tables, images, strict=True)),
        notes=analysis.notes,
    )
    write_file(out / PAGE, page.encode(errors="backslashreplace"))
    return [PAGE, JSON, *(file for own in images for file, _ in own)]


def _draw(path: Path, table: Table, what: str, axis: str) -> None:
    factor = 100.0 if table.metric.percent else 1.0
    if what == "curves":
        scaled = {arm: [(x, [factor * v for v in y]) for x, y in own] for arm, own in table.curves.items()}
        plot_metric(path, scaled, axis, table.metric.heading, table.title)
        return
    groups = {
        f"arm less {name}": [(e["arm"], e["difference"][name]) for e in table.entries if e["difference"].get(name)]
        for name in ("baseline", "control")
    }
    label = f"difference in {table.metric.name.replace('_', ' ')}" + (" (points)" if table.metric.percent else "")
    plot_differences(path, {title: group for title, group in groups.items() if group}, label, factor)
