"""Trimming for any per-sample loss: detection, segmentation, regression (Fassold, 2021, section 2)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from batchkern import _backend
from batchkern.ops import _checks as check
from batchkern.ops._autograd import boundary


def trimmed_mean(
    losses: Tensor, keep: float | Tensor, *, mask: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Mean of the k highest losses, differentiable in ``losses``.

    k, ties, NaN and ``group`` are as in :func:`batchkern.trimmed_cross_entropy`.

    Args:
        losses: ``(B,)`` float32, bfloat16, float16 or float64.
        keep: fraction kept, in (0, 1], or a 0-dim float64 tensor on the losses' device.
        mask: ``(B,)`` bool; rows where it is False are as if ignored.
        group: process group whose batches are ranked together (equal B on each).

    Returns:
        0-dim float32 (float64 for float64 losses); NaN when no row is left.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or range.
    """
    check.tensor("losses", losses, dims=1)
    check.fraction("keep", keep, losses)
    if mask is not None:
        check.vector("mask", mask, rows=len(losses), like=losses, dtypes=(torch.bool,))
    compute = _backend.implementation("trimmed_mean", losses.device)
    mean: Tensor = compute(boundary(losses), keep, mask=mask, group=group)
    return mean
