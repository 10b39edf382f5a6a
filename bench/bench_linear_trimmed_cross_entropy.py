"""The linear layer and its trimmed cross entropy beside ``F.linear``, ``F.cross_entropy`` and ``topk``: time and peak
memory over keep. Full passes alone: a way to the gradient may make it in the forward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

import batchkern

ROWS, WIDTH, WORDS = (256, 32, 1000) if harness.QUICK else (2048, 512, 32000)
FUSED = "F.linear_cross_entropy"  # since torch 2.12
HAS_FUSED = hasattr(F, "linear_cross_entropy")


def problem(keep: float) -> harness.Problem:
    hidden, weight = torch.randn(ROWS, WIDTH), WIDTH**-0.5 * torch.randn(WORDS, WIDTH)
    target = torch.multinomial((hidden @ weight.t()).softmax(1), 1).squeeze(1)
    weight.requires_grad_()
    kept = max(round(keep * ROWS), 1)
    matmul = harness.median_seconds(partial(torch.mm, hidden, weight.detach().t(), out=torch.empty(ROWS, WORDS)))

    def trimmed(losses: Tensor) -> Tensor:
        return losses.topk(kept).values.mean()

    def eager(x: Tensor) -> Tensor:
        return trimmed(F.cross_entropy(F.linear(x, weight), target, reduction="none"))

    def fused(x: Tensor) -> Tensor:
        if keep == 1:  # its own chunks, which give no losses of single rows
            return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())
        return trimmed(F.linear_cross_entropy(x, weight, target, reduction="none"))

    gradients = hidden.nbytes + weight.nbytes
    products = min(1 + 3 * keep, 3 + 2 * (1 - keep))
    return harness.Problem(
        hidden,
        ours=lambda x: batchkern.linear_trimmed_cross_entropy(x, weight, target, keep),
        eager=eager,
        parameters=(weight,),
        peers={FUSED: fused} if HAS_FUSED else {},
        floor_bytes={"forward": gradients, "backward": gradients, "full": 2 * gradients},
        floor_seconds={"forward": matmul, "backward": (products - 1) * matmul, "full": products * matmul},
    )


CASES = [
    harness.Case(
        "linear_trimmed_cross_entropy",
        f"{ROWS}x{WIDTH}x{WORDS} keep {keep:g}",
        partial(problem, keep),
        phases=("full",),
        variants=("ours", *harness.PEERS, *([FUSED] if HAS_FUSED else [])),
    )
    for keep in (1.0, 0.5, 0.2, 0.1)
]


@harness.benchmark_rows(CASES)
def test_linear_trimmed_cross_entropy(
    benchmark: Any, bench: harness.Bench, case: harness.Case, phase: str, variant: str
) -> None:
    bench.row(benchmark, case, phase, variant)
