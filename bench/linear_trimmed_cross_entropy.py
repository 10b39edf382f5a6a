"""The last linear layer and its trimmed cross entropy, for several values of keep. Only full passes are measured,
because an implementation may compute the gradient in its forward pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import batchkern
from batchkern import reference
from bench import peers
from bench.registry import Case, Floor, Operation, Problem, Sweep, Variant, doubled, shape

FP32, BF16 = torch.float32, torch.bfloat16


def build(case: Case, device: torch.device) -> Problem:
    """Hidden states that point to their words with different confidence: the logit of a row's target is up to 20, and
    the others have a standard deviation of 1. (With 90 instead of 20, gradients would be full of subnormal numbers,
    which make PyTorch's products four times slower.)"""
    rows, width, words = case.sizes.values()
    weight = width**-0.5 * torch.randn(words, width, device=device)
    target = torch.randint(words, (rows,), device=device)
    sure = 20 * torch.rand(rows, 1, device=device)
    hidden = torch.randn(rows, width, device=device) + sure * torch.nn.functional.normalize(weight[target], dim=1)
    keep = case.keep

    def oracle(h: Tensor, w: Tensor, keep: float = keep) -> Tensor:
        return reference.linear_trimmed_cross_entropy(h, w, target, keep)[0]

    def of_all_rows(h: Tensor, w: Tensor) -> Tensor:
        return oracle(h, w, 1.0)

    def composed(h: Tensor, w: Tensor) -> Tensor:
        most = int(keep * rows) + 1  # so that the host does not wait for the number of kept rows
        losses = batchkern.linear_cross_entropy(h, w, target, reduction="none", backward_rows=most)
        return batchkern.trimmed_mean(losses, keep)

    variants = {
        "ours": Variant(lambda h, w: batchkern.linear_trimmed_cross_entropy(h, w, target, keep)),
        "ours composed": Variant(composed),
    }
    variants |= peers.variants("linear_trimmed_cross_entropy", device, keep, target=target)
    return Problem(
        (hidden.to(case.dtype), weight.to(case.dtype)),
        {name: replace(v, oracle=of_all_rows) if v.less else v for name, v in variants.items()},
        oracle,
        differentiable=2,
        limit=1e-3 if case.dtype == FP32 else 2e-2,
    )


def floor(case: Case, mode: str) -> Floor:
    """Products of 2 N H V flops: one for the logits of all rows and three for the kept rows, or three for all rows and
    two to subtract the dropped rows again, whichever is less. An implementation that keeps all logits in memory needs
    only 1 + 2 keep."""
    rows, width, words = case.sizes.values()
    products = min(1 + 3 * case.keep, 3 + 2 * (1 - case.keep))
    return Floor(0.0, products * 2 * rows * width * words)


def case(
    rows: int, width: int, words: int, keep: float = 0.2, dtype: torch.dtype = FP32, target: float | None = None
) -> Case:
    sizes = shape(rows=rows, width=width, words=words)
    return Case(sizes, dtype, keep, modes=("full",), target_fraction=target)


OPERATION = Operation(
    "linear_trimmed_cross_entropy",
    build,
    floor,
    cases={
        "cpu": [case(2048, 512, 32_000, keep) for keep in (1.0, 0.5, 0.2, 0.1)],
        "cuda": [
            *(case(4096, 4096, 128_256, keep, BF16, 0.8) for keep in (0.2, 1.0, 0.5, 0.1)),
            *(case(8192, 4096, 151_936, keep, BF16, 0.7) for keep in (0.2, 1.0)),
            case(16_384, 2048, 248_320, 0.2, BF16, 0.7),
        ],
    },
    sweeps={
        "cpu": [
            Sweep(case(64, 64, 512), "rows", doubled(128, 65_536)),
            Sweep(case(128, 64, 512), "words", doubled(512, 131_072)),
        ],
        "cuda": [
            Sweep(case(64, 1024, 8192, dtype=BF16), "rows", doubled(512, 65_536)),
            Sweep(case(2048, 1024, 512, dtype=BF16), "words", doubled(512, 131_072)),
        ],
    },
    quick=case(64, 32, 500),
)
