"""Trimming for any per-sample loss: detection, segmentation, regression (Fassold, 2021, section 2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchkern import _backend, reference
from batchkern.ops import _checks as check
from batchkern.ops._autograd import boundary, once_differentiable


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
    check.process_group(group)
    if not _backend.has_kernel("trimmed_mean", losses):
        return reference.trimmed_mean(boundary(losses), keep, mask=mask, group=group)
    mean: Tensor = _TrimmedMean.apply(losses, keep, mask, group)
    return mean


class _TrimmedMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, losses: Tensor, keep: float | Tensor, mask: Tensor | None, group: dist.ProcessGroup | None
    ) -> Tensor:
        if group is None:
            mean, kept, normalizer = trimmed_mean_op(losses, *check.split_keep(keep, losses), mask)
        else:
            valid = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
            kept, normalizer = select_over_group(losses.float(), valid, None, keep, group)
            mean = torch.where(kept, losses.float(), 0).sum() / normalizer
        ctx.save_for_backward(kept, normalizer)
        ctx.dtype = losses.dtype
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, normalizer = ctx.saved_tensors
        result: Tensor = _backend.call("trimmed_mean_backward")(grad, kept, normalizer, ctx.dtype)
        return result, None, None, None


def trimmed_mean_op(
    losses: Tensor, keep: float, keep_tensor: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, kept rows ``(B,)`` bool and k, by the kernel."""
    outputs: tuple[Tensor, Tensor, Tensor] = _backend.call("trimmed_mean")(losses, keep, keep_tensor, mask)
    return outputs


def select_over_group(
    losses: Tensor, valid: Tensor, weight: Tensor | None, keep: float | Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """``reference.select_and_normalize``, with the selection by the kernel."""
    losses_all, valid_all, weight_all = reference.gather(losses, valid, weight, group)
    _, kept_all, _ = trimmed_mean_op(losses_all, *check.split_keep(keep, losses), valid_all)
    return reference.share_of_group(kept_all, weight_all, len(losses), group)


if _backend.extension is not None:

    @torch.library.register_fake("batchkern::trimmed_mean")
    def _(losses: Tensor, *rest: Any) -> Any:
        scalar = losses.new_empty((), dtype=torch.float32)
        return scalar, torch.empty_like(losses, dtype=torch.bool), torch.empty_like(scalar)

    @torch.library.register_fake("batchkern::trimmed_mean_backward")
    def _(grad: Tensor, kept: Tensor, normalizer: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(kept, dtype=dtype)
