"""Fits the exponent with which the cost of an operation grows with its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TIMES_OVERHEAD = 10
POINTS = 3


@dataclass(frozen=True)
class Growth:
    exponent: float
    settled: bool
    """Whether the cost that does not depend on the size was small for the fitted sizes; if not, the exponent may be too
    low."""


def growth(sizes: Sequence[float], costs: Sequence[float | None]) -> Growth | None:
    """The least-squares slope of the logarithm of cost over that of size, on the upper end of a sweep.

    Overhead, the cost that does not depend on the size, is at most the cost of the cheapest point. It is therefore at
    most a tenth of any cost that is ten times as high. The fit uses the largest sizes, as long as all of them cost that
    much. If these are fewer than three, it uses the three largest sizes, and ``settled`` is False because overhead may
    matter there. The result is ``None`` if fewer than three points have a cost, or if a cost to be fitted is 0.
    Constant costs have the exponent 0.
    """
    points = sorted((size, cost) for size, cost in zip(sizes, costs, strict=False) if cost is not None and size > 0)
    if len(points) < POINTS:
        return None
    least = min(cost for _, cost in points)
    if least == max(cost for _, cost in points):
        return Growth(0.0, True)
    first = len(points)
    while first and points[first - 1][1] > 0 and points[first - 1][1] >= TIMES_OVERHEAD * least:
        first -= 1
    settled = len(points) - first >= POINTS
    upper = points[first:] if settled else points[-POINTS:]
    if min(cost for _, cost in upper) <= 0:  # 0 has no logarithm
        return None
    size, cost = np.log(np.array(upper, dtype=float)).T
    return Growth(float(np.polyfit(size, cost, 1)[0]), settled)
