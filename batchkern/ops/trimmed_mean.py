"""Selection of rows of a batch by any score, and the mean of their losses (Fassold, 2021, section 2)."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchkern import _backend, reference
from batchkern.ops import _checks as check
from batchkern.ops._autograd import boundary, once_differentiable
from batchkern.ops._public import public

Order = Literal["highest", "lowest"]
Within = Literal["all", "sample"]


@public
def trimmed_mean(
    losses: Tensor,
    keep: float | Tensor,
    *,
    score: Tensor | None = None,
    order: Order = "highest",
    skip: float = 0.0,
    above: float | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    within: Within = "all",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean of the losses of a selection of rows: by default, of the k highest. Differentiable in ``losses``.

    k = max(round(keep * n), 1), where n is the number of rows that ``mask`` does not exclude. Of equal scores, the one
    with the lower row index comes first; NaN ranks highest. Dropped rows get a gradient of exact zeros. Scores and sums
    are float32 (float64 for float64 losses).

    Args:
        losses: float32, bfloat16, float16 or float64 of any shape; each element is a row.
        keep: fraction kept, in (0, 1], or a 0-dim float tensor on the losses' device, read when the operation runs.
        score: floats of the losses' shape, which are ranked instead of the losses; no gradient flows to it.
        order: ``"highest"``; or ``"lowest"``, which keeps the k lowest. NaN then comes last.
        skip: in [0, 1). This fraction, at the top of the order, is left out first: rows round(skip * n) to
            round(skip * n) + k are kept. skip + keep is at most 1.
        above: any number. All rows that score above it are kept too, except those that ``skip`` leaves out. ``None``
            keeps no further rows; with ``order="lowest"`` it must be None.
        mask: bool of the losses' shape; rows where it is False are ignored.
        weight: floats of the losses' shape. Each kept loss is multiplied by its weight, and the sum is divided by the
            sum of the kept rows' weights.
        within: ``"all"``; or ``"sample"``, which ranks each index of the first dimension separately and averages the
            kept rows of all.
        group: process group whose batches are ranked together; they may have different numbers of rows. Of equal
            scores, the lower rank comes first. The mean is scaled so that the average of gradients over ranks is the
            gradient of the concatenated batch. Each call synchronises with the host once, to exchange the numbers of
            rows, except with ``within="sample"`` and within ``torch.compile`` and captured graphs, where the numbers
            must be equal.

    Returns:
        0-dim float32 (float64 for float64 losses); NaN when no row is left.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or range.

    Examples:
        >>> import torch
        >>> from batchkern import trimmed_mean
        >>> losses = torch.tensor([4.0, 1.0, 3.0, 2.0])
        >>> float(trimmed_mean(losses, keep=0.5))  # 4 and 3
        3.5
        >>> float(trimmed_mean(losses, keep=0.5, order="lowest"))  # 1 and 2
        1.5
        >>> float(trimmed_mean(losses, keep=0.5, skip=0.25))  # 3 and 2: the highest may have a wrong label
        2.5
    """
    check.tensor("losses", losses)
    keep = _check_selection(losses, "losses", keep, order, skip, above, mask, within, group)
    for name, x in (("score", score), ("weight", weight)):
        if x is not None:
            check.companion(name, x, losses, "losses", dtypes=check.FLOATS)
            check.constant(name, x)
    exact = score is not None and score.dtype == torch.float64
    if exact or not _backend.has_kernel("trimmed_mean", losses):
        options: dict[str, Any] = {
            "order": order,
            "skip": skip,
            "above": above,
            "weight": weight,
            "within": within,
            "group": group,
        }
        return reference.trimmed_mean(boundary(losses), keep, score=score, mask=mask, **options)
    rows, mask = _flat(losses), _flat(mask)
    score = None if score is None else _flat(score.float())
    weight = None if weight is None else _flat(weight.float())
    band = _band(order, skip, above)
    with torch.no_grad():
        if group is None or within == "sample":
            keep, keep_tensor = check.split_keep(keep, rows)
            samples = _samples(losses, within)
            mean, kept, normalizer = trimmed_mean_op(rows, keep, keep_tensor, mask, score, weight, *band, samples)
            if group is not None:
                normalizer = reference.share_of_sum(normalizer, group)
        else:
            valid = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask
            ranked = rows.float() if score is None else score
            kept, normalizer = select_over_group(ranked, valid, weight, keep, group, band)
        if group is not None:
            mean = weighted_sum(rows, kept, weight) / normalizer
    with_gradient: Tensor = _TrimmedMean.apply(rows, _Forward(mean, kept, normalizer, weight))
    return with_gradient


@public
def select_rows(
    score: Tensor,
    keep: float | Tensor,
    *,
    order: Order = "highest",
    skip: float = 0.0,
    above: float | None = None,
    mask: Tensor | None = None,
    within: Within = "all",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The rows that :func:`trimmed_mean` would keep, as a mask of the score's shape.

    Args:
        score: float32, bfloat16, float16 or float64 of any shape; no gradient flows to it.
        keep, order, skip, above, mask, within, group: as in :func:`trimmed_mean`.

    Returns:
        bool of the score's shape. With ``group``, the mask is for the rows of this rank.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or range.

    Examples:
        >>> import torch
        >>> from batchkern import select_rows
        >>> losses = torch.tensor([4.0, 1.0, 3.0, 2.0])
        >>> select_rows(losses, keep=0.5).tolist()
        [True, False, True, False]
        >>> select_rows(losses, keep=0.25, mask=losses < 4).tolist()  # the highest of the other three
        [False, False, True, False]
    """
    check.tensor("score", score)
    keep = _check_selection(score, "score", keep, order, skip, above, mask, within, group)
    score = score.detach()
    if not _backend.has_kernel("select_rows", score):
        options: dict[str, Any] = {"order": order, "skip": skip, "above": above, "within": within}
        return reference.select_rows(score, keep, mask=mask, group=group, **options)
    band = _band(order, skip, above)
    if group is not None and within == "all":
        valid = torch.ones_like(score, dtype=torch.bool) if mask is None else mask
        kept, _ = select_over_group(_flat(score.float()), _flat(valid), None, keep, group, band)
    else:
        samples = _samples(score, within)
        keep, keep_tensor = check.split_keep(keep, score)
        kept = trimmed_mean_op(_flat(score), keep, keep_tensor, _flat(mask), None, None, *band, samples)[1]
    return kept.view(score.shape)


def _check_selection(
    rows: Tensor,
    name: str,
    keep: float | Tensor,
    order: str,
    skip: float,
    above: float | None,
    mask: Tensor | None,
    within: str,
    group: dist.ProcessGroup | None,
) -> float | Tensor:
    """Checks the arguments of a selection; returns ``keep`` in the form that the operation takes."""
    keep = check.fraction("keep", keep, rows)
    check.one_of("order", order, ("highest", "lowest"))
    check.one_of("within", within, ("all", "sample"))
    check.number("skip", skip, 0, 1, open_high=True)
    if skip and (not isinstance(keep, Tensor) or check.readable(keep)) and skip + float(keep) > 1 + 1e-6:
        raise ValueError(f"skip + keep must be at most 1, got {skip} + {float(keep)}")
    if above is not None:
        check.number("above", above, -math.inf)
        if order == "lowest":
            raise ValueError("above must be None if order is 'lowest': it adds rows with high scores")
    if mask is not None:
        check.companion("mask", mask, rows, name, dtypes=(torch.bool,))
    if within == "sample" and rows.dim() == 0:
        raise ValueError(f"within must be 'all' if {name} has no dimension, got 'sample'")
    check.process_group(group)
    return keep


def _band(order: str, skip: float, above: float | None) -> tuple[bool, float, float | None]:
    """Order, skip and above as three arguments of the operator."""
    return order == "lowest", float(skip), None if above is None else float(above)


def _flat(x: Any) -> Any:
    return x if x is None or x.dim() == 1 else x.reshape(-1)


def _samples(rows: Tensor, within: str) -> int:
    """The number of parts of the rows that are ranked separately."""
    return max(rows.shape[0], 1) if within == "sample" else 1


class _Forward(NamedTuple):
    """The results of a forward pass that the backward pass needs."""

    mean: Tensor
    """``()``, the only result with a gradient."""
    kept: Tensor
    """``(B,)`` bool."""
    normalizer: Tensor
    """``()``: the divisor of the sum."""
    weight: Tensor | None
    """``(B,)``."""


class _TrimmedMean(torch.autograd.Function):
    """Adds the gradient to the mean of a forward pass that has already run.

    The mean is the sum of the weighted losses of the kept rows, divided by the normalizer, which does not depend on the
    losses: so the gradient of a kept row is ``grad * weight / normalizer``, and that of a dropped one is zero.
    """

    @staticmethod
    def forward(ctx: Any, losses: Tensor, forward: _Forward) -> Tensor:
        ctx.save_for_backward(forward.kept, forward.normalizer, forward.weight)
        ctx.dtype = losses.dtype
        return forward.mean.detach()  # as in trimmed_cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, normalizer, weight = ctx.saved_tensors
        result: Tensor = _backend.operator("trimmed_mean_backward")(grad, kept, normalizer, ctx.dtype, weight)
        return result, None


def weighted_sum(losses: Tensor, kept: Tensor, weight: Tensor | None) -> Tensor:
    sums = torch.where(kept, losses.float(), 0)
    return sums.sum() if weight is None else (sums * torch.where(kept, weight, 0)).sum()


def trimmed_mean_op(
    losses: Tensor,
    keep: float,
    keep_tensor: Tensor | None,
    mask: Tensor | None,
    score: Tensor | None = None,
    weight: Tensor | None = None,
    lowest: bool = False,
    skip: float = 0.0,
    above: float | None = None,
    samples: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, kept rows ``(B,)`` bool and the divisor of the sum, computed by the kernel."""
    outputs: tuple[Tensor, Tensor, Tensor] = _backend.operator("trimmed_mean")(
        losses, keep, keep_tensor, mask, score, weight, lowest, skip, above, samples
    )
    return outputs


def select_over_group(
    losses: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    keep: float | Tensor,
    group: dist.ProcessGroup,
    band: tuple[bool, float, float | None] = (False, 0.0, None),
) -> tuple[Tensor, Tensor]:
    """``reference.select_and_normalize`` for a group, with the selection by the kernel."""
    whole = reference.gather(losses, valid, weight, group)
    keep, keep_tensor = check.split_keep(keep, losses)
    _, kept, _ = trimmed_mean_op(whole.losses, keep, keep_tensor, whole.valid, None, None, *band)
    return whole.share(kept)


if _backend.extension is not None:

    @torch.library.register_fake("batchkern::trimmed_mean")
    def _(losses: Tensor, *rest: Any, **options: Any) -> Any:
        scalar = losses.new_empty((), dtype=torch.float32)
        return scalar, torch.empty_like(losses, dtype=torch.bool), torch.empty_like(scalar)

    @torch.library.register_fake("batchkern::trimmed_mean_backward")
    def _(grad: Tensor, kept: Tensor, normalizer: Tensor, dtype: torch.dtype, weight: Tensor | None = None) -> Tensor:
        return torch.empty_like(kept, dtype=dtype)
