"""Selective-Backprop: A. H. Jiang, D. L.-K. Wong, G. Zhou, D. G. Andersen, J. Dean, G. R. Ganger, G. Joshi,
M. Kaminsky, M. Kozuch, Z. C. Lipton, P. Pillai, "Accelerating Deep Learning by Focusing on the Biggest Losers", 2019
(arXiv:1910.00762), Algorithm 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from batchkern.plan import Batch, EpochBatches
from batchkern.saved_state import saved_number, saved_tensor
from batchkern.seeding import generator
from batchkern.strategies.base import Run, Step, Strategy
from batchkern.validation import check_range, count


@dataclass
class SelectiveBackprop(Strategy):
    """Each sample gets a forward pass, and is trained on with a probability that grows with the rank of its loss.

    The probability is CDF(loss)^beta, where CDF is the cumulative distribution of the last R losses, including those of
    the sample's own batch; on average 1 / (1 + beta) of the samples are selected. Selected samples are collected until
    they fill a batch, which is then trained on with a new forward pass. Samples left over at the end of an epoch are
    kept for the next one; those left over at the end of the training are not trained on. An epoch is one forward pass
    of each sample.

    Two interpretations. The losses of a batch enter the distribution before its ranks are taken, as in the authors'
    program. That program also trains on every sample of the first epoch, and on the samples left over at the end of
    each epoch; the algorithm of the paper does neither, and nor does this class. The random crop of a sample in the
    update differs from the one that was scored.

    Args:
        beta: at least 0; 0 selects all, 1 half of them, 2 a third.
        history: R, the number of losses in the distribution.
        at_random: the control: select the same number of samples of each batch, but at random.

    Examples:
        >>> import torch
        >>> from batchkern.strategies import SelectiveBackprop
        >>> from batchkern.trainer import Trainer
        >>> data = torch.arange(64.0).view(64, 1), torch.arange(64) // 32
        >>> trainer = Trainer("mlp", data, data, strategies=[SelectiveBackprop(beta=1.0)], epochs=4, batch_size=16)
        >>> costs = trainer.fit()
        >>> costs["samples_seen"], costs["samples_backward"] < 256  # all are scored, some are trained on
        (256, True)
    """

    name: ClassVar[str] = "selective-backprop"
    owns = frozenset({"the batch plan", "the copies of a batch"})

    beta: float = 1.0
    history: int = 1024
    at_random: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.beta = check_range("beta", self.beta, 0, 100)
        self.history = count("history", self.history, 1)

    def setup(self, run: Run) -> None:
        self.scored = 0
        self.losses = torch.zeros(0, dtype=torch.float32)
        """The last R losses, oldest first."""
        self.waiting = torch.zeros(0, dtype=torch.int64)
        """Rows of the training set that were selected but not trained on yet."""
        self.rows, self.batches = run.rows, run.epochs * run.batches_per_epoch

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        size = batches.batch_size
        while self.scored < self.batches:
            epoch, place = divmod(self.scored, batches.per_epoch)
            progress = self.scored / self.batches
            if len(self.waiting) >= size:
                rows, self.waiting = self.waiting[:size], self.waiting[size:]
                yield Batch(rows, epoch, progress, ends_epoch=False, only="update")
            else:
                rows = batches.indices(self.scored)
                self.scored += 1
                yield Batch(rows, epoch, progress, ends_epoch=place + 1 == batches.per_epoch, only="score")

    def observe(self, step: Step, losses: Tensor) -> None:
        if step.batch.only != "score":
            return
        losses = losses.float().cpu()
        self.losses = torch.cat([self.losses, losses])[-self.history :]
        ranks = torch.searchsorted(self.losses.sort().values, losses, right=True)
        numbers = generator(step.run.seed, "selected", self.scored)
        selected = torch.rand(len(losses), generator=numbers) < (ranks / len(self.losses)) ** self.beta
        if self.at_random:
            selected = selected[torch.randperm(len(losses), generator=numbers)]
        self.waiting = torch.cat([self.waiting, step.batch.indices[selected]])

    def state_dict(self) -> dict[str, Any]:
        return {"scored": self.scored, "losses": self.losses, "waiting": self.waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scored = saved_number(state, "scored", self.batches)
        losses, waiting = state["losses"], state["waiting"]
        if len(losses) > self.history:
            raise ValueError(f"losses are {len(losses)}, which must be at most {self.history}")
        self.losses = saved_tensor(state, "losses", self.losses.new_zeros(len(losses)))
        self.waiting = saved_tensor(state, "waiting", self.waiting.new_zeros(len(waiting)))
        if len(waiting) and not 0 <= int(waiting.min()) <= int(waiting.max()) < self.rows:
            raise ValueError(f"waiting has rows that are not among the {self.rows} rows of the training set")
