"""The cross entropy of each row, differentiable: what selections and weightings of rows begin with."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from batchkern import _backend, reference
from batchkern.ops import _checks as check
from batchkern.ops._autograd import once_differentiable
from batchkern.ops._public import public
from batchkern.ops.trimmed_cross_entropy import kernel_target, row_shape, trimmed
from batchkern.reference import Rows as Rows

Reduction = Literal["none", "mean", "sum"]


@overload
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    stats: Literal[True],
) -> Rows: ...
@public
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    stats: bool = False,
) -> Tensor | Rows:
    """``torch.nn.functional.cross_entropy``, whose backward pass does no work for rows that no gradient reaches.

    With ``reduction="none"`` or ``stats`` any code may select, mask or weigh the losses of the rows: a row whose
    upstream gradient is zero is not read by the backward pass, and its gradient is an exact zero, whatever the row
    holds. Losses are float32 whatever the logits are (float64 for float64 logits). Within the transforms of
    ``torch.func`` PyTorch's own functions serve.

    Args:
        logits: ``(C,)``, ``(B, C)`` or ``(B, C, d1, ..., dK)``, float32, bfloat16, float16 or float64. Read where they
            lie, whatever their memory format, which the gradient shares; copied only where the strides of d1, ..., dK
            do not merge into one dimension.
        target: class indices in [0, C) of any integer type and of the rows' shape, ``()``, ``(B,)`` or ``(B, d1, ...,
            dK)``; or probabilities of the logits' shape. What probabilities hold is not checked, as in PyTorch: those
            that are negative or NaN make losses that are. Probabilities that require a gradient get one, from plain
            PyTorch.
        weight: of each class, ``(C,)`` of any of these types; it must not require a gradient.
        ignore_index: any int; rows with this target have neither loss nor gradient. Not for probabilities.
        label_smoothing: in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        reduction: ``"none"``, ``"mean"`` (over the rows' weights where there are class indices) or ``"sum"``.
        stats: return :class:`Rows` in place of the losses, whatever the reduction.

    Returns:
        The losses of the rows' shape, or 0-dim. With ``stats`` it is ``Rows(loss, lse, entropy, correct)``, all of the
        rows' shape, of which loss and lse (the log-sum-exp) are differentiable.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or range.
        RuntimeError: in the backward pass, when it is differentiated again.

    Examples:
        >>> import torch
        >>> from batchkern import cross_entropy
        >>> logits = torch.tensor([[1.0, 1.0], [3.0, 1.0]]).log().requires_grad_()
        >>> losses = cross_entropy(logits, torch.tensor([0, 0]), reduction="none")
        >>> [round(loss, 4) for loss in losses.tolist()]
        [0.6931, 0.2877]
        >>> losses[0].backward()  # the loss of row 1 counts nowhere
        >>> logits.grad.tolist()
        [[-0.5, 0.5], [0.0, 0.0]]
    """
    check.cross_entropy(logits, target, weight, "weight", ignore_index, label_smoothing)
    check.one_of("reduction", reduction, ("none", "mean", "sum"))
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": float(label_smoothing)}
    if reduction == "mean" and not stats:
        return trimmed(logits, target, 1.0, class_weight=weight, **options)[0]
    options["weight"] = weight
    kernel = kernel_target("cross_entropy", logits, target)
    if kernel is not None:
        call: dict[str, Any] = {"target": kernel, "stats": stats, **options}
        results = _CrossEntropy.apply(logits, call)
        if not stats:
            losses: Tensor = results
            return losses if reduction == "none" else losses.sum()
        return Rows(*results, *(x.detach() for x in call["constants"]))
    check.target_values(target, classes=logits.shape[reference.class_dim(logits)], ignore_index=ignore_index)
    if _backend.within_transform():
        rows = reference.cross_entropy(logits, target, **options, stats=stats)
    else:
        call = {"options": options, "stats": stats}
        results = _ReferenceCrossEntropy.apply(logits, target, call)
        rows = Rows(*results, *(x.detach() for x in call["constants"]))
    return rows if stats else rows.loss if reduction == "none" else rows.loss.sum()


class _CrossEntropy(torch.autograd.Function):
    """Arguments travel in a dict, and what has no gradient back in it, as in ``trimmed_cross_entropy``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: dict[str, Any]) -> Any:
        target, weight = call["target"], call["weight"]
        ctx.options = call["ignore_index"], call["label_smoothing"]
        losses, state, *constants = _backend.call("cross_entropy")(logits, target, weight, *ctx.options, call["stats"])
        ctx.save_for_backward(logits, target, state, weight)
        ctx.set_materialize_grads(False)
        if not call["stats"]:
            return losses
        call["constants"] = constants
        return losses, state[..., 0] + state[..., 1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, None]:
        if grad is None and grad_lse is None:
            return None, None
        return _backend.call("cross_entropy_backward")(grad, grad_lse, *ctx.saved_tensors, *ctx.options), None


class _ReferenceCrossEntropy(reference.CrossEntropy):
    backward = staticmethod(once_differentiable(reference.CrossEntropy.backward))


if _backend.extension is not None:

    @torch.library.register_fake("batchkern::cross_entropy")
    def _(
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        stats: bool = False,
    ) -> Any:
        losses = logits.new_empty(row_shape(logits), dtype=torch.float32)
        rows = losses if stats else losses.new_empty(0)
        state = losses.new_empty(*losses.shape, 3 if target.is_floating_point() else 2)
        return losses, state, torch.empty_like(rows), torch.empty_like(rows, dtype=torch.bool)

    @torch.library.register_fake("batchkern::cross_entropy_backward")
    def _(grad: Any, grad_lse: Any, logits: Tensor, *rest: Any, **options: Any) -> Tensor:
        return torch.empty_like(logits)
