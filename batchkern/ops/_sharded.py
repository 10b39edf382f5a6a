"""The last layer on several processes: gathered, as needed for FSDP2's ``fully_shard``, or with a part of the
vocabulary on each process, as in tensor parallelism."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchkern.ops import _checks as check
from batchkern.ops._chunked_linear import ForwardChunks, Shard, without_autocast
from batchkern.reference import lengths


def whole(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` itself, or a DTensor gathered from its mesh in ``dtype``, the type of the computation.

    The processes of the mesh hold parts of a batch, or all hold the same batch: the gradient is the mean over the
    processes, reduced once, in float32 at least.
    """
    return x if type(x).__name__ != "DTensor" else _Whole.apply(x, dtype)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, dtype: torch.dtype) -> Tensor:
        ctx.mesh, ctx.placements, ctx.dtype = x.device_mesh, x.placements, x.dtype
        full: Tensor = x.detach().to(dtype).full_tensor()
        return full

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        # Divided before the sum, so that the sum cannot overflow; gloo has no mean.
        share = grad.to(torch.promote_types(ctx.dtype, torch.float32)) / ctx.mesh.size()
        parts = DTensor.from_local(share, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return parts.redistribute(placements=ctx.placements).to(ctx.dtype), None


# --- a part of the vocabulary on each process -------------------------------------------------------------------


def local(name: str, x: Any, group: dist.ProcessGroup) -> Tensor:
    """``x`` itself, or the local part of a DTensor that the group shards by words."""
    if type(x).__name__ != "DTensor":
        return x
    if x.device_mesh.ndim != 1 or not x.placements[0].is_shard(0):
        raise ValueError(
            f"{name} must be sharded by words over one dimension of a mesh, Shard(0), if vocab_group is given, got "
            f"{x.placements} over {x.device_mesh.ndim} dimension(s)"
        )
    ranks, of_mesh = (dist.get_process_group_ranks(g) for g in (group, x.device_mesh.get_group()))
    if ranks != of_mesh:
        raise ValueError(f"vocab_group must be the group of {name}'s mesh, ranks {of_mesh}, got ranks {ranks}")
    part: Tensor = x.to_local()
    return part


def shard_of(weight: Tensor, group: dist.ProcessGroup) -> Shard:
    """The shard of this process. Parts are in the order of the ranks; their lengths are read by the host."""
    sizes = lengths(weight, group)
    return Shard(group, sum(sizes[: dist.get_rank(group)]), sum(sizes))


@without_autocast
def losses_of_shard(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int | None,
    stats: bool,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, lse, entropy and correct over the whole vocabulary: each process computes them for its words, and the
    results are reduced, the maxima first."""
    target = target.long()
    valid = target != ignore_index
    check.target_values(target, classes=shard.words, ignore_index=ignore_index)
    if target.is_cuda:
        torch._assert_async((~valid | ((target >= 0) & (target < shard.words))).all(), "a target is not in [0, V)")
    place = target - shard.first
    mine = valid & (place >= 0) & (place < len(weight))
    highest, part = hidden.new_full(valid.shape, -math.inf, dtype=torch.float64), hidden.new_zeros(1).double()
    at_target = total = moment = torch.zeros_like(highest)
    correct = mine
    if len(weight) > 0:
        # The loss for a word gives the logit of that word.
        inner = torch.where(valid, torch.where(mine, place, 0), -100)
        options = dtype, -100, 0.0, softcap, logit_scale, chunk_rows
        chunks = ForwardChunks(hidden, weight, bias, inner, *options, stats=stats)
        total = torch.zeros_like(highest)
        for rows, _, logits, _ in chunks:
            if label_smoothing > 0:
                total[rows] = logits.sum(1, dtype=torch.float32).double()
        highest, part = chunks.lse.double().unbind(1)
        at_target = torch.where(mine, highest + part - chunks.losses, 0)
        if chunks.entropy is not None and chunks.correct is not None:
            moment, correct = highest + part - chunks.entropy, mine & chunks.correct

    whole = highest.clone()
    dist.all_reduce(whole, dist.ReduceOp.MAX, group=shard.group)
    # A part whose words are all masked has neither a sum nor a moment.
    empty = highest == -math.inf
    part = torch.where(empty, 0, torch.exp(highest - whole + part))
    sums = [part, at_target, total, torch.where(empty, 0, part * moment)]
    reduced = torch.stack(sums)
    dist.all_reduce(reduced, group=shard.group)
    part, at_target, total, moment = reduced
    log_sum = torch.where(whole == -math.inf, math.nan, part.log())
    lse = whole + log_sum
    losses = (1 - label_smoothing) * (lse - at_target) + label_smoothing * (lse - total / shard.words)
    state = torch.stack([whole, log_sum], dim=1).float().masked_fill_(~valid[:, None], 0)
    losses = losses.float().masked_fill_(~valid, 0)
    if not stats:
        return losses, state, losses.new_empty(0), mine.new_empty(0)
    # If several logits are highest, the first one is the prediction.
    first = torch.where(highest == whole, shard.first, shard.words)
    dist.all_reduce(first, dist.ReduceOp.MIN, group=shard.group)
    right = (correct & (highest == whole) & (first == shard.first) & ~lse.isnan()).byte()
    dist.all_reduce(right, group=shard.group)
    entropy = (lse - moment / part).float().masked_fill_(~valid, 0)
    return losses, state, entropy, right.bool()


def check_equal(group: dist.ProcessGroup, upstream: Sequence[Tensor | None]) -> None:
    """Raises if the processes have different upstream gradients, since gradients of different rows would be added up.
    They are compared by weighted sums in which each row has its own weight."""
    sums = []
    for x in upstream:
        found = torch.zeros(1) if x is None else x.double().nan_to_num()
        sums.append(found @ torch.arange(1, len(found) + 1, dtype=found.dtype, device=found.device).sqrt())
    device = next(x.device for x in upstream if x is not None)
    extremes = torch.stack([factor * x.to(device) for x in sums for factor in (1.0, -1.0)]).double()
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    equal = (extremes[::2] == -extremes[1::2]).all()
    message = "the upstream gradients of the losses must be equal on all processes of vocab_group, and differ"
    if equal.is_cuda:
        torch._assert_async(equal, message)
    elif not equal:
        raise ValueError(message)
