"""Whether a strategy helps: arms x seeds at equal budgets, against the baseline and against random selection.

A seed stands for the same initial weights and the same order of the data in every arm, so arms differ in nothing but
their strategies.
"""

from batchkern.compare.arms import (
    ARMS,
    BUDGETS,
    check_passive,
    control_of,
    slug,
    split_arms,
    wants_passive,
    with_controls,
)
from batchkern.compare.comparison import Comparison
from batchkern.compare.running import RESULTS, run

__all__ = [
    "ARMS",
    "BUDGETS",
    "RESULTS",
    "Comparison",
    "check_passive",
    "control_of",
    "run",
    "slug",
    "split_arms",
    "wants_passive",
    "with_controls",
]
