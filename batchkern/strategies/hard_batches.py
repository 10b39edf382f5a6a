"""Hard mini-batches: S. Sahayam, J. Zakkam, U. Jayaraman, "Can we learn better with hard samples?", 2023
(arXiv:2304.03486), Algorithm 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from batchkern.parts.rounds import HardRounds, check_delta, check_order
from batchkern.plan import Batch, EpochBatches
from batchkern.strategies.base import Run, Step, Strategy


@dataclass
class HardBatches(Strategy):
    """N fixed batches: one epoch over all of them records their losses, then rounds replay the hardest.

    Each round replays the top floor(delta * N) batches by their last known loss and refreshes those losses. E * N
    updates in all (eq. 4); the last round is cut short to fit. An epoch, for schedules and evaluation, is N updates.

    Args:
        delta: fraction of the batches replayed in each round, in (0, 1].
        order: ``"loss"``: replayed in descending loss (Algorithm 2). ``"index"``: in the order of the first
            epoch, which is what the official code does.

    Examples:
        >>> import torch
        >>> from batchkern.strategies import HardBatches
        >>> from batchkern.trainer import Trainer
        >>> data = torch.arange(64.0).view(64, 1), torch.arange(64) // 32
        >>> trainer = Trainer("mlp", data, data, strategies=[HardBatches(delta=0.25)], epochs=2, batch_size=16)
        >>> trainer.fit()["updates"]  # as many as the baseline: all four batches, then four rounds of the hardest one
        8
    """

    name: ClassVar[str] = "hard-batches"
    owns = frozenset({"the batch plan"})

    delta: float = 0.2
    order: Literal["loss", "index"] = "loss"
    rounds: HardRounds = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_delta(self.delta)
        check_order(self.order)

    def setup(self, run: Run) -> None:
        self.rounds = HardRounds(run.batches_per_epoch, self.delta, self.order, run.device)
        self.epochs = run.epochs

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        return self.rounds.plan(batches)

    def observe(self, step: Step, losses: Tensor) -> None:
        if step.batch.number is not None:
            self.rounds.record(step.batch.number, losses.mean())

    def state_dict(self) -> dict[str, Any]:
        return self.rounds.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rounds.load_state_dict(state, self.epochs)
