"""A comparison of strategies: arms x seeds at equal budgets, against the baseline and against random selection.

For each seed, all arms have the same initial weights and the same order of the data, so arms differ only in their
strategies.
"""

from batchkern.compare.arms import ARMS, BUDGETS
from batchkern.compare.arms import control_of as control_of
from batchkern.compare.arms import split_arms as split_arms
from batchkern.compare.arms import with_controls as with_controls
from batchkern.compare.comparison import Comparison
from batchkern.compare.running import RESULTS as RESULTS
from batchkern.compare.running import run

# Names imported ``as`` themselves are for other modules of the package, and are not part of the API.
__all__ = ["ARMS", "BUDGETS", "Comparison", "run"]
