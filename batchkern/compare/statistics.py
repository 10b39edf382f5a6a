"""The statistics of a comparison: intervals, paired differences over seeds, and their correction for multiple tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from batchkern.errors import require

K = TypeVar("K", bound=Hashable)
Seed = TypeVar("Seed", int, str)

LEVEL = 0.05
CONVERGED = 0.01
"""A training loss has converged when it is within this fraction of its total decrease of its minimum."""


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval by Student's t; ``None`` for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    quantile = float(require("scipy.stats", "train").t.ppf(1 - LEVEL / 2, len(values) - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired_difference(values: Mapping[Seed, float], reference: Mapping[Seed, float]) -> dict[str, Any] | None:
    """The mean of ``values - reference`` over the seeds that both have, its interval and its p-value.

    The p-value is that of the two-sided paired t-test. If all differences are equal (accuracies are multiples of one
    test image), the deviation is zero and there is no interval: the p-value is then 1 for differences of zero, and
    otherwise that of the sign test. The result is ``None`` without a common seed; a single common seed gives no
    interval and no p-value.
    """
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    differences = [values[seed] - reference[seed] for seed in seeds]
    mean, half = interval(differences)
    p: float | None = None
    rounding = 1e-12 * max(abs(x) for seed in seeds for x in (values[seed], reference[seed]))
    if max(differences) - min(differences) > rounding:
        p = float(require("scipy.stats", "train").ttest_1samp(differences, 0.0).pvalue)
    elif len(seeds) > 1:
        half, p = None, 1.0 if abs(mean) <= rounding else 2.0 ** (1 - len(seeds))
    return {"mean": mean, "half_width": half, "p": p, "p_corrected": None, "seeds": len(seeds)}


def correct(differences: Sequence[dict[str, Any]]) -> None:
    """Sets ``p_corrected`` of all by Holm's method: if nothing has an effect, 95 % of comparisons find no
    difference."""
    tested = [difference for difference in differences if difference["p"] is not None]
    if tested:
        adjust = require("statsmodels.stats.multitest", "train").multipletests
        corrected = adjust([difference["p"] for difference in tested], alpha=LEVEL, method="holm")[1]
        for difference, p in zip(tested, corrected, strict=True):
            difference["p_corrected"] = float(p)


def differences(
    values: Mapping[K, Mapping[Seed, float]], pairs: Iterable[tuple[K, K]]
) -> dict[tuple[K, K], dict[str, Any] | None]:
    """The :func:`paired_difference` of each pair of keys, corrected together as one family of tests by :func:`correct`.
    A pair that is given twice is one test."""
    none: dict[Seed, float] = {}
    found = {(key, other): paired_difference(values.get(key, none), values.get(other, none)) for key, other in pairs}
    correct([difference for difference in found.values() if difference])
    return found


def median_reach(reached: Sequence[float | None]) -> dict[str, Any]:
    """The median over the seeds of the results of :func:`first_reaching`; ``None`` if more than half never reached
    it."""
    median = statistics.median(math.inf if x is None else x for x in reached) if reached else math.inf
    return {
        "median": median if math.isfinite(median) else None,
        "reached": sum(x is not None for x in reached),
        "seeds": len(reached),
        "values": list(reached),
    }


def first_reaching(accuracies: Sequence[float], used: Sequence[float], target: float) -> float | None:
    """The budget used when the accuracy first reached ``target``; ``None`` if it never did."""
    return next((x for x, accuracy in zip(used, accuracies, strict=True) if accuracy >= target), None)


def converged(losses: Sequence[float]) -> int:
    """The epoch, counted from 1, in which a training loss first came within 1 % of its total decrease of its
    minimum."""
    least = min(losses)
    limit = least + CONVERGED * (losses[0] - least)
    return next(epoch for epoch, loss in enumerate(losses, 1) if loss <= limit)
