"""Rounds over fixed batches: over the hardest ones (S. Sahayam, J. Zakkam, U. Jayaraman, "Can we learn better with hard
samples?", 2023, arXiv:2304.03486, Algorithm 2), or over random ones, for comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from batchkern.errors import UserError
from batchkern.ops import BatchLedger
from batchkern.plan import Batch, EpochBatches, Replay
from batchkern.seeding import generator
from batchkern.validation import check_number


def check_delta(delta: float) -> None:
    if not 0 < check_number("delta", delta) <= 1:
        raise UserError(f"delta must be in (0, 1], got {delta}")


def check_delta_of(delta: float, batches: int) -> None:
    if math.floor(delta * batches) < 1:
        raise UserError(f"delta={delta} selects none of {batches} batches; it must be at least {1 / batches:.4g}")


def check_order(order: str) -> None:
    if order not in ("loss", "index"):
        raise UserError(f"order must be loss or index, got {order!r}")


class HardRounds:
    """One epoch over N fixed batches, then rounds over the hardest of them by their last recorded loss.

    Args:
        batches: N.
        delta: fraction of the batches in a round.
        order: ``"loss"``: by descending loss. ``"index"``: as in the first epoch.
        device: the device of the losses.
    """

    def __init__(self, batches: int, delta: float, order: str, device: torch.device | str | None = None) -> None:
        check_delta(delta)
        check_delta_of(delta, batches)
        check_order(order)
        self.delta, self.order = delta, order
        self.ledger = BatchLedger(batches, device=device)
        self.replay = Replay()

    def plan(self, batches: EpochBatches) -> Iterator[Batch]:
        return self.replay.plan(batches, self._hardest)

    def _hardest(self, round: int) -> list[int]:
        chosen: list[int] = self.ledger.rank(self.delta).tolist()
        return chosen if self.order == "loss" else sorted(chosen)

    def record(self, number: int, loss: Tensor) -> None:
        self.ledger.update(number, loss)

    def state_dict(self) -> dict[str, Any]:
        return {"ledger": self.ledger.state_dict(), "replay": self.replay.state_dict()}

    def load_state_dict(self, state: dict[str, Any], epochs: int) -> None:
        self.ledger.load_state_dict(state["ledger"])
        self.replay.load_state_dict(state["replay"], len(self.ledger), epochs)


class RandomRounds:
    """One epoch over N fixed batches, then rounds over random ones of them.

    Args:
        batches: N.
        delta: fraction of the batches in a round.
    """

    def __init__(self, batches: int, delta: float, seed: int) -> None:
        check_delta(delta)
        check_delta_of(delta, batches)
        self.batches, self.delta, self.seed = batches, delta, seed
        self.replay = Replay()

    def plan(self, batches: EpochBatches) -> Iterator[Batch]:
        return self.replay.plan(batches, self._random)

    def _random(self, round: int) -> list[int]:
        order = torch.randperm(self.batches, generator=generator(self.seed, "random batches", round))
        return order[: int(self.delta * self.batches)].tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"replay": self.replay.state_dict()}

    def load_state_dict(self, state: dict[str, Any], epochs: int) -> None:
        self.replay.load_state_dict(state["replay"], self.batches, epochs)
