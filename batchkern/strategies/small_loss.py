"""Small-loss selection for noisy labels: B. Han, Q. Yao, X. Yu, G. Niu, M. Xu, W. Hu, I. W. Tsang, M. Sugiyama,
"Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels", NeurIPS 2018 (arXiv:1804.06872),
R(T) of Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from batchkern.errors import UserError
from batchkern.ops import select_rows
from batchkern.strategies.base import Step, Strategy, selected_mean
from batchkern.strategies.random_selection import random_rows
from batchkern.strategies.trimming import kept_rows, positions
from batchkern.validation import count


@dataclass
class SmallLoss(Strategy):
    """The loss is the mean over the samples of each batch with the smallest losses: wrong labels are learned last.

    The fraction R(T) = 1 - noise * min(T / warm_up, 1) of a batch is kept, where T is the number of finished epochs.
    The first epoch keeps all samples, as in Algorithm 1, which updates R(T) at the end of an epoch; the authors'
    program is one step ahead. Here a single network selects its own samples; Co-teaching trains two networks, each on
    the samples that the other one selects.

    Args:
        noise: tau, the known or estimated fraction of wrong labels, in [0, 1).
        warm_up: T_k, the number of epochs until the fraction ``noise`` is left out, at least 1.
        at_random: the control: keep the same number of samples, but random ones.

    Examples:
        >>> from batchkern.strategies import SmallLoss
        >>> strategy = SmallLoss(noise=0.5, warm_up=2)  # Trainer(..., strategies=[strategy])
        >>> [strategy.keep(epoch) for epoch in range(4)]
        [1.0, 0.75, 0.5, 0.5]
    """

    name: ClassVar[str] = "small-loss"
    owns = frozenset({"the loss"})

    noise: float = 0.2
    warm_up: int = 10
    at_random: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.noise < 1:
            raise UserError(f"noise must be in [0, 1), got {self.noise}")
        self.warm_up = count("warm_up", self.warm_up, 1)

    def keep(self, epoch: int) -> float:
        """R(T), with ``epoch`` counted from 0."""
        return 1 - self.noise * min(epoch / self.warm_up, 1)

    def narrow(self, step: Step, score: Callable[[], Tensor]) -> Tensor | None:
        step.kept = kept_rows(self.keep(step.batch.epoch), len(step.batch.indices))
        return None

    def loss(self, step: Step, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.at_random:
            chosen = torch.zeros(step.share.rows, dtype=torch.bool).index_fill(0, self._random(step), True)
            return selected_mean(step, logits, target, 1.0, among=step.share.take(chosen))
        return selected_mean(step, logits, target, self.keep(step.batch.epoch), order="lowest")

    def _random(self, step: Step) -> Tensor:
        rows = len(step.batch.indices)
        return random_rows(step, rows, kept_rows(self.keep(step.batch.epoch), rows))

    def kept(self, step: Step, losses: Tensor) -> Tensor | None:
        if self.at_random:
            return self._random(step).to(losses.device)
        keep = self.keep(step.batch.epoch)
        return positions(select_rows(losses, keep, order="lowest"), kept_rows(keep, len(losses)))
