"""Ranking of mini-batches by loss, to find the hard ones (Sahayam et al., 2023, Algorithm 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from batchkern import _backend, reference
from batchkern.ops import _checks as check
from batchkern.ops._public import public


@public
def rank_batches(losses: Tensor, fraction: float) -> Tensor:
    """Indices of the highest losses, in descending order.

    Args:
        losses: ``(N,)`` float32, bfloat16, float16 or float64.
        fraction: delta in (0, 1]; a Python float, since it decides the shape of the result.

    Returns:
        ``(max(1, floor(fraction * N)),)`` int64; equal losses are ordered by lower index, NaN comes first. Empty when N
            is 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or range.

    Examples:
        >>> import torch
        >>> from batchkern import rank_batches
        >>> rank_batches(torch.tensor([0.5, 2.0, 1.0, 3.0]), fraction=0.5).tolist()
        [3, 1]
    """
    check.tensor("losses", losses, dims=1)
    if type(fraction) is not float or not 0 < fraction <= 1:  # a fast path for most calls
        if isinstance(fraction, Tensor):
            raise TypeError("fraction must be a float, got a tensor: it decides the shape of the result")
        check.fraction("fraction", fraction, losses)
    (size,) = losses.shape
    count = min(size, max(1, math.floor(fraction * size)))
    if losses.requires_grad:
        losses = losses.detach()
    if not _backend.has_kernel("rank_batches", losses):
        return reference.rank_batches(losses, count)
    indices: Tensor = _backend.operator("rank_batches")(losses, count)
    return indices


if _backend.extension is not None:

    @torch.library.register_fake("batchkern::rank_batches")
    def _(losses: Tensor, k: int) -> Tensor:
        return losses.new_empty(k, dtype=torch.int64)


class BatchLedger(nn.Module):
    """The last known loss of each of N batches, kept on the device.

    It is a module with one buffer, ``losses``, which moves between devices and is saved with the module.

    Args:
        size: N, at least 1.
        device: where the losses are held, float32; default: torch's default device.

    A batch without a recorded loss ranks above every finite loss.

    Examples:
        >>> from batchkern import BatchLedger
        >>> ledger = BatchLedger(4)
        >>> for number, loss in enumerate([0.5, 2.0, 1.0]):  # batch 3 has not been seen yet
        ...     ledger.update(number, loss)
        >>> ledger.rank(0.5).tolist()
        [3, 1]
    """

    losses: Tensor

    def __init__(self, size: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        check.count("size", size, low=1)
        self.register_buffer("losses", torch.full((size,), math.inf, dtype=torch.float32, device=device))

    def __len__(self) -> int:
        return len(self.losses)

    def update(self, indices: Tensor | int, losses: Tensor | float) -> None:
        """Record ``losses`` for batches ``indices``: a number each, or ``(n,)`` tensors (indices not repeated)."""
        where = torch.as_tensor(indices, device=self.losses.device).reshape(-1)
        if where.dtype != torch.int64:
            raise TypeError(f"indices must be int64, got {where.dtype}")
        if check.readable(where) and len(where) and not 0 <= int(where.min()) <= int(where.max()) < len(self):
            raise ValueError(f"indices must be in [0, {len(self)}), got {where.tolist()}")
        values = torch.as_tensor(losses, dtype=torch.float32, device=self.losses.device).detach().reshape(-1)
        if len(values) != len(where):
            raise ValueError(f"losses must have shape ({len(where)},) to match indices, got ({len(values)},)")
        self.losses.index_copy_(0, where, values)

    def rank(self, fraction: float) -> Tensor:
        """:func:`rank_batches` of the recorded losses."""
        return rank_batches(self.losses, fraction)
