"""Functions for Markdown tables and for numbers with units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NOT_YET = "not yet measured"
PREFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without the columns that are empty in all rows; an empty string if there are no rows."""
    if not rows:
        return ""
    shown = [place for place in range(len(headings)) if any(row[place] for row in rows)]
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line[place] for place in shown) + " |" for line in lines)


def paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


class Footnotes:
    """Footnotes, numbered in the order of their first use."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, note: str) -> str:
        return f" ({self.numbers.setdefault(note, len(self.numbers) + 1)})" if note else ""

    def __str__(self) -> str:
        return "; ".join(f"({number}) {note}" for note, number in self.numbers.items())


def quantity(value: float | None, unit: str) -> str:
    """Three significant digits and a unit with a prefix: ``5.84 ms``, ``131 MB``. Prefixes below 1
    are used for seconds only."""
    if value is None:
        return ""
    rounded = float(f"{value:.3g}")
    fitting = [key for key, scale in PREFIXES.items() if scale <= rounded * (1 + 1e-9)]
    if unit == "s":
        prefix = "" if rounded >= 1 else (fitting or ["n"])[-1]
    else:
        prefix = fitting[-1] if rounded >= 1e3 else ""
    scaled = rounded / PREFIXES[prefix]
    decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:,.{0 if unit == 'B' and not prefix else decimals}f} {prefix}{unit}"


def seconds(value: float | None) -> str:
    return quantity(value, "s")


def size(value: float | None) -> str:
    return quantity(value, "B")


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def ratio(value: float | None) -> str:
    """A ratio with one decimal, or with two if it is below 0.95."""
    if value is None:
        return ""
    return f"{value:,.1f}" if value >= 0.95 else f"{value:.2f}"


def median(value: dict[str, Any] | None) -> float | None:
    return None if value is None else value["median"]


def dimensions(shape: dict[str, Any]) -> str:
    """A shape as text: ``rows 4,096, classes 1,000``."""
    return ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in shape.items())


def labels(row: dict[str, Any]) -> str:
    """The properties of a case other than its shape, as text: dtype, keep and kind. For ``rank_batches``, keep is
    called fraction."""
    keep, word = row.get("keep"), "fraction" if row["op"] == "rank_batches" else "keep"
    said = [row.get("dtype") or "", "" if keep is None else f"{word} {keep:g}", row.get("kind") or ""]
    return ", ".join(word for word in said if word)
