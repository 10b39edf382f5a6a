"""Soft-label KL beside ``F.kl_div`` over repeated reference rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

import batchkern

COPIES, BATCH, CLASSES = (4, 16, 50) if harness.QUICK else (16, 128, 1000)


def assert_same(y: Tensor, dx: Tensor | None, peer_y: Tensor, peer_dx: Tensor | None) -> None:
    """Looser than the default: next to the reference row the peer's fp32 sum keeps three or four digits."""
    torch.testing.assert_close(y, peer_y, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(dx, peer_dx, rtol=1e-3, atol=1e-3 * float(peer_dx.abs().max()))


def problem(near: bool) -> harness.Problem:
    reference = 2 * torch.randn(BATCH, CLASSES)
    virtual = 2 * torch.randn(COPIES * BATCH, CLASSES)
    if near:
        virtual = reference.repeat(COPIES, 1) + 0.025 * virtual

    def eager(x: Tensor) -> Tensor:
        labels = F.log_softmax(reference, 1).repeat(COPIES, 1)
        return F.kl_div(F.log_softmax(x, 1), labels, log_target=True, reduction="batchmean")

    size = reference.nbytes
    return harness.Problem(
        virtual,
        ours=lambda x: batchkern.soft_label_kl(reference, x),
        eager=eager,
        floor_bytes={"forward": (COPIES + 1) * size, "backward": COPIES * size, "full": (2 * COPIES + 1) * size},
        check=assert_same,
    )


CASES = [
    harness.Case("soft_label_kl", f"{COPIES}x{BATCH}x{CLASSES} {name}", partial(problem, near))
    for name, near in (("near", True), ("unrelated", False))
]


@harness.benchmark_rows(CASES)
def test_soft_label_kl(benchmark: Any, bench: harness.Bench, case: harness.Case, phase: str, variant: str) -> None:
    bench.row(benchmark, case, phase, variant)
