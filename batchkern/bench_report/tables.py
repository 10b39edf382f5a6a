"""Tables of everything except single calls of operations: sweeps, trainings, accuracy, and selection of tokens."""

from __future__ import annotations

import json
from statistics import fmean
from typing import Any

from batchkern.bench_report.fit import Growth, growth
from batchkern.bench_report.markdown import Footnotes, dimensions, labels, paragraphs, quantity, seconds, table
from batchkern.bench_report.operations import name, spread
from batchkern.bench_report.results import LANGUAGE, Results

LANGUAGE_BUDGETS = {"updates": "equal updates", "cost": "equal cost", "seconds": "equal seconds"}
ON_THE_WAY = "Mean difference to `all` after fewer updates of the same trainings:"
BRACKETS = (
    "Exponents are slopes of log cost over log size where a cost is at least ten times the sweep's lowest; in brackets "
    "those of the three largest sizes, where it is not, and what is paid at any size may still count."
)


def sweeps(rows: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """The rows of each sweep, by variant."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = [row["op"], row["along"], *(row.get(part) for part in ("fixed", "dtype", "keep", "kind", "mode"))]
        found.setdefault(json.dumps(key), {})[row["variant"]] = row
    return list(found.values())


def about(row: dict[str, Any]) -> str:
    """The properties that are fixed within a sweep, as text."""
    mode = row.get("mode") or "full"
    parts = (dimensions(row.get("fixed") or {}), labels(row), "" if mode == "full" else mode)
    return ", ".join(part for part in parts if part)


def growth_table(results: Results) -> str:
    """A table of the exponents with which the time and memory of each implementation grow with the size."""
    found = sweeps(results.rows("growth"))
    variants = list(dict.fromkeys(variant for sweep in found for variant in sweep))
    costs = {"time": "seconds", "memory": "peak_bytes"}
    lines = []
    for sweep in found:
        first = next(iter(sweep.values()))
        sizes = sorted({number for row in sweep.values() for number in row["sizes"]})
        fits = [
            _exponent(growth(row["sizes"], row.get(key) or []) if (row := sweep.get(variant)) else None)
            for key in costs.values()
            for variant in variants
        ]
        span = f"{first['along']}, {sizes[0]:,} to {sizes[-1]:,}" if sizes else first["along"]
        lines.append([f"`{first['op']}`", span, about(first), *fits])
    notes = Footnotes()
    less = {row["variant"]: f"computes less: {row['less']}" for row in results.rows("growth") if row.get("less")}
    called = {variant: name(variant) + notes.mark(less.get(variant, "")) for variant in variants}
    headings = ["operation", "along", "at", *(f"{cost}: {called[variant]}" for cost in costs for variant in variants)]
    return paragraphs(table(headings, lines), str(notes), BRACKETS if lines else "")


def _exponent(fit: Growth | None) -> str:
    if fit is None:
        return ""
    exponent = f"{fit.exponent + 0.0:.2f}".replace("-0.00", "0.00")
    return exponent if fit.settled else f"({exponent})"


def training(results: Results) -> str:
    """A table that compares the trainer with a bare loop that makes the same updates."""
    headings = ["strategy", "model", "data", "an epoch, bare", "an epoch, trainer", "samples/s", "trainer / bare"]
    headings += ["p20 - p80", "target", "images loaded an epoch"]
    return table(headings, [_training(row) for row in results.rows("training")])


def _training(row: dict[str, Any]) -> list[str]:
    data = [row.get("data") or ""]
    data += [f"{row['images']:,} images"] if row.get("images") else []
    data += [f"batches of {row['batch_size']:,}"] if row.get("batch_size") else []
    speed, loaded = row.get("samples_per_s"), row.get("images_loaded_per_epoch")
    return [
        f"`{row['strategy']}`",
        row.get("model") or "",
        ", ".join(data),
        seconds(row.get("bare_seconds_per_epoch")),
        seconds(row.get("seconds_per_epoch")),
        "" if speed is None else f"{speed:,.0f}",
        "" if row.get("ratio") is None else f"{row['ratio']['median']:.2f}",
        spread(row.get("ratio"), "{:.2f}".format),
        "" if row.get("target") is None else f"at most {row['target']:.2f}",
        "" if loaded is None else f"{loaded:,.0f}",
    ]


def accuracy(results: Results) -> str:
    """Tables of the errors with respect to float64, one for each operation: a line for each size of the perturbation, a
    column for each number of classes and implementation."""
    tables = []
    rows = results.rows("accuracy")
    for op in dict.fromkeys(row["op"] for row in rows):
        errors = {
            (row["perturbation"], row["classes"], row["variant"]): row["error"] for row in rows if row["op"] == op
        }
        columns = list(dict.fromkeys((classes, variant) for _, classes, variant in errors))
        columns.sort(key=lambda column: column[0])  # stable: implementations stay in the order of the file
        headings = ["perturbation", *(f"{name(variant)}, {classes:,} classes" for classes, variant in columns)]
        lines = []
        for perturbation in sorted({key[0] for key in errors}, reverse=True):
            found = [errors.get((perturbation, *column)) for column in columns]
            lines.append([_power(perturbation), *("" if error is None else f"{error:.1e}" for error in found)])
        tables.append(paragraphs(f"`{op}`, relative error of the mean:", table(headings, lines)))
    return paragraphs(*tables)


def confident(results: Results) -> str:
    """A table of the gradients of confident tokens, whose target has a high probability."""
    rows = results.rows("confident")
    if not rows:
        return ""
    gradients = ("exact", "ours", "eager")
    lines = [[f"{row['probability']:.5f}", *(f"{row[name]:.4e}" for name in gradients)] for row in rows]
    return paragraphs(
        f"`{rows[0]['op']}`, gradient by the logit of a target in bfloat16:",
        table(["probability of the target", *gradients], lines),
    )


def _power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+")


def language(results: Results) -> str:
    """Tables of the arms of examples/selective_lm.py at equal updates, cost and seconds, and of the selection in
    comparison with training on the clean part of the text alone."""
    if results.sort != LANGUAGE:
        return ""
    settings = results.content["settings"]
    tables = []
    for noise in dict.fromkeys(row["noise"] for row in results.rows("arms")):
        arms, references = (
            [row for row in results.rows(name) if row["noise"] == noise] for name in ("arms", "references")
        )
        tables += [_about_text(noise, settings), _arms(arms)]
        tables += [ON_THE_WAY, _on_the_way(arms, settings)] if len(arms) > 1 else []
        tables += [_about_references(settings), _references(references, settings)] if references else []
    return paragraphs(*tables)


def _about_text(noise: float, settings: dict[str, Any]) -> str:
    seeds = settings["seeds"]
    text = f"half of the tokens overwritten in {_share(noise)} of the sequences" if noise else "nothing overwritten"
    return (
        f"**Training text with {text}**, keep {settings['keep']:g}, {seeds} seed{'s' * (seeds > 1)}. "
        "Loss on held-out text, in brackets the updates made; its difference to that of `all`, in brackets p:"
    )


def _about_references(settings: dict[str, Any]) -> str:
    return (
        "Loss of `excess` less that of `clean` of the same share (below 0: the selection is worth more than the clean "
        f"part that it needs). The reference made {settings['reference_updates']:,} updates; the best point of `clean` "
        "is the one of lowest loss on the held-out text itself:"
    )


def _arms(arms: list[dict[str, Any]]) -> str:
    headings = ["arm", "operations of an update", "time of an update"]
    headings += [heading for budget in LANGUAGE_BUDGETS.values() for heading in (budget, "- `all`")]
    lines = []
    for arm in arms:
        cells = [f"`{arm['arm']}`", quantity(arm["flops"], "flop"), seconds(arm["seconds"])]
        for budget in LANGUAGE_BUDGETS:
            cells.append(f"{_loss(arm['loss'][budget])} ({arm['updates'][budget]:,})")
            cells.append(_difference(arm["difference"].get(budget)))
        lines.append(cells)
    return table(headings, lines)


def _on_the_way(arms: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """A table of the mean differences to the first arm, ``all``, after some of the numbers of updates at which every
    training was tested."""
    courses = [dict(zip(arm["curve"]["updates"], zip(*arm["curve"]["loss"], strict=True), strict=True)) for arm in arms]
    common = sorted(set.intersection(*(set(course) for course in courses)) - {settings["updates"]})
    points = [*common[1::2], settings["updates"]]
    lines = []
    for arm, course in zip(arms[1:], courses[1:], strict=True):
        pairs = [zip(course[point], courses[0][point], strict=True) for point in points]
        lines.append([f"`{arm['arm']}`", *(f"{fmean(x - plain for x, plain in pair):+.3f}" for pair in pairs)])
    return table(["arm", *(f"{point:,}" for point in points)], lines)


def _references(references: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    read = settings["updates"] * settings["batch"] * settings["length"]  # tokens read in the whole training of `clean`
    headings = [
        "clean part (tokens, times read)",
        "loss of the reference",
        "best point of `clean`",
        *LANGUAGE_BUDGETS.values(),
    ]
    headings.append("equal updates, - best point")
    lines = [
        [
            f"{_share(row['share'])} ({row['tokens']:,}, {read / row['tokens']:.1f})",
            _loss(row["loss"]),
            f"{_loss(row['best']['loss'])} ({row['best']['updates']:,})",
            *(_difference(row["difference"][budget]) for budget in (*LANGUAGE_BUDGETS, "best")),
        ]
        for row in references
    ]
    return table(headings, lines)


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _loss(value: dict[str, Any]) -> str:
    half = value["half_width"]
    return f"{value['mean']:.3f}" + ("" if half is None else f" ± {half:.3f}")


def _difference(test: dict[str, Any] | None) -> str:
    if test is None:
        return ""
    half, p = test["half_width"], test["p_corrected"]
    told = f"{test['mean']:+.3f}" + ("" if half is None else f" ± {half:.3f}")
    return told if p is None else told + (" (<0.001)" if p < 0.001 else f" ({p:.3f})")
