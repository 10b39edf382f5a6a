"""Tables of operations: one with all figures of a file, and those in README.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from batchkern.bench_report.markdown import (
    NOT_YET,
    Footnotes,
    dimensions,
    labels,
    median,
    paragraphs,
    percent,
    ratio,
    seconds,
    size,
    table,
)
from batchkern.bench_report.results import Results

OURS, EAGER, COMPILE = "ours", "eager", "compile"
LINEAR = "linear_trimmed_cross_entropy"
NAMES = {COMPILE: "compiled"}

Row = dict[str, Any]
Case = dict[str, Row]
"""The rows of one case in one mode, by variant."""


def cases(rows: Iterable[Row]) -> list[Case]:
    """The rows, grouped by case and mode, in the order of the file."""
    found: dict[str, Case] = {}
    for row in rows:
        key = json.dumps([row["op"], row["shape"], *(row.get(name) for name in ("dtype", "keep", "kind", "mode"))])
        found.setdefault(key, {})[row["variant"]] = row
    return list(found.values())


def whole_passes(rows: Iterable[Row]) -> list[Case]:
    """For each case the rows that measure what a training step costs: forward and backward pass together, or the
    forward pass alone if there is no such row."""
    chosen: dict[str, Case] = {}
    for case in cases(rows):
        row = next(iter(case.values()))
        key = json.dumps([row["op"], row["shape"], *(row.get(name) for name in ("dtype", "keep", "kind"))])
        mode = row.get("mode") or "full"
        if mode == "full" or (mode == "forward" and key not in chosen):
            chosen[key] = case
    return list(chosen.values())


def is_ours(variant: str) -> bool:
    return variant == OURS or variant.startswith(OURS + " ")


def name(variant: str) -> str:
    return NAMES.get(variant, f"`{variant}`" if "." in variant else variant)


def what(row: Row) -> str:
    """A case in words: its shape, its other properties, and its mode."""
    mode = row.get("mode") or "full"
    return ", ".join(part for part in (dimensions(row["shape"]), labels(row), mode if mode != "full" else "") if part)


# --- all of a file ---------------------------------------------------------------------------------------------------


def detail(rows: list[Row]) -> str:
    """A table of every variant of every case of one operation, with all its measurements."""
    notes = Footnotes()
    headings = [
        "shape",
        "",
        "mode",
        "variant",
        "backend",
        "time",
        "p20 - p80",
        "rounds",
        "/ ours",
        "floor",
        "of the floor",
    ]
    headings += ["peak memory", "launches", "in a graph", "host", "error", "error of the gradient", "target"]
    lines = [_detailed(row, notes) for row in rows]
    return paragraphs(table(headings, lines), str(notes), _refused(rows))


def _refused(rows: list[Row]) -> str:
    """A list of the peers that were not timed because they compute something else; empty if there are none."""
    unequal = [f"- {name(row['variant'])} at {what(row)}: {row['unequal']}" for row in rows if row.get("unequal")]
    return "Not timed, since it does not compute the same:\n\n" + "\n".join(unequal) if unequal else ""


def _detailed(row: Row, notes: Footnotes) -> list[str]:
    floor, error = row.get("floor") or {}, row.get("error") or {}
    own = row["variant"] == OURS
    return [
        dimensions(row["shape"]),
        labels(row),
        row.get("mode") or "",
        _marked(row, notes),
        row.get("backend") or "",
        time(row),
        spread(row.get("time"), seconds),
        str(row.get("rounds") or ""),
        "" if own else ratio(median(row.get("ratio"))) + spread(row.get("ratio"), ratio, " ({})"),
        seconds(floor.get("seconds")),
        percent(row.get("fraction")),
        size(row.get("peak_bytes")),
        "" if row.get("launches") is None else str(row["launches"]),
        seconds(median(row.get("graph"))),
        seconds(row.get("host")),
        _error(error.get("result")),
        _error(error.get("gradient")),
        target(row),
    ]


def target(row: Row) -> str:
    """The target of a case: a fraction of the floor's speed, or a device time if kernel launches limit the speed."""
    if row.get("target_fraction") is not None:
        return f"{percent(row['target_fraction'])} of the floor"
    return seconds(row.get("target_s"))


def _marked(row: Row, notes: Footnotes) -> str:
    less = row.get("less")
    return name(row["variant"]) + notes.mark(f"computes less: {less}" if less else "")


def time(row: Row) -> str:
    if row.get("time") is None:
        return "not timed" if row.get("unequal") else NOT_YET
    return seconds(row["time"]["median"])


def spread(value: dict[str, Any] | None, told: Any, form: str = "{}") -> str:
    if value is None or value.get("p20") is None or value.get("p80") is None:
        return ""
    return form.format(f"{told(value['p20'])} - {told(value['p80'])}")


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


# --- README.md -------------------------------------------------------------------------------------------------------


def operations(results: Results) -> str:
    """A table that compares each case with eager and compiled PyTorch. Each of our variants has its own line."""
    headings = ["operation", "shape", "ours", "eager", "compiled", "eager / ours", "compiled / ours", "of the floor"]
    headings += ["peak memory", "eager's"]
    lines = []
    for case in whole_passes(row for row in results.rows("operations") if row["op"] != LINEAR):
        eager, compiled = case.get(EAGER, {}), case.get(COMPILE, {})
        for variant, row in case.items():
            if is_ours(variant) and row.get("time") is not None:
                lines.append(
                    [
                        f"`{row['op']}`" + f", {variant.removeprefix(OURS).strip()}" * (variant != OURS),
                        what(row),
                        *(seconds(median(peer.get("time"))) for peer in (row, eager, compiled)),
                        *(ratio(_against(row, peer)) for peer in (eager, compiled)),
                        percent(row.get("fraction")),
                        *(size(peer.get("peak_bytes")) for peer in (row, eager)),
                    ]
                )
    return table(headings, lines)


def summary(results: Results) -> str:
    """A table with one case for each operation: of the cases with the lowest keep, the one with the largest floor."""
    largest: dict[str, Case] = {}
    for case in whole_passes(results.rows("operations")):
        row = case.get(OURS, {})
        if row.get("time") is not None and EAGER in case:
            known = largest.get(row["op"])
            if known is None or _extent(row) > _extent(known[OURS]):
                largest[row["op"]] = case
    headings = ["operation", "shape", "ours", "eager", "eager / ours", "of the floor"]
    lines = []
    for op, case in largest.items():
        row, eager = case[OURS], case[EAGER]
        times = (seconds(median(variant.get("time"))) for variant in (row, eager))
        lines.append([f"`{op}`", what(row), *times, ratio(_against(row, eager)), percent(row.get("fraction"))])
    return table(headings, lines)


def _extent(row: Row) -> tuple[float, float]:
    return -(row.get("keep") or 0.0), (row.get("floor") or {}).get("seconds") or 0.0


def _against(row: Row, peer: Row) -> float | None:
    """The peer's time divided by the time of this variant, from the ratios of both to ours, which were taken within
    rounds."""
    theirs = median(peer.get("ratio"))
    own = 1.0 if row["variant"] == OURS else median(row.get("ratio"))
    return None if theirs is None or own is None else theirs / own


def linear(results: Results) -> str:
    """Tables of the loss fused with its linear layer, one for each shape and dtype: a line for each keep, and a column
    for each implementation."""
    shapes: dict[tuple[str, str], list[Case]] = {}
    rows = [row for row in results.rows("operations") if row["op"] == LINEAR]
    for case in whole_passes(row for row in rows if row.get("time") is not None):
        row = next(iter(case.values()))
        shapes.setdefault((dimensions(row["shape"]), row.get("dtype") or ""), []).append(case)
    notes = Footnotes()
    tables = []
    for (shape, dtype), found in shapes.items():
        variants = list(dict.fromkeys(variant for case in found for variant in case))
        less = {row["variant"]: _marked(row, notes) for case in found for row in case.values() if row.get("less")}
        headings = ["keep", *(less.get(variant, name(variant)) for variant in variants), "ours, of the floor"]
        lines = [_line(case, variants) for case in found]
        tables.append(paragraphs(f"{shape}, {dtype}: time, times ours, peak memory".strip(), table(headings, lines)))
    return paragraphs(*tables, str(notes), _refused(rows)) if tables else ""


def _line(case: Case, variants: list[str]) -> list[str]:
    first = next(iter(case.values()))
    cells = []
    for variant in variants:
        row = case.get(variant, {})
        parts = [seconds(median(row.get("time"))), ratio(median(row.get("ratio"))), size(row.get("peak_bytes"))]
        cells.append(", ".join(part for place, part in enumerate(parts) if part and (place != 1 or variant != OURS)))
    keep, kind = first.get("keep"), first.get("kind") or ""
    told = ", ".join(part for part in ("" if keep is None else f"{keep:g}", kind) if part)
    return [told, *cells, percent(case.get(OURS, {}).get("fraction"))]


def planned(results: Results) -> str:
    """A table of the targets for a GPU, with the measurements on it as far as they exist."""
    headings = [
        "operation",
        "shape",
        "target",
        "floor",
        "measured",
        "in a graph",
        "of the floor",
        "fastest peer / ours",
    ]
    lines = []
    for case in whole_passes(results.rows("operations")):
        row = case.get(OURS)
        if row and (target(row) or row.get("time") is None):
            lines.append(
                [
                    f"`{row['op']}`",
                    what(row),
                    target(row),
                    seconds((row.get("floor") or {}).get("seconds") or None),
                    time(row),
                    seconds(median(row.get("graph"))),
                    percent(row.get("fraction")),
                    _fastest_peer(case),
                ]
            )
    return table(headings, lines)


def _fastest_peer(case: Case) -> str:
    """The fastest peer, among those that compute as much as ours, with the ratio of its time to ours."""
    peers = {
        variant: times
        for variant, row in case.items()
        if not is_ours(variant) and not row.get("less") and (times := median(row.get("ratio"))) is not None
    }
    if not peers:
        return ""
    fastest = min(peers, key=lambda variant: peers[variant])
    return f"{name(fastest)} {ratio(peers[fastest])}"
