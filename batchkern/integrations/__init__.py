"""What plugs a model patched by ``patch_causal_lm`` into the trainers that people use: a file for each library.

None of them is imported with batchkern. What works in which library, and what is refused, is in docs/integrations.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchkern.causal_lm import CausalLMPatch
from batchkern.ops import _checks as check
from batchkern.schedules import EpochSchedule


def set_keep(model: nn.Module, schedule: EpochSchedule, step: int, steps: int) -> None:
    """Gives the patch of a model, or of one in ``model``, its ``keep`` for step ``step`` of ``steps``, counted from 0.

    Raises:
        ValueError: ``model`` is not patched, or the schedule gave what is not in (0, 1].
    """
    patch = CausalLMPatch.of(model)
    if patch is None:
        raise ValueError("model must be patched by patch_causal_lm for a schedule of keep, it is not")
    keep = schedule(min(step, steps - 1), steps)
    check.fraction("keep", keep, torch.empty(0))
    if isinstance(patch.keep, Tensor):
        patch.keep.fill_(keep)
    else:
        patch.keep = keep
