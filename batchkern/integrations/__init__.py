"""What plugs the strategies, and models patched by ``patch_causal_lm``, into the trainers that people use: one file for
each library.

None of them is imported with batchkern. What works in which library, and what is refused, is in docs/integrations.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchkern.causal_lm import CausalLMPatch
from batchkern.ops import LinearTrimmedCrossEntropyLoss, TrimmedCrossEntropyLoss
from batchkern.ops import _checks as check
from batchkern.schedules import EpochSchedule

LOSSES = (TrimmedCrossEntropyLoss, LinearTrimmedCrossEntropyLoss)
"""Modules that have ``keep``."""


def set_keep(model: nn.Module, schedule: EpochSchedule, step: int, steps: int) -> None:
    """Gives the trimmed losses in ``model``, and the patch of it or of a model in it, their ``keep`` for step ``step``
    of ``steps``, counted from 0.

    Raises:
        ValueError: there are none, or the schedule gave what is not in (0, 1].
    """
    holders: list[Any] = [module for module in model.modules() if isinstance(module, LOSSES)]
    if (patch := CausalLMPatch.of(model)) is not None:
        holders.append(patch)
    if not holders:
        raise ValueError(
            "model must be patched by patch_causal_lm, or have a trimmed loss in it, for a schedule of keep"
        )
    keep = schedule(min(step, steps - 1), steps)
    check.fraction("keep", keep, torch.empty(0))
    for holder in holders:
        if isinstance(holder.keep, Tensor):
            holder.keep.fill_(keep)
        else:
            holder.keep = keep
