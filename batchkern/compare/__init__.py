"""Whether a strategy helps: arms x seeds at equal budgets, against the baseline and against random selection.

A seed stands for the same initial weights and the same order of the data in every arm, so arms differ in nothing but
their strategies.
"""

from batchkern.compare.arms import (
    ARMS,
    BUDGETS,
    control_of,
    split_arms,
    with_controls,
)
from batchkern.compare.comparison import Comparison
from batchkern.compare.running import RESULTS, run

__all__ = [
    "ARMS",
    "BUDGETS",
    "RESULTS",
    "Comparison",
    "control_of",
    "run",
    "split_arms",
    "with_controls",
]
