"""InfoBatch: Z. Qin, K. Wang, Z. Zheng, J. Gu, X. Peng, Z. Xu, D. Zhou, L. Shang, B. Sun, X. Xie, Y. You, "InfoBatch:
Lossless Training Speed Up by Unbiased Dynamic Data Pruning", ICLR 2024 (arXiv:2303.04947), section 2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from batchkern.errors import UserError
from batchkern.plan import Batch, EpochBatches, Passes, cut
from batchkern.saved_state import saved_tensor
from batchkern.seeding import generator
from batchkern.strategies.base import Run, Step, Strategy, weighted_mean


@dataclass
class InfoBatch(Strategy):
    """Each epoch leaves out some samples with a loss below the mean; the others of these get a larger weight.

    Before each epoch but the first, a sample whose last known loss is below the mean of all samples is pruned with
    probability r. If it is kept, its loss gets the weight 1 / (1 - r) in the mean over its batch, so that the expected
    sum of the gradients of an epoch is the one for all samples. Such an epoch has fewer updates, each of which is
    larger, N / kept times on average. The last epochs train on all samples. The authors' program prunes exactly the
    fraction r of the samples below the mean.

    Args:
        prune: r, in [0, 1).
        until: delta, a fraction of the epochs in [0, 1]: from epoch floor(until * E) on, counted from 0, nothing is
            pruned, as in the authors' program.
        at_random: the control: prune the same number, but at random among all samples, and give each of the others
            the weight N / kept, so that updates are equally large.

    Examples:
        >>> import torch
        >>> from batchkern.strategies import InfoBatch
        >>> from batchkern.trainer import Trainer
        >>> data = torch.arange(64.0).view(64, 1), torch.arange(64) // 32
        >>> trainer = Trainer("mlp", data, data, strategies=[InfoBatch(until=0.5)], epochs=4, batch_size=16)
        >>> _ = trainer.fit()  # the first epoch and the last two train on all samples
        >>> [row["pruned"] > 0 for row in trainer.history]
        [False, True, False, False]
    """

    name: ClassVar[str] = "infobatch"
    owns = frozenset({"the batch plan", "the loss"})

    prune: float = 0.5
    until: float = 0.875
    at_random: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prune < 1:
            raise UserError(f"prune must be in [0, 1), got {self.prune}")
        if not 0 <= self.until <= 1:
            raise UserError(f"until must be in [0, 1], got {self.until}")

    def setup(self, run: Run) -> None:
        self.whole_from = math.floor(self.until * run.epochs + 1e-9)
        self.passes = Passes()
        self.losses = torch.full((run.rows,), torch.nan, dtype=torch.float32, device=run.device)
        """The last known loss of each sample; NaN if there is none yet."""
        self.weights = torch.ones(run.rows, dtype=torch.float32)
        """The weight of each sample in the current epoch; 0 if it is pruned."""

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        def kept(epoch: int) -> tuple[Tensor, ...]:
            if self.passes.place == 0:
                self.weights = self._drawn(batches.seed, epoch)
            order = batches.order(epoch)
            return cut(order[self.weights[order] > 0], batches.batch_size, batches.least, batches.drop_last)

        return self.passes.plan(batches.epochs, kept)

    def _drawn(self, seed: int, epoch: int) -> Tensor:
        """Draws the sample weights of an epoch."""
        weights = torch.ones_like(self.weights)
        if epoch >= self.whole_from:
            return weights
        losses = self.losses.cpu().double()
        low = losses < losses.nanmean()  # False for a sample without a known loss
        numbers = generator(seed, "pruned", epoch)
        pruned = low & (torch.rand(len(low), generator=numbers) < self.prune)
        if self.at_random:
            pruned = pruned[torch.randperm(len(low), generator=numbers)]
            weights *= len(low) / int((~pruned).sum())
        else:
            weights[low] = 1 / (1 - self.prune)
        return weights.masked_fill(pruned, 0)

    def loss(self, step: Step, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.weights[step.batch.indices]
        if bool((weights == 1).all()):
            return super().loss(step, logits, target)
        return weighted_mean(step, logits, target, weights)

    def observe(self, step: Step, losses: Tensor) -> None:
        rows = step.batch.indices.to(self.losses.device)
        self.losses.scatter_reduce_(0, rows, losses.float(), "amax", include_self=False)

    def diagnostics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """``pruned``: the fraction of the samples left out of the epoch."""
        return {"pruned": float((self.weights == 0).double().mean())}

    def state_dict(self) -> dict[str, Any]:
        return {**self.passes.state_dict(), "losses": self.losses, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes.load_state_dict(state)
        self.losses, self.weights = (
            saved_tensor(state, "losses", self.losses),
            saved_tensor(state, "weights", self.weights),
        )
