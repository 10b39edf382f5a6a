"""Ranking of batches by loss beside ``torch.topk``."""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor

import batchkern

FRACTION = 0.2


def problem(size: int) -> harness.Problem:
    losses = torch.randn(size).exp()
    count = max(1, int(FRACTION * size))

    def assert_same(indices: Tensor, _: None, peer: Tensor, __: None) -> None:
        """Equal losses may have any order in the peer's result, which says nothing of ties."""
        torch.testing.assert_close(losses[indices], losses[peer], rtol=0, atol=0)

    return harness.Problem(
        losses,
        ours=lambda x: batchkern.rank_batches(x, FRACTION),
        eager=lambda x: x.topk(count).indices,
        floor_bytes={"forward": losses.nbytes + 8 * count},
        check=assert_same,
    )


CASES = [
    harness.Case("rank_batches", str(size), partial(problem, size), phases=("forward",))
    for size in (400, 10_000 if harness.QUICK else 1_000_000)
]


@harness.benchmark_rows(CASES)
def test_rank_batches(benchmark: Any, bench: harness.Bench, case: harness.Case, phase: str, variant: str) -> None:
    bench.row(benchmark, case, phase, variant)
