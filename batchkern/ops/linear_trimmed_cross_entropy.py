"""Trimmed cross entropy fused with the last linear layer, for language models: see ``_chunked_linear.py`` for how."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchkern.ops import _checks as check
from batchkern.ops._public import public
from batchkern.ops.linear_cross_entropy import check_options, checked, trimmed_linear_loss


@overload
def linear_trimmed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    keep: float | Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    per_sample: Literal[False] = ...,
    group: dist.ProcessGroup | None = ...,
    chunk_rows: int | None = ...,
    vocab_group: dist.ProcessGroup | None = ...,
) -> Tensor: ...
@overload
def linear_trimmed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    keep: float | Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    per_sample: Literal[True],
    group: dist.ProcessGroup | None = ...,
    chunk_rows: int | None = ...,
    vocab_group: dist.ProcessGroup | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_trimmed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    keep: float | Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    per_sample: bool,
    group: dist.ProcessGroup | None = ...,
    chunk_rows: int | None = ...,
    vocab_group: dist.ProcessGroup | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
@public
def linear_trimmed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    keep: float | Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    per_sample: bool = False,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``trimmed_cross_entropy(F.linear(hidden, weight, bias), target, keep, ...)`` without all logits.

    It is the common composition of :func:`linear_cross_entropy` and :func:`trimmed_mean`; other ways to choose tokens
    are arguments of the latter. Because ``keep`` is known in the forward pass, the cheapest way to the gradient is
    chosen. With F = 2 N H V flops for N tokens a step costs (1 + 3 keep) F, near ``keep=1`` (3 + 2 (1 - keep)) F:
    dropped and ignored tokens cost only their forward pass. Beyond inputs and gradients, memory is needed for the
    logits of one chunk; for a short time for a second chunk, if logits are kept for the backward pass or capped; near
    ``keep=1`` for the gradient of a 16-bit weight in float32; and under autocast for a copy of the weight. Matrix
    products are computed by PyTorch, with its settings (TF32, reductions in bfloat16).

    Args:
        hidden, weight, target, bias, softcap, logit_scale, chunk_rows, vocab_group: as in
            :func:`linear_cross_entropy`. If the logits of all tokens fit into one chunk and there is no softcap, they
            are kept for the backward pass.
        keep: fraction of the tokens kept, in (0, 1]; or a 0-dim float tensor on the same device, read when the
            operation runs. A tensor on a GPU is not read by the host, and saves no time: the step then costs 4 F.
        ignore_index, label_smoothing, group: as in :func:`batchkern.trimmed_cross_entropy`. With a group on a GPU, the
            backward pass synchronises to read the number of rows kept on this process, unless a graph is being
            captured.
        per_sample: also return the losses ``(...)``, detached, 0 at ignored tokens.

    Returns:
        The 0-dim loss, or ``(loss, losses)``.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or range.

    Examples:
        >>> import torch
        >>> from batchkern import linear_trimmed_cross_entropy
        >>> hidden = torch.eye(2)  # two tokens
        >>> weight = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()  # of a vocabulary of two words
        >>> target = torch.tensor([0, 1])  # losses 0.2877 and 0.6931
        >>> round(float(linear_trimmed_cross_entropy(hidden, weight, target, keep=0.5)), 4)
        0.6931
    """
    weight, bias, options = checked(
        hidden,
        weight,
        target,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        logit_scale=logit_scale,
        chunk_rows=chunk_rows,
        vocab_group=vocab_group,
        group=group,
    )
    keep = check.fraction("keep", keep, hidden)
    loss, losses = trimmed_linear_loss(hidden, weight, bias, target, keep, options, group, vocab_group)
    return (loss, losses.detach()) if per_sample else loss


class LinearTrimmedCrossEntropyLoss(nn.Module):
    """:func:`linear_trimmed_cross_entropy` as a module; ``keep`` may be reassigned between steps.

    It has no parameters: the last layer's weight is passed in each call, so that it may be tied to the embedding.

    Args:
        keep, ignore_index, label_smoothing, softcap, logit_scale, per_sample, group, chunk_rows,
            vocab_group: as in the function.

    Examples:
        >>> import torch
        >>> from batchkern import LinearTrimmedCrossEntropyLoss
        >>> hidden, target = torch.eye(2), torch.tensor([0, 1])
        >>> head = torch.nn.Linear(2, 2, bias=False)
        >>> head.weight.data = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()  # losses 0.2877 and 0.6931
        >>> criterion = LinearTrimmedCrossEntropyLoss(keep=0.5)
        >>> round(float(criterion(hidden, head.weight, target).detach()), 4)
        0.6931
    """

    def __init__(
        self,
        keep: float | Tensor,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        per_sample: bool = False,
        group: dist.ProcessGroup | None = None,
        chunk_rows: int | None = None,
        vocab_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check.fraction("keep", keep, keep if isinstance(keep, Tensor) else torch.empty(0))
        check.ignored(ignore_index, group)
        check.process_group(vocab_group, "vocab_group")
        check_options(label_smoothing, softcap, logit_scale, chunk_rows)
        self.keep = keep
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.per_sample = per_sample
        self.group = group
        self.chunk_rows = chunk_rows
        self.vocab_group = vocab_group

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
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            per_sample=self.per_sample,
            group=self.group,
            chunk_rows=self.chunk_rows,
            vocab_group=self.vocab_group,
        )

    def extra_repr(self) -> str:
        return f"keep={self.keep}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
