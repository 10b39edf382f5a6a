"""One loss for what strategies ask of it: the hardest rows, the record of a batch, the penalty of virtual samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from batchkern.ops import TrimmedCrossEntropyLoss
from batchkern.parts.samplers import HardBatchSampler
from batchkern.parts.virtual_samples import VirtualSamples


class BatchLoss(TrimmedCrossEntropyLoss):
    """Cross entropy of the hardest rows, plus a penalty, for one batch; the loss of the batch is recorded.

    Args:
        keep: fraction of the rows that count, the hardest; it may be reassigned between steps.
        sampler: is told the mean loss of all rows of the batch.
        virtual: its penalty is added.
        options: ``ignore_index``, ``label_smoothing``, ``class_weight``, ``group``, as of ``trimmed_cross_entropy``.

    Call it once a batch of the training set, with logits ``(B, C)`` and a target, as ``trimmed_cross_entropy``.
    """

    def __init__(
        self,
        keep: float | Tensor = 1.0,
        *,
        sampler: HardBatchSampler | None = None,
        virtual: VirtualSamples | None = None,
        **options: Any,
    ) -> None:
        super().__init__(keep, per_sample=True, **options)
        self.sampler = sampler
        self.virtual = virtual

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss, losses = super().forward(logits, target)
        if self.sampler is not None:
            counted = losses.numel() if target.is_floating_point() else (target != self.ignore_index).sum()
            self.sampler.record(losses.sum() / counted)
        return loss if self.virtual is None else loss + self.virtual.penalty()
