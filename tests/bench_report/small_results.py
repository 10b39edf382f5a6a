"""Files of results made by hand, small enough to write their tables by hand too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPE = {"rows": 4096, "classes": 1000}
MACHINE = {
    "cpu": "A Processor",
    "threads": 2,
    "device": "cpu",
    "gpu": None,
    "torch": "2.11.0",
    "commit": "abc1234",
    "dirty": False,
    "date": "2026-11-22T05:00:00+00:00",
    "quick": False,
}
FACTS = "A Processor, 2 threads, torch 2.11.0, commit abc1234, 2026-11-22"


def spread(median: float) -> dict[str, float]:
    return {"median": median, "p20": 0.9 * median, "p80": 1.2 * median}


def row(
    op: str, shape: dict[str, int], variant: str, seconds: float | None, times: float | None = None, **changes: Any
):
    """A row of operations; ``times``: how many times ours."""
    own = {
        "op": op,
        "shape": shape,
        "dtype": "float32",
        "keep": 0.2,
        "kind": "",
        "mode": "full",
        "variant": variant,
        "time": None if seconds is None else spread(seconds),
        "ratio": None if times is None else spread(times),
        "floor": {"bytes": 1.6e7, "flops": 0, "seconds": 1e-3},
        "fraction": None if seconds is None else 1e-3 / seconds,
        "peak_bytes": 131e6,
    }
    return own | changes


def sweep(
    variant: str, sizes: list[int], seconds: list[float], peak_bytes: list[float], **changes: Any
) -> dict[str, Any]:
    own = {
        "op": "trimmed_mean",
        "along": "rows",
        "fixed": {"classes": 10},
        "dtype": "float32",
        "keep": None,
        "kind": "",
    }
    own |= {"mode": "full", "variant": variant, "sizes": sizes, "seconds": seconds, "peak_bytes": peak_bytes}
    return own | {"fractions": [1e-6 * size / cost for size, cost in zip(sizes, seconds)]} | changes


def write(path: Path, machine: dict[str, Any] | None = None, **lists: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": MACHINE | (machine or {}), **lists}))
    return path
