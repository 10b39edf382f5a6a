"""Soft-label KL of virtual rows close to their reference, for which float32 sums lose digits, and of unrelated rows."""

from __future__ import annotations

import torch
from torch import Tensor

import batchkern
from batchkern import reference
from bench import inputs, peers
from bench.registry import Case, Floor, Operation, Problem, Sweep, Variant, doubled, shape

FP32, BF16 = torch.float32, torch.bfloat16
ELEMENTS_AT_ONCE = 1 << 24


def build(case: Case, device: torch.device) -> Problem:
    batch, copies, classes = case.sizes.values()
    p, _ = inputs.trained_logits(batch, classes, device)
    if case.kind == "near":
        q = p.repeat(copies, 1) + 0.05 * torch.randn(copies * batch, classes, device=device)
    else:
        q, _ = inputs.trained_logits(copies * batch, classes, device)

    def oracle(q: Tensor, p: Tensor) -> Tensor:
        """In pieces, because each element of a row takes about twenty float64 temporaries."""
        rows = max(1, ELEMENTS_AT_ONCE // (copies * classes))
        pieces = zip(q.unflatten(0, (copies, batch)).split(rows, dim=1), p.detach().split(rows), strict=True)
        return torch.cat([reference.soft_label_kl(part, virtual.flatten(0, 1)) for virtual, part in pieces]).mean()

    # The result is a sum of differences: close to the reference, peers keep three or four digits in float32, and in
    # bfloat16 the inputs differ by less than their rounding.
    return Problem(
        (q.to(case.dtype), p.to(case.dtype)),
        {
            "ours": Variant(lambda q, p: batchkern.soft_label_kl(p, q)),
            **peers.variants("soft_label_kl", device, copies=copies),
        },
        oracle,
        limit=1e-2 if case.dtype == FP32 else 5e-2,
    )


def floor(case: Case, mode: str) -> Floor:
    """The reference and virtual rows are read, and the gradient of the virtual rows is written."""
    batch, copies, classes = case.sizes.values()
    rows = {"forward": copies + 1, "backward": copies, "full": 2 * copies + 1}[mode]
    return Floor(rows * batch * classes * case.dtype.itemsize)


def case(
    batch: int,
    copies: int,
    classes: int,
    dtype: torch.dtype = FP32,
    kind: str = "near",
    target_fraction: float | None = None,
) -> Case:
    sizes = shape(batch=batch, copies=copies, classes=classes)
    return Case(sizes, dtype, kind=kind, target_fraction=target_fraction)


OPERATION = Operation(
    "soft_label_kl",
    build,
    floor,
    cases={
        "cpu": [case(128, 16, 1000), case(128, 16, 1000, kind="unrelated")],
        "cuda": [
            case(1024, 4, 131_072, BF16, target_fraction=0.8),
            case(512, 8, 1000),
            case(128, 4, 10),
        ],
    },
    sweeps={
        "cpu": [
            Sweep(case(64, 4, 100), "batch", doubled(32, 16_384)),
            Sweep(case(16, 4, 100), "classes", doubled(128, 131_072)),
            Sweep(case(64, 1, 1000), "copies", doubled(1, 64)),
        ],
        "cuda": [
            Sweep(case(64, 4, 1024), "batch", doubled(64, 16_384)),
            Sweep(case(256, 4, 128, BF16), "classes", doubled(128, 131_072)),
            Sweep(case(512, 1, 1000), "copies", doubled(1, 64)),
        ],
    },
    quick=case(16, 4, 50),
)
