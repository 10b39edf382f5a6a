"""Mixup: H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018
(arXiv:1710.09412), equation in section 1 and Figure 1a."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from batchkern.seeding import derived_seed, generator
from batchkern.strategies.base import Fetch, Run, Step, Strategy, as_probabilities
from batchkern.validation import check_range

MIXING = frozenset({"whether images are mixed"})
"""What mixup and cutmix both decide, and rho, which needs whole ones."""


MOST = 1e6
"""Of alpha: far above it numbers of that distribution can no longer be drawn."""


def check_alpha(alpha: float) -> None:
    check_range("alpha", alpha, 0, MOST, open_low=True)


def mix(own: Tensor, others: Tensor, weight: float) -> Tensor:
    """``weight`` of ``own``, the rest of ``others``."""
    return weight * own + (1 - weight) * others


@dataclass
class Mixup(Strategy):
    """Each image of a batch is mixed with another one of it, and so are the two targets, as probabilities.

    x = lambda x_i + (1 - lambda) x_j and y = lambda y_i + (1 - lambda) y_j, with lambda ~ Beta(alpha, alpha), one for
    the batch, and j from a random permutation of the batch: the authors' way of drawing pairs. The cross entropy with
    y is lambda times that with y_i plus 1 - lambda times that with y_j, which the authors' code has.

    Args:
        alpha: above 0; near 0 hardly anything is mixed, at 1 lambda is uniform. The paper takes 0.2 on ImageNet and
            1 on CIFAR.

    Examples:
        >>> from batchkern.strategies import CutMix, Mixup
        >>> strategy = Mixup(alpha=1.0)  # Trainer(..., strategies=[strategy])
        >>> sorted(strategy.owns & CutMix.owns)  # both decide this, so a run has one of them at most
        ['whether images are mixed']
    """

    name: ClassVar[str] = "mixup"
    owns = MIXING

    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self.alpha)

    def setup(self, run: Run) -> None:
        run.require(self.name)

    def transform(
        self, step: Step, positions: Tensor, images: Tensor, target: Tensor, fetch: Fetch
    ) -> tuple[Tensor, Tensor]:
        weight, partners = self._draw(step)
        others, their_target = fetch(partners[positions])
        own, theirs = (as_probabilities(t, step.run.classes) for t in (target, their_target))
        return mix(images, others, weight), mix(own, theirs, weight)

    def _draw(self, step: Step) -> tuple[float, Tensor]:
        """Lambda, and the position of each row's partner."""
        seed, update = step.run.seed, step.update
        weight = random.Random(derived_seed(seed, "mixup weight", update)).betavariate(self.alpha, self.alpha)
        return weight, torch.randperm(len(step.batch.indices), generator=generator(seed, "mixup partners", update))
