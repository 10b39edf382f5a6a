"""The boundary between an operation and the graph that it is used in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchkern import _backend


class _Refuse(torch.autograd.Function):
    """The identity in ``x``; a gradient that reaches it, on its way to any of ``sources``, raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *sources: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("batchkern operations cannot be differentiated twice: their gradient is a kernel")


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of a Function: a gradient of its result raises.

    torch's decorator of this name lets it pass, as a constant, where the upstream gradient is one: ``loss.backward(
    create_graph=True)`` followed by a penalty on the gradient would be silently wrong.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # there is no second derivative to trace
            return backward(ctx, *grads)
        # What the first derivative depends on, so that a search for the second one comes by here.
        sources = [x for x in (*grads, *ctx.saved_tensors) if isinstance(x, Tensor) and x.requires_grad]
        with torch.no_grad():
            results = backward(ctx, *grads)
        return tuple(
            _Refuse.apply(x.detach().requires_grad_(), *sources) if isinstance(x, Tensor) else x for x in results
        )

    return wrapper


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
        check_unchanged(ctx.storage, ctx.version)
        return ctx.storage.copy_(grad), None


def boundary(x: Tensor, *, into_storage: bool = False) -> Tensor:
    """``x``, with a gradient that cannot be differentiated again.

    For the reference, which must have no second derivative because kernels have none: code that runs on one backend
    would fail on another. With ``into_storage`` the gradient is written over the storage of ``x``. Within a transform
    of ``torch.func``, where no kernel runs, it is ``x``.
    """
    if _backend.within_transform():
        return x
    return _Boundary.apply(x, into_storage)


def check_inplace_backward(logits: Tensor) -> None:
    """Raises where autograd, or whoever else sees this storage, would notice that it was overwritten."""
    base: Tensor | None = logits._base
    owner = logits if base is None else base
    if owner.requires_grad and owner.is_leaf:
        raise ValueError("inplace_backward must be False where logits is a leaf or its view: its values would be lost")
    if logits.is_neg():
        raise ValueError("inplace_backward must be False where logits is a lazily negated view")
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        overlaps = size > 1 and stride < extent
        extent += (size - 1) * stride
        if not overlaps:
            continue
        raise ValueError(f"inplace_backward must be False where logits overlaps itself, got strides {logits.stride()}")


def check_unchanged(logits: Tensor, version: int) -> None:
    """Raises where ``logits`` is not what it was at the forward pass of an ``inplace_backward``."""
    if logits._version != version:
        raise RuntimeError(
            "inplace_backward=True: the logits were changed after the forward pass "
            f"(version {logits._version}, expected {version}), so their storage cannot take the gradient"
        )
