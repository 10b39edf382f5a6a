"""Trimmed mean of any losses beside ``topk(k).values.mean()``."""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor

import batchkern

KEEP = 0.2


def problem(rows: int) -> harness.Problem:
    losses = torch.randn(rows).exp()  # skewed, as losses are
    kept = max(round(KEEP * rows), 1)

    def eager(x: Tensor) -> Tensor:
        return x.topk(kept, sorted=False).values.mean()

    size = losses.nbytes
    return harness.Problem(
        losses,
        ours=lambda x: batchkern.trimmed_mean(x, KEEP),
        eager=eager,
        floor_bytes={"forward": size, "backward": size, "full": 2 * size},
    )


CASES = [
    harness.Case("trimmed_mean", str(rows), partial(problem, rows))
    for rows in ((10_000,) if harness.QUICK else (1_000_000, 128))
]


@harness.benchmark_rows(CASES)
def test_trimmed_mean(benchmark: Any, bench: harness.Bench, case: harness.Case, phase: str, variant: str) -> None:
    bench.row(benchmark, case, phase, variant)
