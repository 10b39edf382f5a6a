"""Measures each strategy end to end in the trainer, and the same model in a bare PyTorch loop. Takes three minutes on
two cores.

``BATCHKERN_BENCH_DATA=cifar10-train.parquet`` trains on images of that file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.machine import QUICK
from bench.training import CASES, Case, measure

SECONDS, SECONDS_WITH_TARGET = 8.0, 24.0
"""The seconds that rounds take together. A round of resnet8 takes 5 seconds, and its ratio varies by 2 %."""


# With batch norm, the kept rows are normalised with their own statistics; here only the time matters.
@pytest.mark.filterwarnings("ignore:Trimming.*batch norm")
# Cases with a target come first, in case time runs out.
@pytest.mark.parametrize(
    "case",
    sorted(CASES, key=lambda case: case.target is None),
    ids=lambda case: f"{case.model}-{case.strategy}".replace(" ", "_"),
)
def test_training(session: Any, case: Case) -> None:
    session.begin()
    budget = SECONDS if case.target is None else SECONDS_WITH_TARGET
    if QUICK:
        case, budget = replace(case, model="cnn", batch_size=4), 0.0
    session.add("training", measure(case, session.device.device, budget))
