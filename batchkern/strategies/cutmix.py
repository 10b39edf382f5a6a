"""CutMix: S. Yun, D. Han, S. J. Oh, S. Chun, J. Choe, Y. Yoo, "CutMix: Regularization Strategy to Train Strong
Classifiers with Localizable Features", ICCV 2019 (arXiv:1905.04899), section 3.1 and the appendix's pseudo-code."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from batchkern.errors import UserError
from batchkern.seeding import derived_seed, generator
from batchkern.strategies.base import Fetch, Run, Step, Strategy, as_probabilities
from batchkern.strategies.mixup import MIXING, check_alpha, mix

Box = tuple[int, int, int, int]
"""(y1, x1, y2, x2); the second corner is exclusive."""


def box_of(height: int, width: int, weight: float, y: float, x: float) -> Box:
    """The box around (y, x) with 1 - ``weight`` of the area, rounded to pixels and clipped to the image."""
    ratio = math.sqrt(1 - weight)
    half_y, half_x = height * ratio / 2, width * ratio / 2
    return (
        round(max(y - half_y, 0)),
        round(max(x - half_x, 0)),
        round(min(y + half_y, height)),
        round(min(x + half_x, width)),
    )


def paste(images: Tensor, others: Tensor, box: Box) -> tuple[Tensor, float]:
    """``images (B, C, H, W)`` with the ``box`` of ``others``, and the fraction of the area that is not replaced."""
    y1, x1, y2, x2 = box
    pasted = images.clone()
    pasted[:, :, y1:y2, x1:x2] = others[:, :, y1:y2, x1:x2]
    return pasted, 1 - (y2 - y1) * (x2 - x1) / (images.shape[2] * images.shape[3])


@dataclass
class CutMix(Strategy):
    """A box of each image is replaced by the same box of another image of the batch; targets are mixed by the area.

    lambda ~ Beta(alpha, alpha), the box with 1 - lambda of the area and its uniformly drawn centre are shared by the
    whole batch; the other image comes from a random permutation of the batch. The box is rounded to pixels and clipped
    at the border, and lambda is then set to the fraction of the area that remains. In the authors' code, the centre is
    a whole pixel and half the side of the box is rounded down.

    Args:
        alpha: above 0; at 1, the value of the paper, lambda is uniform.
        probability: probability that a batch is mixed at all, in (0, 1]; the paper's code uses 0.5 on CIFAR and 1 on
            ImageNet.

    Examples:
        >>> from batchkern.strategies import CutMix, Cutout, parse
        >>> strategies = [CutMix(probability=0.5), Cutout(size=8)]  # Trainer(..., strategies=strategies)
        >>> parse("cutmix(probability=0.5)+cutout(size=8)") == strategies  # on the command line
        True
    """

    name: ClassVar[str] = "cutmix"
    owns = MIXING

    alpha: float = 1.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self.alpha)
        if not 0 < self.probability <= 1:
            raise UserError(f"probability must be in (0, 1], got {self.probability}")

    def setup(self, run: Run) -> None:
        run.require(self.name, images=True)

    def transform(
        self, step: Step, positions: Tensor, images: Tensor, target: Tensor, fetch: Fetch
    ) -> tuple[Tensor, Tensor]:
        box = self._box(step)
        if box is None:
            return images, target
        seed, rows = step.run.seed, len(step.batch.indices)
        partners = torch.randperm(rows, generator=generator(seed, "cutmix partners", step.update))
        others, their_target = fetch(partners[positions])
        images, weight = paste(images, others, box)
        own, theirs = (as_probabilities(t, step.run.classes) for t in (target, their_target))
        return images, mix(own, theirs, weight)

    def _box(self, step: Step) -> Box | None:
        """The box of this batch; ``None`` if it is not mixed."""
        numbers = random.Random(derived_seed(step.run.seed, "cutmix box", step.update))
        if numbers.random() >= self.probability:
            return None
        assert step.run.shape is not None
        _, height, width = step.run.shape
        weight = numbers.betavariate(self.alpha, self.alpha)
        return box_of(height, width, weight, height * numbers.random(), width * numbers.random())
