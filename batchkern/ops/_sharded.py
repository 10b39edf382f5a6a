"""Parameters that lie on several processes as a DTensor: FSDP2's ``fully_shard`` makes them, and tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def whole(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` itself, or a DTensor gathered from its mesh in ``dtype``, that of the computation.

    The processes of the mesh hold parts of a batch, or all of them the same one: the gradient is the mean of theirs,
    reduced once, in float32 at least.
    """
    return x if type(x).__name__ != "DTensor" else _Whole.apply(x, dtype)


def local(name: str, x: Any, group: dist.ProcessGroup) -> Tensor:
    """``x`` itself, or the local part of a DTensor that the group shards by words."""
    if type(x).__name__ != "DTensor":
        return x
    if x.device_mesh.ndim != 1 or not x.placements[0].is_shard(0):
        raise ValueError(
            f"{name} must be sharded by words over one dimension of a mesh, Shard(0), where vocab_group is given, got "
            f"{x.placements} over {x.device_mesh.ndim} dimension(s)"
        )
    ranks, of_mesh = (dist.get_process_group_ranks(g) for g in (group, x.device_mesh.get_group()))
    if ranks != of_mesh:
        raise ValueError(f"vocab_group must be the group of {name}'s mesh, ranks {of_mesh}, got ranks {ranks}")
    part: Tensor = x.to_local()
    return part


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, dtype: torch.dtype) -> Tensor:
        ctx.mesh, ctx.placements, ctx.dtype = x.device_mesh, x.placements, x.dtype
        full: Tensor = x.detach().to(dtype).full_tensor()
        return full

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        # Before the sum, which must not overflow either; gloo has no mean.
        share = grad.to(torch.promote_types(ctx.dtype, torch.float32)) / ctx.mesh.size()
        parts = DTensor.from_local(share, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return parts.redistribute(placements=ctx.placements).to(ctx.dtype), None
