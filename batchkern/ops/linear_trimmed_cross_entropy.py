"""Trimmed cross entropy fused with the last linear layer, for language models."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from batchkern import reference
from batchkern.ops import _checks as check
from batchkern.ops._autograd import boundary


def linear_trimmed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    keep: float | Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    per_sample: bool = False,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``trimmed_cross_entropy(hidden @ weight.T + bias, target, keep, ...)``.

    Args:
        hidden: ``(N, H)`` float32, bfloat16, float16 or float64.
        weight: ``(V, H)``, same dtype.
        target: ``(N,)`` int64 in [0, V), or ``ignore_index``.
        keep: fraction of rows kept, in (0, 1], or a 0-dim float64 tensor on the same device.
        bias: ``(V,)``, same dtype.
        ignore_index, label_smoothing, group: as in :func:`batchkern.trimmed_cross_entropy`.
        per_sample: also return the losses ``(N,)``, detached, 0 at ignored rows.
        chunk_rows: rows whose logits a fused kernel holds at a time. The reference holds all ``(N, V)`` of them.

    Returns:
        The 0-dim loss, or ``(loss, losses)``.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or range.
    """
    check.tensor("hidden", hidden, dims=2)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    check.tensor("weight", weight, dims=2, dtypes=(hidden.dtype,))
    check.same_device("weight", weight, hidden)
    words, width = weight.shape
    if hidden.shape[1] != width:
        raise ValueError(f"weight must have shape (V, {hidden.shape[1]}) to match hidden, got {tuple(weight.shape)}")
    if bias is not None:
        check.vector("bias", bias, rows=words, like=hidden, dtypes=(hidden.dtype,))
    check.vector("target", target, rows=hidden.shape[0], like=hidden, dtypes=(torch.int64,))
    check.target_values(target, classes=words, ignore_index=ignore_index)
    check.fraction("keep", keep, hidden)
    check.number("label_smoothing", label_smoothing, 0, 1)
    check.ignored(ignore_index, group)
    if chunk_rows is not None:
        check.count("chunk_rows", chunk_rows, low=1)
    loss, losses = reference.linear_trimmed_cross_entropy(
        boundary(hidden),
        boundary(weight),
        target,
        keep,
        bias=None if bias is None else boundary(bias),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        group=group,
        chunk_rows=chunk_rows,
    )
    return (loss, losses) if per_sample else loss


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What ``F.linear`` does under autocast, where hidden is often bfloat16 and the parameters are float32."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

    return cast(hidden), cast(weight), None if bias is None else cast(bias)
