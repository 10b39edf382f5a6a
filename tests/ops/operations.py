"""Every operation with all of its tensors, for tests of what all of them have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import batchkern

B, C, H = 8, 5, 16

Call = tuple[Callable[..., Any], dict[str, Tensor]]


def operations(dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """Each operation by its name, with its tensors by theirs. The first of them may require a gradient."""

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    target, keep, mask = torch.randint(C, (B,)), torch.tensor(0.5), torch.arange(B) != 2
    rows = {"logits": floats(B, C), "target": target}
    layer = {"hidden": floats(B, H), "weight": floats(C, H), "target": target, "bias": floats(C)}
    augment = {"gaussian": 1, "dropout": 1, "sigma": 0.1, "tau": 1.0, "drop_prob": 0.5}
    return {
        "cross_entropy": (batchkern.cross_entropy, {**rows, "weight": torch.rand(C)}),
        "trimmed_cross_entropy": (
            batchkern.trimmed_cross_entropy,
            {**rows, "keep": keep, "class_weight": torch.rand(C)},
        ),
        "linear_cross_entropy": (batchkern.linear_cross_entropy, layer),
        "linear_trimmed_cross_entropy": (batchkern.linear_trimmed_cross_entropy, {**layer, "keep": keep}),
        "trimmed_mean": (
            batchkern.trimmed_mean,
            {"losses": floats(B), "keep": keep, "score": floats(B), "mask": mask, "weight": torch.rand(B)},
        ),
        "select_rows": (batchkern.select_rows, {"score": floats(B), "keep": keep, "mask": mask}),
        "soft_label_kl": (
            batchkern.soft_label_kl,
            {"reference_logits": floats(B, C), "virtual_logits": floats(2 * B, C)},
        ),
        "augment_latent": (
            partial(batchkern.augment_latent, **augment),
            {"x": floats(B, C), "basis": floats(C, C), "seed": torch.tensor(3)},
        ),
        "rank_batches": (partial(batchkern.rank_batches, fraction=0.5), {"losses": floats(B)}),
    }


OPERATIONS = list(operations())
ARGUMENTS = [(name, argument) for name, (_, tensors) in operations().items() for argument in tensors]
