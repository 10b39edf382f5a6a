"""Trimmed cross entropy beside ``F.cross_entropy(reduction="none")`` and ``topk``."""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

import batchkern

KEEP = 0.2


def problem(rows: int, classes: int, dtype: torch.dtype) -> harness.Problem:
    logits = 2 * torch.randn(rows, classes)
    target = torch.multinomial(logits.softmax(1), 1).squeeze(1)  # labels of a model that is as sure as it is right
    logits = logits.to(dtype)
    kept = max(round(KEEP * rows), 1)

    def eager(x: Tensor) -> Tensor:
        # In bf16 the losses would be bf16 too, full of ties, and other rows would be kept.
        return F.cross_entropy(x.float(), target, reduction="none").topk(kept).values.mean()

    return harness.Problem(
        logits,
        ours=lambda x: batchkern.trimmed_cross_entropy(x, target, KEEP),
        inplace=lambda x: batchkern.trimmed_cross_entropy(x, target, KEEP, inplace_backward=True),
        eager=eager,
        floor_bytes={
            "forward": logits.nbytes,
            "backward": (1 + KEEP) * logits.nbytes,
            "full": (2 + KEEP) * logits.nbytes,
        },
    )


def cases() -> list[harness.Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    shapes = [(4096, 1000, fp32), (1024, 32000, fp32), (128, 10, fp32), (4096, 1000, bf16)]
    if harness.QUICK:
        shapes = [(256, 100, fp32), (256, 100, bf16)]
    return [
        harness.Case(
            "trimmed_cross_entropy",
            f"{rows}x{classes} {'bf16' if dtype == bf16 else 'fp32'}",
            partial(problem, rows, classes, dtype),
            variants=("ours", "ours inplace", *harness.PEERS),
        )
        for rows, classes, dtype in shapes
    ]


@harness.benchmark_rows(cases())
def test_trimmed_cross_entropy(
    benchmark: Any, bench: harness.Bench, case: harness.Case, phase: str, variant: str
) -> None:
    bench.row(benchmark, case, phase, variant)
