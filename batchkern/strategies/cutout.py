"""Cutout: T. DeVries, G. W. Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017
(arXiv:1708.04552), section 3.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from batchkern.errors import UserError
from batchkern.seeding import generator
from batchkern.strategies.base import Fetch, Run, Step, Strategy
from batchkern.validation import check_counts


def cut_out(images: Tensor, centres: Tensor, size: int) -> Tensor:
    """``images (B, C, H, W)`` with zeros in a square of ``size`` pixels around each of ``centres (B, 2)``, (y, x).

    The square starts ``size // 2`` pixels before its centre and is clipped to the image.
    """
    height, width = images.shape[2:]

    def within(places: int, centre: Tensor) -> Tensor:
        offset = torch.arange(places, device=images.device) - (centre[:, None] - size // 2)
        return (offset >= 0) & (offset < size)

    rows, columns = within(height, centres[:, 0]), within(width, centres[:, 1])
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


@dataclass
class Cutout(Strategy):
    """A square of each training image, at a random place, is filled with the mean of the training set.

    All pixels of the image are equally likely to be the centre, so part of the square may lie outside. Images are
    already normalised, so the mean of each channel is zero.

    Args:
        size: side of the square in pixels, at most the image's shorter side; default: half of that, which on CIFAR-10
            is 16 as in the paper (it uses 8 on CIFAR-100, 20 on SVHN).

    Examples:
        >>> from batchkern.strategies import Cutout, parse
        >>> strategy = Cutout(size=8)  # Trainer(..., strategies=[strategy])
        >>> parse("cutout(size=8)") == [strategy]  # on the command line
        True
    """

    name: ClassVar[str] = "cutout"
    owns = frozenset({"the mask"})

    size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(size=self.size)

    def setup(self, run: Run) -> None:
        run.require(self.name, images=True, labels=False)
        assert run.shape is not None
        shorter = min(run.shape[1:])
        if self.size is not None and self.size > shorter:
            raise UserError(f"size must be at most {shorter}, the shorter side of the images, got {self.size}")
        self.side = self.size or max(1, shorter // 2)

    def transform(
        self, step: Step, positions: Tensor, images: Tensor, target: Tensor, fetch: Fetch
    ) -> tuple[Tensor, Tensor]:
        numbers, rows = generator(step.run.seed, "cutout", step.update), len(step.batch.indices)
        centres = torch.stack([torch.randint(side, (rows,), generator=numbers) for side in images.shape[2:]], dim=1)
        return cut_out(images, centres[positions].to(images.device), self.side), target
