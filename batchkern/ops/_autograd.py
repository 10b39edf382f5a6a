"""Rules for the backward passes of operations: no second derivatives, batches of gradients, overwritten storage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from batchkern import _backend


class _Refuse(torch.autograd.Function):
    """The identity of ``x``; a gradient that passes through it to any of ``sources`` raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *sources: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("batchkern operations cannot be differentiated twice: their gradient is a kernel")


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of a Function: differentiating its result raises.

    torch's decorator of the same name does not raise if the upstream gradient is a constant:
    ``loss.backward(create_graph=True)`` followed by a penalty on the gradient would be silently wrong.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # there is no second derivative to trace
            return backward(ctx, *grads)
        if is_batched(*grads):  # _Refuse does not work within vmap
            raise RuntimeError(
                "create_graph must be False if a backward pass takes a batch of gradients (is_grads_batched=True, "
                "vectorize=True, vmap): batchkern operations cannot be differentiated twice"
            )
        # The inputs of the first derivative, so that a second derivative with respect to any of them passes here.
        sources = [x for x in (*grads, *ctx.saved_tensors) if isinstance(x, Tensor) and x.requires_grad]
        with torch.no_grad():
            results = backward(ctx, *grads)
        return tuple(
            _Refuse.apply(x.detach().requires_grad_(), *sources) if isinstance(x, Tensor) else x for x in results
        )

    return wrapper


def is_batched(*grads: Tensor | None) -> bool:
    """Whether these upstream gradients are a batch of gradients, from ``torch.func.vmap`` or from
    ``torch.autograd.grad(..., is_grads_batched=True)``, which has its own kind of batched tensors."""
    if torch.compiler.is_compiling():
        return False
    return any(
        x is not None and (_functorch.is_legacy_batchedtensor(x) or _functorch.is_batchedtensor(x)) for x in grads
    )


def one_by_one(function: Callable[..., list[Tensor]], *grads: Tensor | None) -> list[Tensor]:
    """``function(*grads)``; for a batch of upstream gradients, the batch of the results for each of them."""
    if not is_batched(*grads):
        return function(*grads)
    level = max(_functorch.maybe_get_level(x) for x in grads if x is not None)
    take: Callable[..., Tensor] = _functorch._remove_batch_dim
    give: Callable[..., Tensor] = _functorch._add_batch_dim
    if level < 0:  # of is_grads_batched, whose level is the first
        level, take, give = 1, torch._remove_batch_dim, torch._add_batch_dim
    size = max(len(take(x, level, 1, 0)) for x in grads if is_batched(x))
    parts = [[None] * size if x is None else take(x, level, size, 0).unbind() for x in grads]
    results = [function(*part) for part in zip(*parts, strict=True)]
    return [give(torch.stack(of_one), 0, level) for of_one in zip(*results, strict=True)]


def check_one_gradient(grad: Tensor) -> None:
    """Rejects a batch of gradients with ``inplace_backward``."""
    if is_batched(grad):
        raise RuntimeError(
            "inplace_backward must be False if a backward pass takes a batch of gradients (is_grads_batched=True, "
            "vectorize=True, vmap): the storage of the logits has room for only one"
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

    For the reference, which must have no second derivative because kernels have none; otherwise code that runs on one
    backend would fail on another. With ``into_storage``, the gradient is written over the storage of ``x``. Within a
    transform of ``torch.func``, where no kernel runs, ``x`` itself is returned.
    """
    if _backend.within_transform():
        return x
    return _Boundary.apply(x, into_storage)


def check_inplace_backward(logits: Tensor) -> None:
    """Raises if overwriting the storage of ``logits`` would give wrong gradients or change other tensors."""
    base: Tensor | None = logits._base
    owner = logits if base is None else base
    if owner.requires_grad and owner.is_leaf:
        raise ValueError(
            "inplace_backward must be False if logits is a leaf or a view of one: its values would be lost"
        )
    if logits.is_neg():
        raise ValueError("inplace_backward must be False if logits is a lazily negated view")
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        overlaps = size > 1 and stride < extent
        extent += (size - 1) * stride
        if not overlaps:
            continue
        raise ValueError(f"inplace_backward must be False if logits overlaps itself, got strides {logits.stride()}")


def check_unchanged(logits: Tensor, version: int) -> None:
    """Raises if ``logits`` has changed since the forward pass of an ``inplace_backward``."""
    if logits._version != version:
        raise RuntimeError(
            "inplace_backward=True: the logits were changed after the forward pass "
            f"(version {logits._version}, expected {version}), so their storage cannot take the gradient"
        )
