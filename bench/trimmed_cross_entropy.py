"""Trimmed cross entropy: shapes from a small image batch to the tokens of a language model."""

from __future__ import annotations

import torch
from torch import Tensor

import batchkern
from batchkern import reference
from bench import inputs, peers
from bench.registry import Case, Floor, Operation, Problem, Sweep, Variant, doubled, shape

FP32, BF16 = torch.float32, torch.bfloat16


def build(case: Case, device: torch.device) -> Problem:
    logits, target = inputs.trained_logits(*case.sizes.values(), device)
    keep = case.keep
    ours = {
        "ours": Variant(lambda x: batchkern.trimmed_cross_entropy(x, target, keep)),
        "ours inplace": Variant(
            lambda x: batchkern.trimmed_cross_entropy(x, target, keep, inplace_backward=True),
            modes=("backward", "full"),
        ),
    }

    def oracle(x: Tensor) -> Tensor:
        return reference.trimmed_cross_entropy(x, target, keep)[0]

    return Problem(
        (logits.to(case.dtype),),
        {**ours, **peers.variants("trimmed_cross_entropy", device, keep, target=target)},
        oracle,
        limit=1e-3 if case.dtype == FP32 else 2e-2,
    )


def floor(case: Case, mode: str) -> Floor:
    """The logits are read for the loss, those of kept rows again for the gradient, which is written whole."""
    logits = case.sizes["rows"] * case.sizes["classes"] * case.dtype.itemsize
    return Floor({"forward": 1, "backward": 1 + case.keep, "full": 2 + case.keep}[mode] * logits)


def case(
    rows: int,
    classes: int,
    dtype: torch.dtype = FP32,
    target_fraction: float | None = None,
    target_s: float | None = None,
) -> Case:
    sizes = shape(rows=rows, classes=classes)
    return Case(sizes, dtype, 0.2, target_s=target_s, target_fraction=target_fraction)


OPERATION = Operation(
    "trimmed_cross_entropy",
    build,
    floor,
    cases={
        "cpu": [case(4096, 1000), case(1024, 32_000), case(128, 10), case(4096, 1000, BF16)],
        "cuda": [
            case(65_536, 1000, FP32, 0.8),
            case(8192, 131_072, BF16, 0.9),
            case(128, 10, target_s=10e-6),
            case(16_384, 8192, BF16, 0.9),
            case(16_384, 4096, FP32, 0.9),
            case(8192, 50_257, BF16, 0.9),  # rows that begin at every alignment
            case(64, 131_072, BF16),  # several blocks to a row; launches bound it, not memory
            case(4096, 1000),
        ],
    },
    sweeps={
        "cpu": [
            Sweep(case(64, 100), "rows", doubled(128, 65_536)),
            Sweep(case(64, 100), "classes", doubled(128, 131_072)),
        ],
        "cuda": [
            Sweep(case(64, 1024, BF16), "rows", doubled(128, 65_536)),
            Sweep(case(4096, 128, BF16), "classes", doubled(128, 131_072)),
        ],
    },
    quick=case(256, 100),
)
