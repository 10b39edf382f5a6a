"""Trimmed cross entropy: from a small image batch to the tokens of a language model, pixels, and the probabilities of
mixup; in one pass, and composed of its two halves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import batchkern
from batchkern import reference
from bench import inputs, peers
from bench.registry import Case, Floor, Operation, Problem, Sweep, Variant, doubled, shape

FP32, BF16 = torch.float32, torch.bfloat16


PROBABILITIES = "probabilities"


def build(case: Case, device: torch.device) -> Problem:
    logits, target = inputs.trained_logits(case.sizes["rows"] * pixels(case), case.sizes["classes"], device)
    if case.kind == PROBABILITIES:
        # Each row is mixed with its neighbour, as in mixup.
        one_hot = F.one_hot(target, case.sizes["classes"]).float()
        target = 0.7 * one_hot + 0.3 * one_hot.roll(1, 0)
    keep, dense = case.keep, "height" in case.sizes
    if dense:
        image = (case.sizes["rows"], case.sizes["height"], case.sizes["width"])
        logits, target = logits.view(*image, -1).permute(0, 3, 1, 2).contiguous(), target.view(image)
    ours = {
        "ours": Variant(lambda x: batchkern.trimmed_cross_entropy(x, target, keep)),
        "ours inplace": Variant(
            lambda x: batchkern.trimmed_cross_entropy(x, target, keep, inplace_backward=True),
            modes=("backward", "full"),
        ),
        "ours composed": Variant(
            lambda x: batchkern.trimmed_mean(batchkern.cross_entropy(x, target, reduction="none"), keep)
        ),
    }

    def oracle(x: Tensor) -> Tensor:
        return reference.trimmed_cross_entropy(x, target, keep)[0]

    found = peers.variants("trimmed_cross_entropy", device, keep, target=target)
    found = {name: peer for name, peer in found.items() if name not in peers.OF_ROWS or not (dense or case.kind)}
    if dense:
        found["flattened"] = Variant(peers.flattened_cross_entropy(target, keep))
    return Problem((logits.to(case.dtype),), {**ours, **found}, oracle, limit=1e-3 if case.dtype == FP32 else 2e-2)


def pixels(case: Case) -> int:
    return case.sizes.get("height", 1) * case.sizes.get("width", 1)


def floor(case: Case, mode: str) -> Floor:
    """The logits are read for the loss, and those of kept rows again for the gradient, which is written for all rows.
    Probabilities are read as often as logits."""
    logits = case.sizes["rows"] * case.sizes["classes"] * pixels(case) * case.dtype.itemsize
    read = {"forward": 1, "backward": case.keep, "full": 1 + case.keep}[mode]
    of_target = logits // case.dtype.itemsize * 4 if case.kind == PROBABILITIES else 0
    return Floor(read * (logits + of_target) + (mode != "forward") * logits)


def case(
    rows: int,
    classes: int,
    dtype: torch.dtype = FP32,
    target_fraction: float | None = None,
    target_s: float | None = None,
    kind: str = "",
) -> Case:
    sizes = shape(rows=rows, classes=classes)
    return Case(sizes, dtype, 0.2, kind, target_s=target_s, target_fraction=target_fraction)


def image_case(rows: int, classes: int, dtype: torch.dtype = FP32) -> Case:
    """Cityscapes has 19 classes, and ADE20K 150."""
    return Case(shape(rows=rows, classes=classes, height=512, width=512), dtype, 0.2)


OPERATION = Operation(
    "trimmed_cross_entropy",
    build,
    floor,
    cases={
        "cpu": [
            case(4096, 1000),
            case(1024, 32_000),
            case(128, 10),
            case(4096, 1000, BF16),
            image_case(8, 19),
            image_case(2, 150),
            case(256, 1000, kind=PROBABILITIES),
        ],
        "cuda": [
            case(65_536, 1000, FP32, 0.8),
            case(8192, 131_072, BF16, 0.9),
            case(128, 10, target_s=10e-6),
            case(16_384, 8192, BF16, 0.9),
            case(16_384, 4096, FP32, 0.9),
            case(8192, 50_257, BF16, 0.9),  # rows of every alignment
            case(64, 131_072, BF16),  # several blocks share a row; limited by launches, not by memory
            case(4096, 1000),
            image_case(8, 19),
            image_case(2, 150, BF16),
            case(16_384, 1000, kind=PROBABILITIES),
        ],
    },
    sweeps={
        "cpu": [
            Sweep(case(64, 100), "rows", doubled(128, 65_536)),
            Sweep(case(64, 100), "classes", doubled(128, 131_072)),
        ],
        "cuda": [
            Sweep(case(64, 1024, BF16), "rows", doubled(128, 65_536)),
            Sweep(case(4096, 10, BF16), "classes", (10, 19, 32, 64, *doubled(128, 131_072))),
        ],
    },
    quick=case(256, 100),
)
