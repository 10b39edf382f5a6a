"""The boundary between an operation and the graph that it is used in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

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
        if is_batched(*grads):  # what comes of it could not refuse
            raise RuntimeError(
                "create_graph must be False where a backward pass takes a batch of gradients (is_grads_batched=True, "
                "vectorize=True, vmap): batchkern operations cannot be differentiated twice"
            )
        # What the first derivative depends on, so that a search for the second one comes by here.
        sources = [x for x in (*grads, *ctx.saved_tensors) if isinstance(x, Tensor) and x.requires_grad]
        with torch.no_grad():
            results = backward(ctx, *grads)
        return tuple(
            _Refuse.apply(x.detach().requires_grad_(), *sources) if isinstance(x, Tensor) else x for x in results
        )

    return wrapper


def is_batched(*grads: Tensor | None) -> bool:
    """Whether these upstream gradients are a batch of them: ``torch.autograd.grad(..., is_grads_batched=True)``, which
    has batches of its own, or ``torch.func.vmap`` around it."""
    if torch.compiler.is_compiling():
        return False
    return any(
        x is not None and (_functorch.is_legacy_batchedtensor(x) or _functorch.is_batchedtensor(x)) for x in grads
    )


def one_by_one(function: Callable[..., list[Tensor]], *grads: Tensor | None) -> list[Tensor]:
    """``function(*grads)``, and of a batch of upstream gradients that of each, as a batch again."""
    if not is_batched(*grads):
        return function(*grads)
    level = max(_functorch.maybe_get_level(x) for x in grads if x is not None)
    take: Callable[..., Tensor] = _functorch._remove_batch_dim
    give: Callable[..., Tensor] = _functorch._add_batch_dim
    if level < 0:  # those of is_grads_batched, whose level is the first
        level, take, give = 1, torch._remove_batch_dim, torch._add_batch_dim
    size = max(len(take(x, level, 1, 0)) for x in grads if is_batched(x))
    parts = [[None] * size if x is None else take(x, level, size, 0).unbind() for x in grads]
    results = [function(*part) for part in zip(*parts, strict=True)]
    return [give(torch.stack(of_one), 0, level) for of_one in zip(*results, strict=True)]


def check_one_gradient(grad: Tensor) -> None:
    """For ``inplace_backward``."""
    if is_batched(grad):
        raise RuntimeError(
            "inplace_backward must be False where a backward pass takes a batch of gradients (is_grads_batched=True, "
            "vectorize=True, vmap): the storage of the logits has room for one"
        )


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
        check_one_gradient(grad)
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
