"""Hard mini-batches: S. Sahayam, J. Zakkam, U. Jayaraman, "Can we learn better with hard samples?", 2023
(arXiv:2304.03486), Algorithm 2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from batchkern.errors import UserError
from batchkern.ops import BatchLedger
from batchkern.plan import Batch, EpochBatches, Replay
from batchkern.strategies.base import Run, Step, Strategy


def check_delta(delta: float) -> None:
    if not 0 < delta <= 1:
        raise UserError(f"delta must be in (0, 1], got {delta}")


def check_delta_of(delta: float, batches: int) -> None:
    if math.floor(delta * batches) < 1:
        raise UserError(f"delta={delta} selects none of {batches} batches; it must be at least {1 / batches:.4g}")


@dataclass
class HardBatches(Strategy):
    """N fixed batches: one epoch over all of them records their losses, then rounds replay the hardest.

    Each round replays the top floor(delta * N) batches by their last known loss and refreshes those losses. E * N
    updates in all (eq. 4); the last round is cut short to fit. An epoch, for schedules and evaluation, is N updates.

    Args:
        delta: fraction of the batches replayed in each round, in (0, 1].
        order: ``"loss"``: replayed in descending loss (Algorithm 2). ``"index"``: in the order of the first
            epoch, which is what the official code does.
    """

    name: ClassVar[str] = "hard-batches"
    owns = frozenset({"the batch plan"})

    delta: float = 0.2
    order: Literal["loss", "index"] = "loss"
    ledger: BatchLedger = field(init=False, repr=False)
    replay: Replay = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_delta(self.delta)
        if self.order not in ("loss", "index"):
            raise UserError(f"order must be loss or index, got {self.order!r}")

    def setup(self, run: Run) -> None:
        check_delta_of(self.delta, run.batches_per_epoch)
        self.ledger = BatchLedger(run.batches_per_epoch, device=run.device)
        self.replay, self.epochs = Replay(), run.epochs

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        return self.replay.plan(batches, self._hardest)

    def _hardest(self, round: int) -> list[int]:
        chosen: list[int] = self.ledger.rank(self.delta).tolist()
        return chosen if self.order == "loss" else sorted(chosen)

    def observe(self, step: Step, losses: Tensor) -> None:
        if step.batch.number is not None:
            self.ledger.update(step.batch.number, losses.mean())

    def state_dict(self) -> dict[str, Any]:
        return {"ledger": self.ledger.state_dict(), "replay": self.replay.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ledger.load_state_dict(state["ledger"])
        self.replay.load_state_dict(state["replay"], len(self.ledger), self.epochs)
