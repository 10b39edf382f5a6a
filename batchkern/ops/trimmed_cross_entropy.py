"""Mini-batch trimming: the mean cross entropy of the hardest fraction of a batch (Fassold, 2021, section 2)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchkern import _backend, reference
from batchkern.ops import _checks as check
from batchkern.ops._autograd import (
    boundary,
    check_inplace_backward,
    check_one_gradient,
    check_unchanged,
    once_differentiable,
)
from batchkern.ops._public import public
from batchkern.ops.trimmed_mean import select_over_group


@overload
def trimmed_cross_entropy(
    logits: Tensor,
    target: Tensor,
    keep: float | Tensor,
    *,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    class_weight: Tensor | None = ...,
    per_sample: Literal[False] = ...,
    group: dist.ProcessGroup | None = ...,
    inplace_backward: bool = ...,
) -> Tensor: ...
@overload
def trimmed_cross_entropy(
    logits: Tensor,
    target: Tensor,
    keep: float | Tensor,
    *,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    class_weight: Tensor | None = ...,
    per_sample: Literal[True],
    group: dist.ProcessGroup | None = ...,
    inplace_backward: bool = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def trimmed_cross_entropy(
    logits: Tensor,
    target: Tensor,
    keep: float | Tensor,
    *,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    class_weight: Tensor | None = ...,
    per_sample: bool,
    group: dist.ProcessGroup | None = ...,
    inplace_backward: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
@public
def trimmed_cross_entropy(
    logits: Tensor,
    target: Tensor,
    keep: float | Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    per_sample: bool = False,
    group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean cross entropy of the k rows with the highest losses.

    k = max(round(keep * n), 1), where n is the number of rows (samples, pixels or tokens) that are not ignored. Of
    equal losses, the one with the lower row index is kept; NaN ranks highest. Dropped rows get a gradient of exact
    zeros. Losses and sums are float32 whatever the logits are (float64 for float64 logits).

    It is the common composition of :func:`cross_entropy` and :func:`trimmed_mean` in one pass; other ways to choose
    rows are arguments of the latter.

    Args:
        logits: ``(C,)``, ``(B, C)`` or ``(B, C, d1, ..., dK)``, float32, bfloat16, float16 or float64, any strides.
        target: class indices of any integer type in [0, C), or ``ignore_index``, of the rows' shape; or probabilities
            of the logits' shape, as in :func:`cross_entropy`.
        keep: fraction of rows kept, in (0, 1]; or a 0-dim float tensor on the logits' device, read when the operation
            runs, so that a captured CUDA graph follows a schedule.
        ignore_index: any int; rows with this target have no loss, no gradient and no rank.
        label_smoothing: in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        class_weight: ``(C,)``, of any of these types; it must not require a gradient. Weighted losses are ranked, and
            their sum is divided by the kept rows' weights; with probabilities by the number of kept rows, as PyTorch
            does.
        per_sample: also return the losses, of the rows' shape, detached, 0 at ignored rows.
        group: rank over the batches of all processes of this group. They may have different numbers of rows, except
            within ``torch.compile`` and captured graphs. Of equal losses, the lower rank comes first. The loss is
            scaled so that the average of gradients over ranks is the gradient of the concatenated batch.
        inplace_backward: write the gradient over the logits' storage, which must not overlap itself; no effect under
            ``torch.compile`` or if no gradient is needed.

    Returns:
        The 0-dim loss, or ``(loss, losses)``. NaN when every row is ignored, as ``F.cross_entropy`` gives. With
        ``keep=1`` the loss is ``F.cross_entropy(logits, target, ...)``.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or range.
        RuntimeError: in the backward pass, when it is differentiated again, or when ``inplace_backward`` finds the
            logits changed since the forward pass.

    Examples:
        >>> import torch
        >>> from batchkern import trimmed_cross_entropy
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 3.0], [7.0, 1.0]]).log()
        >>> target = torch.tensor([0, 0, 0, 0])
        >>> loss, losses = trimmed_cross_entropy(logits, target, keep=0.5, per_sample=True)
        >>> [round(loss, 4) for loss in losses.tolist()]
        [0.2877, 0.6931, 1.3863, 0.1335]
        >>> round(float(loss), 4)  # the mean of the two highest
        1.0397
    """
    check.cross_entropy(logits, target, class_weight, "class_weight", ignore_index, label_smoothing, group)
    keep = check.fraction("keep", keep, logits)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        inplace_backward = False  # the compiler plans memory itself, and version counters cannot be traced
    if inplace_backward:
        check_inplace_backward(logits)
        inplace_backward = logits.requires_grad
    loss, losses = trimmed_loss(
        logits,
        target,
        keep,
        ignore_index=ignore_index,
        label_smoothing=float(label_smoothing),
        class_weight=class_weight,
        group=group,
        inplace_backward=inplace_backward,
    )
    return (loss, losses.detach()) if per_sample else loss


def trimmed_loss(
    logits: Tensor,
    target: Tensor,
    keep: float | Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    class_weight: Tensor | None,
    group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss ``()`` and the losses of all rows, for checked arguments."""
    kernel = kernel_target("trimmed_cross_entropy", logits, target)
    if kernel is None:
        check.target_values(target, classes=logits.shape[reference.class_dim(logits)], ignore_index=ignore_index)
        logits = boundary(logits, into_storage=inplace_backward)
        target = boundary(target) if target.requires_grad else target
        return reference.trimmed_cross_entropy(
            logits,
            target,
            keep,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            group=group,
        )
    with torch.no_grad():
        loss, losses, lse, kept, normalizer = _backend.operator("trimmed_cross_entropy")(
            logits, kernel, *check.split_keep(keep, logits), class_weight, ignore_index, label_smoothing
        )
        if group is not None:
            loss, kept, normalizer = _over_group(losses, kernel, class_weight, ignore_index, keep, group)
    forward = _Forward(loss, kernel, lse, kept, normalizer, class_weight, label_smoothing, inplace_backward)
    with_gradient: Tensor = _TrimmedCrossEntropy.apply(logits, forward)
    return with_gradient, losses


def _over_group(
    losses: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    keep: float | Tensor,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, kept rows and normalizer, with the batches of all processes of the group ranked together."""
    valid = reference.valid_rows(target, ignore_index).flatten()
    weight = None
    if class_weight is not None and not target.is_floating_point():
        weight = class_weight.float()[torch.where(valid, target.long().flatten(), 0)]
    kept, normalizer = select_over_group(losses.flatten(), valid, weight, keep, group)
    kept = kept.view(losses.shape)
    return torch.where(kept, losses, 0).sum() / normalizer, kept, normalizer


def kernel_target(op: str, logits: Tensor, target: Tensor) -> Tensor | None:
    """The target in the form that the kernels take; None if the reference must be used, which alone supports float64
    and a gradient for probabilities."""
    if not _backend.has_kernel(op, logits):
        return None
    if not target.is_floating_point():
        return target
    if target.dtype == torch.float64 or (target.requires_grad and torch.is_grad_enabled()):
        return None
    return target if target.dtype in (torch.float32, logits.dtype) else target.float()


class _Forward(NamedTuple):
    """The results of a forward pass of the kernel that the backward pass needs. "Rows" is the shape of the losses."""

    loss: Tensor
    """``()``, the only result with a gradient."""
    target: Tensor
    lse: Tensor
    """``(rows, 2)``, or ``(rows, 3)`` if the target holds probabilities: see csrc/ops.cpp."""
    kept: Tensor
    normalizer: Tensor
    """``()``: the divisor of the sum of the kept losses."""
    class_weight: Tensor | None
    label_smoothing: float
    inplace_backward: bool


class _TrimmedCrossEntropy(torch.autograd.Function):
    """Adds the gradient to the loss of a forward pass that has already run.

    With p = softmax(z) of a row's logits z and q its target (one-hot, or probabilities; smoothed, and times the class
    weights w):

    1. the loss of the row is sum_c q_c (lse(z) - z_c), so its derivative with respect to z_c is p_c sum(q) - q_c;
    2. the result is the sum over the kept rows divided by the normalizer, and dropped rows do not contribute;
    3. so the gradient of a kept row is ``grad / normalizer`` times (1), and that of a dropped one is zero. Which rows
       are kept changes only at ties, where the loss has no derivative; there, too, the kept rows are constants.

    p is computed from the logits and lse, which the forward pass saved: no other array of the logits' size is kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, forward: _Forward) -> Tensor:
        ctx.inplace = (logits.detach(), logits._version) if forward.inplace_backward else None
        ctx.save_for_backward(
            None if forward.inplace_backward else logits,
            forward.target,
            forward.lse,
            forward.kept,
            forward.normalizer,
            forward.class_weight,
        )
        ctx.label_smoothing = forward.label_smoothing
        return forward.loss.detach()  # without detach, the compiler of torch 2.10 would treat it as an argument

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, *saved = ctx.saved_tensors
        if ctx.inplace is None:
            backward = _backend.operator("trimmed_cross_entropy_backward")
            return backward(grad, logits, *saved, ctx.label_smoothing), None
        check_one_gradient(grad)
        logits, version = ctx.inplace
        if logits is None:
            raise RuntimeError("inplace_backward=True: the first backward pass has overwritten the logits")
        check_unchanged(logits, version)
        ctx.inplace = None, version  # frees the logits even if the loss is kept
        torch.autograd.graph.increment_version(logits)
        torch.ops.batchkern.trimmed_cross_entropy_backward_.default(grad, logits, *saved, ctx.label_smoothing)
        return logits, None


if _backend.extension is not None:

    @torch.library.register_fake("batchkern::trimmed_cross_entropy")
    def _(logits: Tensor, target: Tensor, *rest: Any, **options: Any) -> Any:
        losses = logits.new_empty(row_shape(logits), dtype=torch.float32)
        scalar = losses.new_empty(())
        state = losses.new_empty(*losses.shape, 3 if target.is_floating_point() else 2)
        return scalar, losses, state, torch.empty_like(losses, dtype=torch.bool), torch.empty_like(scalar)

    @torch.library.register_fake("batchkern::trimmed_cross_entropy_backward")
    def _(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
        return torch.empty_like(logits)

    @torch.library.register_fake("batchkern::trimmed_cross_entropy_backward_")
    def _(grad: Tensor, logits: Tensor, *rest: Any) -> None:
        return None

    @torch.library.register_fake("batchkern::cross_entropy_losses")
    def _(logits: Tensor, *rest: Any, **options: Any) -> None:
        return None

    @torch.library.register_fake("batchkern::cross_entropy_backward_")
    def _(grad: Any, grad_lse: Any, logits: Tensor, *rest: Any, **options: Any) -> None:
        return None


def row_shape(logits: Tensor) -> torch.Size:
    classes = reference.class_dim(logits)
    return logits.shape[:classes] + logits.shape[classes + 1 :]


class TrimmedCrossEntropyLoss(nn.Module):
    """:func:`trimmed_cross_entropy` as a module; ``keep`` may be reassigned between steps. It loads the state_dict of
    ``nn.CrossEntropyLoss(weight=...)``.

    Args:
        keep, ignore_index, label_smoothing, class_weight, per_sample, group, inplace_backward: as in the function.

    Examples:
        >>> import torch
        >>> from batchkern import TrimmedCrossEntropyLoss
        >>> criterion = TrimmedCrossEntropyLoss(keep=1.0)
        >>> logits = torch.tensor([[1.0, 1.0], [1.0, 3.0]]).log()
        >>> round(float(criterion(logits, torch.tensor([0, 0]))), 4)
        1.0397
        >>> criterion.keep = 0.5  # from now on the hardest half
        >>> round(float(criterion(logits, torch.tensor([0, 0]))), 4)
        1.3863
    """

    def __init__(
        self,
        keep: float | Tensor,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        per_sample: bool = False,
        group: dist.ProcessGroup | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        check.fraction("keep", keep, keep if isinstance(keep, Tensor) else torch.empty(0))
        check.number("label_smoothing", label_smoothing, 0, 1)
        check.ignored(ignore_index, group)
        if class_weight is not None:
            check.tensor("class_weight", class_weight, dims=1)
        self.keep = keep
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.per_sample = per_sample
        self.group = group
        self.inplace_backward = inplace_backward
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Also loads the state of ``nn.CrossEntropyLoss``, in which the class weights have another name."""
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}class_weight"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return trimmed_cross_entropy(
            logits,
            target,
            self.keep,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            per_sample=self.per_sample,
            group=self.group,
            inplace_backward=self.inplace_backward,
        )

    def extra_repr(self) -> str:
        return f"keep={self.keep}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
