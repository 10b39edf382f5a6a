"""What a comparison may conclude: intervals, paired differences over seeds, and how many of them to believe."""

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
"""Of the whole fall of a training loss: so close to its least, it has converged."""


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval by Student's t; ``None`` for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    quantile = float(require("scipy.stats", "train").t.ppf(1 - LEVEL / 2, len(values) - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired_difference(values: Mapping[Seed, float], reference: Mapping[Seed, float]) -> dict[str, Any] | None:
    """The mean of ``values - reference`` over the seeds that both have, its interval and its p-value.

    The p-value is that of the two-sided paired t-test. Where all differences are equal there is no deviation to judge
    by (accuracies are multiples of one test image) and no interval: then it is 1 for differences of zero, else that of
    the sign test. ``None`` without a common seed; a single one has no interval and no p-value.
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
    """Sets ``p_corrected`` of all by Holm's method: where nothing has an effect, 95 % of comparisons find none."""
    tested = [difference for difference in differences if difference["p"] is not None]
    if tested:
        adjust = require("statsmodels.stats.multitest", "train").multipletests
        corrected = adjust([difference["p"] for difference in tested], alpha=LEVEL, method="holm")[1]
        for difference, p in zip(tested, corrected, strict=True):
            difference["p_corrected"] = float(p)


def differences(
    values: Mapping[K, Mapping[Seed, float]], pairs: Iterable[tuple[K, K]]
) -> dict[tuple[K, K], dict[str, Any] | None]:
    """The :func:`paired_difference` of each pair of keys, all of them one family of tests for :func:`correct`. A pair
    that is named twice is one test."""
    none: dict[Seed, float] = {}
    found = {(key, other): paired_difference(values.get(key, none), values.get(other, none)) for key, other in pairs}
    correct([difference for difference in found.values() if difference])
    return found


def median_reach(reached: Sequence[float | None]) -> dict[str, Any]:
    """The median over the seeds of what :func:`first_reaching` gave; ``None``: more than half never did."""
    median = statistics.median(math.inf if x is None else x for x in reached) if reached else math.inf
    return {
        "median": median if math.isfinite(median) else None,
        "reached": sum(x is not None for x in reached),
        "seeds": len(reached),
        "values": list(reached),
    }


def first_reaching(accuracies: Sequence[float], used: Sequence[float], target: float) -> float | None:
    """What was used of a budget when the accuracy first reached ``target``; ``None``: it never did."""
    return next((x for x, accuracy in zip(used, accuracies, strict=True) if accuracy >= target), None)


def converged(losses: Sequence[float]) -> int:
    """The epoch, counted from 1, in which a training loss came to its least, but for 1 % of its whole fall."""
    least = min(losses)
    limit = least + CONVERGED * (losses[0] - least)
    return next(epoch for epoch, loss in enumerate(losses, 1) if loss <= limit)
