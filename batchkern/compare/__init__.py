"""Whether a strategy helps: arms x seeds at equal budgets, against the baseline and against random selection.

A seed stands for the same initial weights and the same order of the data in every arm, so arms differ in nothing but
their strategies.
"""

from batchkern.compare.arms import ARMS, BUDGETS
from batchkern.compare.arms import control_of as control_of
from batchkern.compare.arms import split_arms as split_arms
from batchkern.compare.arms import with_controls as with_controls
from batchkern.compare.comparison import Comparison
from batchkern.compare.running import RESULTS as RESULTS
from batchkern.compare.running import run

# What is imported ``as`` itself is for other modules of the package, and is no part of the API.
__all__ = ["ARMS", "BUDGETS", "Comparison", "run"]
