"""The differentiable cross entropy of each row, the basis for selecting and weighting rows."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from batchkern import _backend, reference
from batchkern.ops import _checks as check
from batchkern.ops._autograd import once_differentiable
from batchkern.ops._public import public
from batchkern.ops.trimmed_cross_entropy import kernel_target, row_shape, trimmed_loss
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
@overload
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    stats: bool,
) -> Tensor | Rows: ...
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
        logits: ``(C,)``, ``(B, C)`` or ``(B, C, d1, ..., dK)``, float32, bfloat16, float16 or float64. They
            are read without a copy in any memory format, which the gradient shares; they are copied only if the strides
            of d1, ..., dK do not merge into one dimension.
        target: class indices in [0, C) of any integer type and of the rows' shape, ``()``, ``(B,)`` or ``(B, d1, ...,
            dK)``; or probabilities of the logits' shape. As in PyTorch, the values of probabilities are not checked:
            negative values or NaN give such losses. Probabilities that require a gradient get one, from plain PyTorch.
        weight: the weight of each class, ``(C,)`` of any of these types; it must not require a gradient.
        ignore_index: any int; rows with this target have neither loss nor gradient. Not for probabilities.
        label_smoothing: in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        reduction: ``"none"``, ``"mean"`` (divided by the sum of the rows' weights for class indices) or ``"sum"``.
        stats: return :class:`Rows` instead of the losses, whatever the reduction.

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
    label_smoothing = float(label_smoothing)
    if reduction == "mean" and not stats:  # one pass over the logits; new options must be passed here, too
        return trimmed_loss(
            logits, target, 1.0, ignore_index=ignore_index, label_smoothing=label_smoothing, class_weight=weight
        )[0]
    kernel = kernel_target("cross_entropy", logits, target)
    if kernel is None:
        check.target_values(target, classes=logits.shape[reference.class_dim(logits)], ignore_index=ignore_index)
        options = reference.LossOptions(weight, ignore_index, label_smoothing)
        if _backend.within_transform():
            rows = reference.cross_entropy(logits, target, **options._asdict(), stats=stats)
        else:
            rows = reference.rows_with_gradient(_ReferenceCrossEntropy, logits, target, options, stats=stats)
        return rows if stats else rows.loss if reduction == "none" else rows.loss.sum()
    with torch.no_grad():
        losses, state, entropy, correct = _backend.operator("cross_entropy")(
            logits, kernel, weight, ignore_index, label_smoothing, stats
        )
        lse = state[..., 0] + state[..., 1] if stats else None
    forward = _Forward(losses, lse, kernel, state, weight, ignore_index, label_smoothing)
    results: Any = _CrossEntropy.apply(logits, forward)
    if stats:
        losses, lse = results
        return Rows(losses, lse, entropy, correct)
    losses = results
    return losses if reduction == "none" else losses.sum()


class _Forward(NamedTuple):
    """The results of a forward pass of the kernel that the backward pass needs."""

    losses: Tensor
    """The losses, of the rows' shape."""
    lse: Tensor | None
    """The log-sum-exps, of the rows' shape and with a gradient; None without ``stats``."""
    target: Tensor
    state: Tensor
    """``(rows, 2)``, or ``(rows, 3)`` if the target holds probabilities: lse in parts, see csrc/ops.cpp."""
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float


class _CrossEntropy(torch.autograd.Function):
    """Adds the gradient to the losses and log-sum-exps of a forward pass that has already run.

    With p = softmax(z) of a row's logits z, q its smoothed and weighted target, and g and h the upstream gradients of
    its loss and its log-sum-exp:

    1. the loss is sum_c q_c (lse(z) - z_c), so its derivative with respect to z_c is p_c sum(q) - q_c;
    2. the derivative of lse(z) with respect to z_c is p_c;
    3. so the gradient is (g sum(q) + h) p - g q. A row with zero g and h is not read.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, forward: _Forward) -> Any:
        ctx.save_for_backward(logits, forward.target, forward.state, forward.weight)
        ctx.options = forward.ignore_index, forward.label_smoothing
        ctx.set_materialize_grads(False)
        losses = forward.losses.detach()  # as in trimmed_cross_entropy
        return losses if forward.lse is None else (losses, forward.lse.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, None]:
        if grad is None and grad_lse is None:
            return None, None
        return _backend.operator("cross_entropy_backward")(grad, grad_lse, *ctx.saved_tensors, *ctx.options), None


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
