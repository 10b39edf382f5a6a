"""Batch augmentation: E. Hoffer, T. Ben-Nun, I. Hubara, N. Giladi, T. Hoefler, D. Soudry, "Augment your batch: better
training with larger batches", 2019 (arXiv:1901.09335), equation 3."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from batchkern.plan import Batch, EpochBatches
from batchkern.strategies.base import Run, Strategy
from batchkern.validation import count


@dataclass
class BatchAugmentation(Strategy):
    """Each sample of a batch is in it several times, each time with a transformation of its own.

    A batch of B samples becomes one of ``copies * B`` images, whose losses are averaged; the number of updates and the
    learning rate stay those of batches of B. The transformations are those of the trainer (``augment``) and of other
    strategies, such as :class:`Cutout`.

    Args:
        copies: M, how often each sample is in the batch, at least 2.

    Examples:
        >>> import torch
        >>> from batchkern.strategies import BatchAugmentation, Cutout
        >>> from batchkern.trainer import Trainer
        >>> data = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8), torch.arange(64) // 32
        >>> strategies = [BatchAugmentation(copies=4), Cutout()]
        >>> trainer = Trainer("cnn", data, data, strategies=strategies, epochs=1, batch_size=16)
        >>> trainer.fit()["samples_seen"]  # each of 64 images four times
        256
    """

    name: ClassVar[str] = "batch-augmentation"
    owns = frozenset({"the copies of a batch"})

    copies: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.copies = count("copies", self.copies, 2)

    def setup(self, run: Run) -> None:
        if not run.images_vary:
            warnings.warn(
                "BatchAugmentation: the copies of an image are all the same, because augment is 'none' and no strategy "
                "changes images; use augment='crop+flip', say, or Cutout() beside it",
                stacklevel=2,
            )

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        for batch in upstream:
            yield self._copied(batch) if batch.inject is None else batch

    def _copied(self, batch: Batch) -> Batch:
        ahead = tuple(rows.repeat(self.copies) for rows in batch.ahead)
        return replace(batch, indices=batch.indices.repeat(self.copies), ahead=ahead)
