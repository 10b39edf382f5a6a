"""The results of arms and their differences, as rows of a table and in words; also for trainings made elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchkern.compare.statistics import LEVEL

FEW_SEEDS = 5
"""With fewer seeds than this, the notes have a warning."""

Rows = list[tuple[str, ...]]
Entry = Mapping[str, Any]
"""The entry of an arm: its name, its result (mean, half_width), its paired differences, its failed seeds."""


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Args:
        name: the name in the results.
        percent: the metric is a fraction and is shown in percent; its differences are in percentage points.
        lower: lower values are better.
    """

    name: str
    percent: bool = False
    lower: bool = False

    @property
    def heading(self) -> str:
        return self.name.replace("_", " ") + (" (%)" if self.percent else "")

    def value(self, reached: Mapping[str, Any]) -> str:
        """Mean ± half of its interval."""
        return self._text(reached, "")

    def difference(self, test: Mapping[str, Any]) -> str:
        return self._text(test, "+")

    def better(self, test: Mapping[str, Any]) -> bool:
        return bool(test["mean"] < 0 if self.lower else test["mean"] > 0)

    def _text(self, of: Mapping[str, Any], sign: str) -> str:
        mean, half = of["mean"], of["half_width"]
        if self.percent:
            return f"{100 * mean:{sign}.2f}" + ("" if half is None else f" ± {100 * half:.2f}")
        if not half:
            return f"{mean:{sign}.4g}" + ("" if half is None else " ± 0")
        digits = max(
            0, 1 - math.floor(math.log10(half))
        )  # two digits of the half width, and the same decimals of the mean
        form = "e" if digits > 7 or abs(mean) >= 1e9 else "f"
        digits = 3 if form == "e" else digits
        return f"{mean:{sign}.{digits}{form}} ± {half:.{min(digits, 1) if form == 'e' else digits}{form}}"


TEST_ACCURACY = Metric("test_accuracy", percent=True)


def effect_rows(entries: Sequence[Entry], metric: Metric = TEST_ACCURACY, key: str = "reached") -> Rows:
    """Headings, then a row for each arm: its result, which is under ``key`` of its entry, and its differences."""
    rows: Rows = [("arm", metric.heading, "- baseline", "p", "- control", "p")]
    for entry in entries:
        reached = entry[key]
        cells = [metric.value(reached)] if reached else ["-"]
        for name in ("baseline", "control"):
            test = entry["difference"].get(name)
            cells += [metric.difference(test), shown_p(test["p_corrected"])] if test else ["", ""]
        rows.append((shown_arm(entry), *cells))
    return rows


def judged(entries: Sequence[Entry], metric: Metric = TEST_ACCURACY, control: str = "its random control") -> list[str]:
    """The conclusions from the paired differences."""
    said = []
    for name, what in (("baseline", "the baseline"), ("control", control)):
        tests = [(entry["arm"], entry["difference"].get(name)) for entry in entries]
        told = [(arm, test) for arm, test in tests if test and test["p_corrected"] is not None]
        if not told:
            continue
        sorts: dict[str, list[str]] = {"Better than": [], "Worse than": [], "No difference found from": []}
        for arm, test in told:
            found = test["p_corrected"] < LEVEL
            sort = ("Better than" if metric.better(test) else "Worse than") if found else "No difference found from"
            sorts[sort].append(f"{arm} ({metric.difference(test)})" if found else arm)
        said += [f"{sort} {what}: {', '.join(arms)}." for sort, arms in sorts.items() if arms]
    return said


def shown_arm(entry: Entry) -> str:
    return entry["arm"] + (f" ({len(entry['failed'])} failed)" if entry["failed"] else "")


def shown_p(p: float | None) -> str:
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def shown_reach(reach: Mapping[str, Any] | None, form: str = ".1f") -> str:
    """When an arm was as good as the best of the baseline: the median over the seeds, and how many of them were."""
    if reach is None or not reach["seeds"]:
        return ""
    share = f"({reach['reached']}/{reach['seeds']})"
    return f"never {share}" if reach["median"] is None else f"{reach['median']:{form}} {share}"


def about_tests(seeds: int, tests: int, pairing: str) -> list[str]:
    """How to read intervals and p-values.

    Args:
        pairing: a sentence on what the runs of one seed have in common.
    """
    if seeds < 2:
        return []
    about = [
        f"Means over {seeds} seeds ± half of their 95 % confidence interval (Student's t). Differences are paired: "
        f"{pairing} p: paired t-test (if all differences are the same, a sign test), corrected by Holm's method for "
        f"{'the one test' if tests == 1 else f'all {tests} tests'} of this comparison; below "
        f"{LEVEL} a difference counts as found. Intervals are of single differences, not corrected.",
        "The p-values are valid for arms and seeds that were fixed in advance: if you look at results, add seeds or "
        "arms and look again, you will find a difference sooner or later, even if there is none.",
    ]
    if seeds < FEW_SEEDS:
        about.append(f"{seeds} seeds are few: only differences that are large beside these intervals can be found.")
    return about
