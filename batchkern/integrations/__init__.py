"""Adapters that connect the strategies, and models patched by ``patch_causal_lm``, to other trainers: one module for
each library.

Importing batchkern imports none of them. docs/integrations.md lists what works in each library, and what raises an
error.
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
"""Modules with an attribute ``keep``."""


def set_keep(model: nn.Module, schedule: EpochSchedule, step: int, steps: int) -> None:
    """Sets ``keep`` for step ``step`` of ``steps``, counted from 0, in the trimmed losses in ``model`` and in the patch
    of the model or of a model within it.

    Raises:
        ValueError: there is neither a trimmed loss nor a patch, or the schedule returned a value that is not in (0, 1].
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
