"""The boundary between an operation and the graph that it is used in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, into_storage: bool) -> Tensor:
        ctx.storage = x.detach() if into_storage else None
        ctx.version = x._version if into_storage else 0
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.storage is None:
            return grad, None
        if ctx.storage._version != ctx.version:
            raise RuntimeError(
                "inplace_backward=True: the logits were changed after the forward pass "
                f"(version {ctx.storage._version}, expected {ctx.version}), so their storage cannot take the gradient"
            )
        return ctx.storage.copy_(grad), None


def boundary(x: Tensor, *, into_storage: bool = False) -> Tensor:
    """``x``, with a gradient that cannot be differentiated again.

    Kernels have no second derivative, so the reference must not have one either: code that runs on one backend would
    fail on another. With ``into_storage`` the gradient is written over the storage of ``x``.
    """
    return _Boundary.apply(x, into_storage)


def check_inplace_backward(logits: Tensor) -> None:
    """Raises where autograd, or whoever else sees this storage, would notice that it was overwritten."""
    base: Tensor | None = logits._base
    owner = logits if base is None else base
    if owner.requires_grad and owner.is_leaf:
        raise ValueError("inplace_backward must be False where logits is a leaf or its view: its values would be lost")
    if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(f"inplace_backward must be False where logits overlaps itself, got strides {logits.stride()}")
