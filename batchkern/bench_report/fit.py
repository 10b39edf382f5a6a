"""With which power of its size the cost of an operation grows."""

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
    """Whether what is paid at any size was small where this was fitted; else it may be too low."""


def growth(sizes: Sequence[float], costs: Sequence[float | None]) -> Growth | None:
    """The least-squares slope of the logarithm of cost over that of size, on the upper end of a sweep.

    Overhead is at most what the cheapest point costs, and so at most a tenth of a cost that is ten times that. The
    fit takes the largest sizes from where all cost so much; where these are fewer than three, the three largest sizes
    that there are, and says that overhead may count there. ``None`` where fewer than three points have a cost.
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
    if min(cost for _, cost in upper) <= 0:  # nothing at first, so no power of the size
        return None
    size, cost = np.log(np.array(upper, dtype=float)).T
    return Growth(float(np.polyfit(size, cost, 1)[0]), settled)
