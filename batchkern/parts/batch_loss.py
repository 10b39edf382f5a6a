"""A loss that combines three strategies: the hardest rows, recorded batch losses, the penalty of virtual samples."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from batchkern.errors import UserError
from batchkern.ops import TrimmedCrossEntropyLoss, cross_entropy
from batchkern.parts.samplers import HardBatchSampler
from batchkern.parts.virtual_samples import VirtualSamples


class BatchLoss(TrimmedCrossEntropyLoss):
    """Cross entropy of the hardest rows, plus a penalty, for one batch; the loss of the batch is recorded.

    Call it once for each batch of the training set, with logits ``(..., C)`` and a target as ``trimmed_cross_entropy``
    takes them. In evaluation mode, and without gradients, it is only the mean cross entropy of all rows.

    Args:
        keep: fraction of the rows that count, which are the hardest, in (0, 1]; it may be reassigned between steps.
        sampler: records the mean loss of all rows of each batch.
        virtual: virtual samples, whose penalty is added to the loss; for sequences, over the positions that count.
        ignore_index, label_smoothing, class_weight, group: as for ``trimmed_cross_entropy``.

    Examples:
        >>> import torch
        >>> from batchkern.parts import BatchLoss
        >>> criterion = BatchLoss(keep=0.5)
        >>> logits = torch.tensor([[1.0, 1.0], [1.0, 3.0]]).log().requires_grad_()  # losses 0.6931 and 1.3863
        >>> round(float(criterion(logits, torch.tensor([0, 0])).detach()), 4)  # the hardest half
        1.3863
        >>> round(float(criterion.eval()(logits, torch.tensor([0, 0])).detach()), 4)  # all rows
        1.0397
    """

    def __init__(
        self,
        keep: float | Tensor = 1.0,
        *,
        sampler: HardBatchSampler | None = None,
        virtual: VirtualSamples | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            keep,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            per_sample=True,
            group=group,
        )
        for name, part, kind in (("sampler", sampler, HardBatchSampler), ("virtual", virtual, VirtualSamples)):
            if not isinstance(part, kind | None):
                raise UserError(f"{name} must be a {kind.__name__}, got {type(part).__name__}")
        self.sampler = sampler
        self.virtual = virtual

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if not self.training or not torch.is_grad_enabled():
            smoothing, weight = self.label_smoothing, self.class_weight
            mean: Tensor = cross_entropy(
                logits, target, weight=weight, ignore_index=self.ignore_index, label_smoothing=smoothing
            )
            return mean
        loss, losses = super().forward(logits, target)
        counts = None if target.is_floating_point() else target != self.ignore_index
        if self.sampler is not None:
            rows = losses.numel() if counts is None else counts.sum().clamp(min=1)
            self.sampler.record(losses.sum() / rows)
        return loss if self.virtual is None else loss + self.virtual.penalty(self._positions(counts))

    def _positions(self, counts: Tensor | None) -> Tensor | None:
        """For sequences, which positions count, even if the target was flattened; None if each sample has one row."""
        shape = self.virtual.shape if self.virtual is not None else None
        return None if counts is None or shape is None or len(shape) < 2 else counts.view(shape)
