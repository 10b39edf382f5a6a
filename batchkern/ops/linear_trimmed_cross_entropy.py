"""Trimmed cross entropy fused with the last linear layer, for language models: see ``_linear.py`` for how."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchkern import _backend, reference
from batchkern.ops import _checks as check
from batchkern.ops import _linear
from batchkern.ops._autograd import boundary, once_differentiable
from batchkern.ops.trimmed_mean import select_over_group, trimmed_mean_op


def linear_trimmed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    keep: float | Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    per_sample: bool = False,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``trimmed_cross_entropy(F.linear(hidden, weight, bias), target, keep, ...)`` without all ``(N, V)`` logits.

    With F = 2 N H V flops a step costs (1 + 3 keep) F, near ``keep=1`` (3 + 2 (1 - keep)) F: rows that are dropped, and
    ignored ones, cost their forward pass alone. Beyond inputs and gradients it holds the logits of one chunk; a second
    one for a moment, where those of the first are kept for the backward pass; and near ``keep=1`` the gradient of a
    16-bit weight in float32; under autocast, a copy of the weight. Products are PyTorch's, with its settings (TF32,
    reductions in bfloat16).

    Args:
        hidden: ``(N, H)`` float32, bfloat16, float16 or float64 (which has no kernel, and holds all logits).
        weight: ``(V, H)``, same dtype; may be that of the embedding. Under autocast types may differ, as ``F.linear``
            would cast both, and the gradient of a float32 weight is made in float32.
        target: ``(N,)`` int64 in [0, V), or ``ignore_index``.
        keep: fraction of rows kept, in (0, 1]; or a 0-dim float tensor on the same device, read when the operation
            runs. A GPU's tensor is not looked at by the host, and saves nothing: the step then costs 4 F.
        bias: ``(V,)``, same dtype.
        ignore_index, label_smoothing, group: as in :func:`batchkern.trimmed_cross_entropy`. With a group on a GPU the
            backward pass waits for the number of rows that this process keeps, unless a graph is being captured.
        per_sample: also return the losses ``(N,)``, detached, 0 at ignored rows.
        chunk_rows: rows of a chunk. None: equal chunks of at most 64 MiB of logits, on a GPU 512, but of 128 rows at
            least. Where that is all ``N`` rows, their logits are kept for the backward pass.

    Returns:
        The 0-dim loss, or ``(loss, losses)``.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or range.
    """
    check.tensor("hidden", hidden, dims=2)
    _check_parameter("weight", weight, 2, hidden)
    words, width = weight.shape
    if hidden.shape[1] != width:
        raise ValueError(f"weight must have shape (V, {hidden.shape[1]}) to match hidden, got {tuple(weight.shape)}")
    if bias is not None:
        _check_parameter("bias", bias, 1, hidden)
        check.vector("bias", bias, rows=words, like=hidden, dtypes=(bias.dtype,))
    check.vector("target", target, rows=hidden.shape[0], like=hidden, dtypes=(torch.int64,))
    keep = check.fraction("keep", keep, hidden)
    check.number("label_smoothing", label_smoothing, 0, 1)
    check.ignored(ignore_index, group)
    if chunk_rows is not None:
        check.count("chunk_rows", chunk_rows, low=1)
    if not _backend.has_kernel("linear_trimmed_cross_entropy", hidden):
        check.target_values(target, classes=words, ignore_index=ignore_index)
        loss, losses = reference.linear_trimmed_cross_entropy(
            boundary(hidden),
            boundary(weight),
            target,
            keep,
            bias=None if bias is None else boundary(bias),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            group=group,
            chunk_rows=chunk_rows,
        )
        return (loss, losses) if per_sample else loss
    dtype = torch.get_autocast_dtype(hidden.device.type) if _autocasts(hidden) else hidden.dtype
    call: dict[str, Any] = {
        "target": target,
        "keep": keep if isinstance(keep, Tensor) and not check.readable(keep) else float(keep),
        "dtype": dtype,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "group": group,
        "rows": _linear.chunk_rows(hidden, weight, dtype, chunk_rows),
        "grad": torch.is_grad_enabled(),
    }
    loss = _LinearTrimmedCrossEntropy.apply(hidden, weight, bias, call)
    return (loss, call["losses"].detach()) if per_sample else loss


class _LinearTrimmedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: dict[str, Any]) -> Tensor:
        target, keep, dtype, group = call["target"], call["keep"], call["dtype"], call["group"]
        ctx.needs = [call["grad"] and needed for needed in ctx.needs_input_grad[:3]]
        ctx.used = False
        rows = call["rows"]
        known = None if group is not None or isinstance(keep, Tensor) else keep
        way = _linear.choose(known, ctx.needs, all_in_a_chunk=rows >= hidden.shape[0], dtype=dtype)
        arguments = hidden, weight, bias, target, dtype, call["ignore_index"], call["label_smoothing"], rows
        grads: list[Tensor] = []
        logits: list[Tensor] = []
        if way == "gradient of all":
            loss, losses, lse, kept, normalizer, grads = _linear.call(
                _linear.losses_and_gradients, *arguments, ctx.needs, keep
            )
        else:
            losses, lse, logits = _linear.call(_linear.losses, *arguments, way == "keep logits")
            valid = target != call["ignore_index"]
            if group is None:
                loss, kept, normalizer = trimmed_mean_op(losses, *check.split_keep(keep, losses), valid)
            else:
                kept, normalizer = select_over_group(losses, valid, None, keep, group)
                loss = torch.where(kept, losses, 0).sum() / normalizer
        ctx.save_for_backward(
            hidden, weight, bias, target, lse, kept, normalizer, logits[0] if logits else None, *grads
        )
        most = None if group is not None else 1.0 if known is None else known
        ctx.options = dtype, call["label_smoothing"], rows, ctx.needs, most
        call["losses"] = losses
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, lse, kept, normalizer, logits, *grads = ctx.saved_tensors
        if grads and torch.compiler.is_compiling():
            grads = [grad * x for x in grads]
        elif grads and not ctx.used:
            ctx.used = True  # another backward pass computes them again
            # Through .data, since autograd would take the scaling for a mistake of the caller.
            grads = [x.data.mul_(grad) for x in grads]
            if ctx.needs[0]:
                grads[0].masked_fill_(~kept[:, None], 0)  # even where the upstream gradient is infinite
        else:
            saved = grad, target, lse, kept, normalizer, logits
            grads = _linear.call(_linear.gradients, hidden, weight, bias, *saved, *ctx.options)
        results = iter(grads)
        return *(next(results) if needed else None for needed in ctx.needs), None


def _autocasts(hidden: Tensor) -> bool:
    """Whether ``F.linear`` would cast its arguments."""
    device = hidden.device.type
    return hidden.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device)


def _check_parameter(name: str, x: Tensor, dims: int, hidden: Tensor) -> None:
    check.tensor(name, x, dims=dims, dtypes=check.FLOATS[:3] if _autocasts(hidden) else (hidden.dtype,))
    check.same_device(name, x, hidden)


class LinearTrimmedCrossEntropyLoss(nn.Module):
    """:func:`linear_trimmed_cross_entropy` as a module; ``keep`` may be reassigned between steps.

    It has no parameters: the last layer's weight is given in each call, so that it may be tied to the embedding.

    Args:
        keep, ignore_index, label_smoothing, per_sample, group, chunk_rows: as in the function.
    """

    def __init__(
        self,
        keep: float | Tensor,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        per_sample: bool = False,
        group: dist.ProcessGroup | None = None,
        chunk_rows: int | None = None,
    ) -> None:
        super().__init__()
        check.fraction("keep", keep, keep if isinstance(keep, Tensor) else torch.empty(0))
        check.number("label_smoothing", label_smoothing, 0, 1)
        check.ignored(ignore_index, group)
        if chunk_rows is not None:
            check.count("chunk_rows", chunk_rows, low=1)
        self.keep = keep
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.per_sample = per_sample
        self.group = group
        self.chunk_rows = chunk_rows

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return linear_trimmed_cross_entropy(
            hidden,
            weight,
            target,
            self.keep,
            bias=bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            per_sample=self.per_sample,
            group=self.group,
            chunk_rows=self.chunk_rows,
        )

    def extra_repr(self) -> str:
        return f"keep={self.keep}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
