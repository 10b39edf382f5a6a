"""Results of trainings made anywhere, judged as ``batchkern compare`` judges its own: pairs by seed, intervals, tests
that are corrected together.

    analysis = analyse(read_results(Path("results.csv")))
    for table in analysis.tables:
        print(table.title, table.effects, table.verdict)
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from batchkern.compare.statistics import differences, first_reaching, interval, median_reach
from batchkern.compare.tables import Metric, Rows, about_tests, effect_rows, judged, shown_arm, shown_reach
from batchkern.errors import UserError, only_warned, require
from batchkern.files import make_directory, read_file, write_file
from batchkern.plots import plot_differences, plot_metric

REQUIRED = ("arm", "seed")
OPTIONAL = ("data", "budget", "control", "cost", "steps", "error")
"""Columns with a meaning; others are metrics."""
USUAL = "test_accuracy"
"""Where there is a column of this name, and nothing was said, it is the metric."""
LESS_IS_BETTER = ("loss", "error", "perplexity")
"""Parts of the names of metrics."""
WIDE = re.compile(r"(.+)@(\d+(?:\.\d+)?(?:e\d+)?)")
"""A column that has a metric after so many steps."""

Curve = tuple[list[float], list[float]]


@dataclass
class Run:
    """One training. Metrics are its last ones; without any, it failed."""

    arm: str
    seed: str
    metrics: dict[str, float]
    data: str = ""
    """The data set."""
    budgets: tuple[str, ...] = ("",)
    """What its arm has in common with others at this length: ``updates``, ``cost``."""
    control: str = ""
    """The arm that selects as much at random."""
    used: dict[str, float] = field(default_factory=dict)
    """``cost``, ``steps``."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """Of metrics, over the cost or, without that, the steps."""


@dataclass
class Table:
    """The arms on one data set, at one budget, by one metric."""

    title: str
    metric: Metric
    entries: list[dict[str, Any]]
    curves: dict[str, list[Curve]]
    """Of each arm, one a seed."""

    @property
    def effects(self) -> Rows:
        """Headings, then a row for each arm: what it reached, and by how much it differs."""
        return effect_rows(self.entries, self.metric)

    @property
    def usage(self) -> Rows:
        """Headings, then a row for each arm: what it used, and how soon it was as good as the baseline at its best."""
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
        """What the paired differences allow to say."""
        return judged(self.entries, self.metric, "its control") or [
            "Fewer than two pairs of runs: there is no telling chance from effect."
        ]


@dataclass
class Analysis:
    """All tables, whose tests are one family."""

    tables: list[Table]
    seeds: int
    tests: int
    along: str = "steps"
    """What curves are over."""

    @property
    def notes(self) -> list[str]:
        """How to read the tables."""
        pairing = "they are worth as much as the runs of one seed have in common, such as initial weights."
        notes = about_tests(self.seeds, self.tests, pairing)
        entries = [entry for table in self.tables for entry in table.entries]
        if any(entry["reach"] for entry in entries):
            notes.append(
                "Reach: when an arm first was as good as the baseline of its seed at its best, as a share of all that "
                "this baseline used (median over the seeds; in brackets how many got there)."
            )
        if any(entry["cost"] for entry in entries):
            notes.append("Cost: relative to the baseline.")
        short = sorted({entry["arm"] for entry in entries if entry["seeds"] < self.seeds})
        if short:
            notes.append(
                f"Of {', '.join(short)} not all {self.seeds} seeds have ended; pairs are of those that both have."
            )
        return notes


def read_results(path: Path, metrics: Sequence[str] = ()) -> list[Run]:
    """The runs of a file of comma-separated values.

    - ``arm`` and ``seed`` are any names; an arm and a seed are a run, on each data set and at each budget.
    - ``data``, ``budget`` (several words: one run for all of them), ``control`` (an arm), ``cost``, ``steps`` are
      optional. ``error``: a run with a word there has failed, as has one without a metric.
    - Any other column of numbers is a metric. Where a run has several lines, they are its course, over ``cost`` or
      ``steps``, and its last counts. A column ``accuracy@100`` has the metric after 100 steps.

    Args:
        metrics: names of columns; default: ``test_accuracy`` if there is such a column, else all of them.

    Raises:
        UserError: the file is none of this kind; the sentence has the line and the column.
        OSError: it cannot be read.
    """
    lines, header = _lines(path)
    chosen, wide = _metrics(path, header, lines, metrics)
    courses: dict[tuple[str, str, str, str], list[tuple[int, dict[str, str]]]] = {}
    for number, line in lines:
        for name in REQUIRED:
            if not line[name]:
                raise UserError(f"{path}, line {number}, column {name}: must not be empty")
        key = (line.get("data", ""), line["arm"], " ".join(line.get("budget", "").split()), line["seed"])
        courses.setdefault(key, []).append((number, line))
    return [_run(path, key, course, chosen, wide) for key, course in courses.items()]


def _lines(path: Path) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """Each with its number in the file, and the header."""
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines = []
    try:
        header = [name.strip() for name in next(reader, [])]
        for name in REQUIRED:
            if name not in header:
                raise UserError(f"{path} has no column {name}; its first line has {', '.join(header) or 'nothing'}")
        if twice := [name for name in header if header.count(name) > 1]:
            raise UserError(f"{path} has two columns {twice[0]!r}")
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(header):
                wrong = f"must have {len(header)} cells, as the first line, got {len(cells)}"
                raise UserError(f"{path}, line {reader.line_num}: {wrong}")
            named = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
            lines.append((reader.line_num, named))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    if not lines:
        raise UserError(f"{path} has no run: only a first line")
    return lines, header


def _metrics(
    path: Path, header: Sequence[str], lines: Sequence[tuple[int, dict[str, str]]], asked: Sequence[str]
) -> tuple[list[str], dict[str, list[tuple[float, str]]]]:
    """The metrics, and of those that have columns for their course: steps and column, in order."""
    wide: dict[str, list[tuple[float, str]]] = {}
    for name in header:
        if match := WIDE.fullmatch(name):
            wide.setdefault(match[1], []).append((float(match[2]), name))
    others = [name for name in header if name not in (*REQUIRED, *OPTIONAL) and not WIDE.fullmatch(name)]
    known = [*others, *(name for name in wide if name not in others)]
    if unknown := [name for name in asked if name not in known]:
        raise UserError(f"{path} has no metric {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    numbers = [name for name in known if name in wide or _is_number(next((r[name] for _, r in lines if r[name]), ""))]
    chosen = list(dict.fromkeys(asked)) or ([USUAL] if USUAL in numbers else numbers)
    if not chosen:
        raise UserError(f"{path} has no metric: a column of numbers beside {', '.join(header)}")
    return chosen, {name: sorted(columns) for name, columns in wide.items() if name in chosen}


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _run(
    path: Path,
    key: tuple[str, str, str, str],
    course: list[tuple[int, dict[str, str]]],
    metrics: Sequence[str],
    wide: Mapping[str, Sequence[tuple[float, str]]],
) -> Run:
    data, arm, budget, seed = key

    def number(line: tuple[int, dict[str, str]], column: str) -> float | None:
        cell = line[1].get(column, "")
        if not cell:
            return None
        if not _is_number(cell) or not math.isfinite(float(cell)):
            what = f"must be a number, or empty where a run failed, got {cell!r:.60}"
            raise UserError(f"{path}, line {line[0]}, column {column}: {what}")
        return float(cell)

    along = next((name for name in ("cost", "steps") if course[0][1].get(name)), None)
    if len(course) > 1:
        places = {line[0]: number(line, along) if along else None for line in course}
        known = [place for place in places.values() if place is not None]
        if len(set(known)) < len(course):
            raise UserError(
                f"{path}, line {course[1][0]}: arm {arm!r}, seed {seed!r} stands in line {course[0][0]} already; a run "
                "with several lines needs another cost, or number of steps, in each"
            )
        course = sorted(course, key=lambda line: places[line[0]] or 0.0)
    last = course[-1]
    run = Run(arm, seed, {}, data, tuple(budget.split()) or ("",), last[1].get("control", ""))
    run.used = {name: value for name in ("cost", "steps") if (value := number(last, name)) is not None}
    for metric in metrics:
        points = [(number(line, along), number(line, metric)) for line in course] if along else []
        points = [(x, number(last, column)) for x, column in wide.get(metric, ())] or points
        curve = [(x, y) for x, y in points if x is not None and y is not None]
        value = number(last, metric)
        if value is None and metric in wide and curve:
            value = curve[-1][1]
        if value is not None and not last[1].get("error"):
            run.metrics[metric] = value
            if len(curve) > 1:
                run.curves[metric] = [x for x, _ in curve], [y for _, y in curve]
    return run


def analyse(
    runs: Sequence[Run],
    *,
    baseline: str = "baseline",
    controls: Mapping[str, str] | None = None,
    lower: Sequence[str] = (),
) -> Analysis:
    """A table for each data set, budget and metric; all their tests are one family (Holm).

    Args:
        baseline: the arm that others are held against.
        controls: of arms, beside those that the runs name: what each is held against, too.
        lower: metrics of which less is better, beside those with "loss", "error" or "perplexity" in their names.

    Raises:
        UserError: there is no such arm, or an arm is in one budget twice.
    """
    arms = list(dict.fromkeys(run.arm for run in runs))
    held_against = {run.arm: run.control for run in runs if run.control} | dict(controls or {})
    for what, name in (("baseline", baseline), *(("control", name) for pair in held_against.items() for name in pair)):
        if name not in arms:
            raise UserError(f"{what}: there is no arm {name!r}; there are {', '.join(arms)}")
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if not metrics:
        raise UserError("no run has a metric: all have failed")
    if unknown := [name for name in lower if name not in metrics]:
        raise UserError(f"lower: there is no metric {unknown[0]!r}; there are {', '.join(metrics)}")
    shown = {name: _shown(name, runs, name in lower) for name in metrics}
    datas = list(dict.fromkeys(run.data for run in runs))
    budgets = list(dict.fromkeys(budget for run in runs for budget in run.budgets))
    values: dict[Any, dict[str, float]] = {}
    tables, pairs = [], []
    for data in datas:
        first: dict[str, tuple[str, ...]] = {}
        for budget in budgets:
            own = _of_budget(runs, data, budget)
            if own and baseline not in own:
                raise UserError(f"there is no run of the baseline {baseline!r}" + _where(data, budget))
            # An arm with the runs of the first budget is told there.
            told = {a: group for a, group in own.items() if a == baseline or first.get(a) != group[0].budgets}
            told = dict(sorted(told.items(), key=lambda arm: arm[0] != baseline))  # which is the first
            first = {a: group[0].budgets for a, group in own.items()} | first
            if len(told) < 2 and len(own) > 1:
                continue
            for metric in metrics if own else ():
                keys = {a: (data, group[0].budgets, a, metric) for a, group in own.items()}
                for a, group in own.items():
                    values[keys[a]] = {run.seed: run.metrics[metric] for run in group if metric in run.metrics}
                entries = []
                for a, group in told.items():
                    entry = _entry(shown[metric], a, group, own[baseline])
                    entry["control"] = control = held_against.get(a)
                    against = {"baseline": baseline, "control": control} if a != baseline else {"control": control}
                    for name, other in against.items():
                        if other in keys:
                            pairs.append((entry, name, (keys[a], keys[other])))
                    entries.append(entry)
                curves = {a: [run.curves[metric] for run in group if metric in run.curves] for a, group in own.items()}
                title = ", ".join(filter(None, (shown[metric].heading, data, f"equal {budget}" if budget else "")))
                tables.append(Table(title, shown[metric], entries, curves))
    tests = differences(values, [pair for _, _, pair in pairs])
    for entry, name, pair in pairs:
        entry["difference"][name] = tests[pair]
    seeds = len({run.seed for run in runs})
    tested = sum(test is not None and test["p"] is not None for test in tests.values())
    return Analysis(tables, seeds, tested, "cost" if any("cost" in run.used for run in runs) else "steps")


def _shown(name: str, runs: Sequence[Run], lower: bool) -> Metric:
    values = [run.metrics[name] for run in runs if name in run.metrics]
    percent = "accuracy" in name.lower() and all(0 <= value <= 1 for value in values)
    return Metric(name, percent, lower or any(word in name.lower() for word in LESS_IS_BETTER))


def _of_budget(runs: Sequence[Run], data: str, budget: str) -> dict[str, list[Run]]:
    """The runs of each arm."""
    own: dict[str, list[Run]] = {}
    for run in runs:
        if run.data == data and budget in run.budgets:
            own.setdefault(run.arm, []).append(run)
    for arm, group in own.items():
        if len({run.budgets for run in group}) > 1:
            raise UserError(f"arm {arm!r} is twice in the budget {budget!r}, in runs of its own and of several budgets")
    return own


def _where(data: str, budget: str) -> str:
    return (f" on {data!r}" if data else "") + (f" in the budget {budget!r}" if budget else "")


def _entry(metric: Metric, arm: str, group: Sequence[Run], baseline: Sequence[Run]) -> dict[str, Any]:
    ended = {run.seed: run for run in group if metric.name in run.metrics}
    plain = {run.seed: run for run in baseline if metric.name in run.metrics}
    reached: dict[str, Any] | None = None
    if ended:
        values = [run.metrics[metric.name] for run in ended.values()]
        mean, half = interval(values)
        reached = {"mean": mean, "half_width": half, "values": values}
    return {
        "arm": arm,
        metric.name: reached,
        "difference": {},
        "failed": [run.seed for run in group if metric.name not in run.metrics],
        "seeds": len(ended),
        "reach": _reach(metric, ended, plain),
        "cost": _relative("cost", ended, plain),
        "steps": _mean("steps", ended),
    }


def _mean(name: str, ended: Mapping[str, Run]) -> float | None:
    used = [run.used[name] for run in ended.values() if name in run.used]
    return statistics.fmean(used) if used else None


def _relative(name: str, ended: Mapping[str, Run], plain: Mapping[str, Run]) -> float | None:
    own, of_baseline = _mean(name, ended), _mean(name, plain)
    return own / of_baseline if own is not None and of_baseline else None


def _reach(metric: Metric, ended: Mapping[str, Run], plain: Mapping[str, Run]) -> dict[str, Any] | None:
    """In shares of what the baseline of the seed used."""
    sign, shares = -1 if metric.lower else 1, []
    for seed, run in ended.items():
        own, other = run.curves.get(metric.name), plain[seed].curves.get(metric.name) if seed in plain else None
        if own is None or other is None:
            continue
        best = max(sign * y for y in other[1])
        shares.append(first_reaching([sign * y for y in own[1]], [x / other[0][-1] for x in own[0]], best))
    return median_reach(shares) if shares else None


PAGE, JSON = "analysis.html", "analysis.json"


def write_analysis(analysis: Analysis, out: Path, name: str, *, overwrite: bool = False) -> list[str]:
    """A page of HTML that needs nothing but itself, its plots, and the tables as JSON, into ``out``; their names.

    Args:
        name: of what was analysed, for the title.
        overwrite: replace those that are there.

    Raises:
        UserError: one is there, or cannot be written.
    """
    jinja2 = require("jinja2", "train")
    plots: dict[str, tuple[Table, str]] = {}
    for number, table in enumerate(analysis.tables, 1):
        plots[f"differences-{number}.png"] = (table, "differences")
        if any(table.curves.values()):
            plots[f"curves-{number}.png"] = (table, "curves")
    names = [PAGE, JSON, *plots]
    if not overwrite and (there := [file for file in names if os.path.lexists(out / file)]):
        raise UserError(f"{out / there[0]} is there; give overwrite to replace it")
    make_directory(out)
    content = {
        "kind": "batchkern analysis",
        "of": name,
        "tests": analysis.tests,
        "tables": [
            {"title": table.title, "metric": table.metric.name, "arms": table.entries} for table in analysis.tables
        ],
    }
    write_file(out / JSON, json.dumps(content, indent=1).encode())
    images: dict[str, str] = {}
    for file, (table, what) in plots.items():
        with only_warned(f"{out / file} is not drawn"):
            _draw(out / file, table, what, analysis.along)
            images[file] = "data:image/png;base64," + base64.b64encode((out / file).read_bytes()).decode()
    folder = files("batchkern.compare")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(folder.joinpath("analysis.html.jinja").read_text())
    page = template.render(
        name=name,
        style=folder.joinpath("page.css.jinja").read_text(),
        tables=[
            (table, [(f, images[f]) for f, (own, _) in plots.items() if own is table and f in images])
            for table in analysis.tables
        ],
        notes=analysis.notes,
    )
    write_file(out / PAGE, page.encode(errors="backslashreplace"))
    return [PAGE, JSON, *images]


def _draw(path: Path, table: Table, what: str, along: str) -> None:
    unit, factor = ("points", 100.0) if table.metric.percent else ("", 1.0)
    if what == "curves":
        scaled = {arm: [(x, [factor * v for v in y]) for x, y in own] for arm, own in table.curves.items()}
        plot_metric(path, scaled, along, table.metric.heading, table.title)
        return
    groups = {
        f"arm less {name}": [(e["arm"], e["difference"][name]) for e in table.entries if e["difference"].get(name)]
        for name in ("baseline", "control")
    }
    label = f"difference in {table.metric.name.replace('_', ' ')}" + (f" ({unit})" if unit else "")
    plot_differences(path, {title: group for title, group in groups.items() if group}, label, factor)
