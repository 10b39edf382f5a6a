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
"""Owned by mixup and cutmix, which mix images, and by rho, which needs unmixed images; a run has at most one of
them."""


MOST = 1e6
"""The largest alpha; far above it, the Beta distribution can no longer be sampled."""


def check_alpha(alpha: float) -> None:
    check_range("alpha", alpha, 0, MOST, open_low=True)


def mix(own: Tensor, others: Tensor, weight: float) -> Tensor:
    """``own`` with ``weight`` and ``others`` with the rest."""
    return weight * own + (1 - weight) * others


@dataclass
class Mixup(Strategy):
    """Each image of a batch is mixed with another image of the batch, and their targets are mixed as probabilities.

    x = lambda x_i + (1 - lambda) x_j and y = lambda y_i + (1 - lambda) y_j, with one lambda ~ Beta(alpha, alpha) for
    the whole batch, and j from a random permutation of the batch, as the authors draw pairs. The cross entropy with y
    is lambda times that with y_i plus 1 - lambda times that with y_j, which is the form in the authors' code.

    Args:
        alpha: above 0. Near 0, images are hardly mixed; at 1, lambda is uniform. The paper uses 0.2 on ImageNet and 1
            on CIFAR.

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
