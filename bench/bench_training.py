"""End to end: each strategy in the trainer beside the same model in a bare PyTorch loop. Three minutes on two cores.

``BATCHKERN_BENCH_DATA=cifar10-train.parquet`` trains on images of that file.
"""

from __future__ import annotations

from typing import Any

import pytest
from training import CASES, Case, measure


# Kept rows of a network with batch norm get statistics of their own: here only their time counts.
@pytest.mark.filterwarnings("ignore:Trimming.*batch norm")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.strategy}".replace(" ", "_"))
def test_training(session: Any, case: Case) -> None:
    session.add("training", measure(case))
