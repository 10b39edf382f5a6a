"""Which rows make up which batch: the stream that strategies filter, replay and inject into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from batchkern.saved_state import saved_number
from batchkern.seeding import generator

AHEAD = 16
"""The largest number of batches that are read ahead."""


@dataclass(frozen=True)
class Batch:
    """The rows of one update, and how to train on them."""

    indices: Tensor
    """``(b,)`` int64 rows of the training set, or of the strategy's own set if ``inject`` is given."""
    epoch: int
    progress: float
    """Fraction of the training that is done before this batch, in [0, 1)."""
    ends_epoch: bool
    """Whether this is the last batch of its epoch."""
    rate: float | None = None
    """Factor on the base learning rate; ``None`` means the trainer's schedule at ``progress``."""
    number: int | None = None
    """The number of this batch in a fixed set of batches, if there is one."""
    reset_optimizer: bool = False
    """Clear the optimizer's state (momentum) before this update."""
    weights: Mapping[str, Tensor] | None = None
    """A ``state_dict`` of the model to load before this update."""
    inject: Callable[[Any], Tensor] | None = None
    """Computes the loss of a batch that is not from the training set, in place of the trainer. Its argument is the
    :class:`batchkern.strategies.Step` of this batch."""
    beside: Batch | None = None
    """A batch with ``inject`` whose loss is added to the loss of this batch: one update for both."""
    only: Literal["score", "update"] | None = None
    """``"score"``: only a forward pass, whose losses strategies observe, and no update. ``"update"``: an update from
    rows that were scored before, whose losses are already in the figures of the epoch."""
    ahead: tuple[Tensor, ...] = ()
    """Rows of the next batches of the same data, as far as they are already decided, at most :data:`AHEAD` batches.
    This is only a hint for reading ahead; no result depends on it."""


@dataclass
class Window:
    """Gradient accumulation: ``size`` successive batches make one update, their gradients weighted by their rows.

    It is cut short at the end of an epoch, and before a batch that is an update of its own, loads weights or resets the
    optimizer.
    """

    size: int = 1
    batches: int = 0
    rows: int = 0

    def add(self, batch: Batch) -> bool:
        """Whether an update is due with ``batch``."""
        self.batches, self.rows = self.batches + 1, self.rows + len(batch.indices)
        return self.batches == self.size or batch.ends_epoch

    def cut_by(self, batch: Batch) -> bool:
        """Whether an update is due before ``batch``."""
        apart = batch.inject is not None or batch.weights is not None or batch.reset_optimizer
        return apart and self.batches > 0

    def clear(self) -> None:
        self.batches = self.rows = 0


def cut(order: Tensor, size: int, least: int = 1, drop_last: bool = False) -> tuple[Tensor, ...]:
    """``order`` in batches of ``size``. The last one may be smaller. Unless it is the only one, it is merged with the
    one before if it has fewer than ``least`` rows (at most ``size``), or left out with ``drop_last``."""
    batches = order.split(size)
    if drop_last and len(batches) > 1 and len(batches[-1]) < size:
        return batches[:-1]
    if len(batches) > 1 and len(batches[-1]) < least:
        return *batches[:-2], order[size * (len(batches) - 2) :]
    return batches


def count_batches(rows: int, size: int, least: int = 1, drop_last: bool = False) -> int:
    """The number of batches that :func:`cut` makes."""
    return max(1, rows // size) if drop_last else max(1, -(-rows // size) - (0 < rows % size < least))


class EpochBatches:
    """Every epoch a fresh permutation of all rows, cut into batches by :func:`cut`.

    The order is a pure function of (seed, epoch), so the only state is the number of batches taken.
    """

    def __init__(
        self, rows: int, batch_size: int, epochs: int, seed: int, least: int = 1, drop_last: bool = False
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.least = least
        self.drop_last = drop_last
        self.per_epoch = count_batches(rows, batch_size, least, drop_last)
        self.taken = 0
        self._cached: tuple[int, tuple[Tensor, ...]] = (-1, ())

    def epoch(self, epoch: int) -> tuple[Tensor, ...]:
        """The index batches of one epoch."""
        if self._cached[0] != epoch:
            self._cached = epoch, cut(self.order(epoch), self.batch_size, self.least, self.drop_last)
        return self._cached[1]

    def order(self, epoch: int) -> Tensor:
        """All rows, in the order of one epoch."""
        return torch.randperm(self.rows, generator=generator(self.seed, "epoch", epoch))

    def __iter__(self) -> Iterator[Batch]:
        total = self.epochs * self.per_epoch
        while self.taken < total:
            epoch, place = divmod(self.taken, self.per_epoch)
            progress, batches = self.taken / total, self.epoch(epoch)
            self.taken += 1
            indices, ahead = batches[place], batches[place + 1 : place + 1 + AHEAD]
            if not ahead and self.taken < total:
                ahead = (self.indices(self.taken),)
            yield Batch(indices, epoch, progress, ends_epoch=place + 1 == self.per_epoch, ahead=ahead)

    def indices(self, number: int) -> Tensor:
        """The rows of the batch with this number, counted from 0 over all epochs."""
        epoch, place = divmod(number, self.per_epoch)
        return self.epoch(epoch)[place]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = saved_number(state, "taken", self.epochs * self.per_epoch)


class Passes:
    """A plan of epochs, each of which is cut into batches when it begins."""

    def __init__(self) -> None:
        self.epoch = self.place = 0

    def plan(self, epochs: int, cut_epoch: Callable[[int], Sequence[Tensor]]) -> Iterator[Batch]:
        """``cut_epoch(epoch)`` returns the index batches of an epoch, at least one. It is called again for the same
        epoch if the training is resumed within it."""
        while self.epoch < epochs:
            index_batches = cut_epoch(self.epoch)
            while self.place < len(index_batches):
                progress = (self.epoch + self.place / len(index_batches)) / epochs
                indices = index_batches[self.place]
                self.place += 1
                ends_epoch = self.place == len(index_batches)
                ahead = tuple(index_batches[self.place : self.place + AHEAD])
                yield Batch(indices, self.epoch, progress, ends_epoch, ahead=ahead)
            self.epoch, self.place = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.place = saved_number(state, "epoch"), saved_number(state, "place")


class Replay:
    """One epoch over N fixed batches, then rounds that replay some of them: E * N updates in all.

    The last round is cut short to fit. ``choose(round)`` names the batches of a round, in order.
    """

    def __init__(self) -> None:
        self.updates = 0
        self.round = 0
        self.order: list[int] = []
        self.place = 0

    def plan(self, batches: EpochBatches, choose: Callable[[int], list[int]]) -> Iterator[Batch]:
        fixed = batches.epoch(0)
        total = batches.epochs * len(fixed)
        while self.updates < total:
            if self.updates < len(fixed):
                number = self.updates
            else:
                if self.place == len(self.order):
                    self.order, self.place = choose(self.round), 0
                    self.round += 1
                number = self.order[self.place]
                self.place += 1
            epoch, progress = self.updates // len(fixed), self.updates / total
            self.updates += 1
            ends_epoch = self.updates % len(fixed) == 0
            known = self._known(len(fixed))[: min(AHEAD, total - self.updates)]
            ahead = tuple(fixed[following] for following in known)
            yield Batch(fixed[number], epoch, progress, ends_epoch, number=number, ahead=ahead)

    def _known(self, batches: int) -> Sequence[int]:
        """The numbers of the next batches, up to the next choice of a round."""
        return range(self.updates, batches) if self.updates < batches else self.order[self.place :]

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self), order=list(self.order))

    def load_state_dict(self, state: dict[str, Any], batches: int, epochs: int) -> None:
        """``batches`` is the number N of fixed batches."""
        order = list(state["order"])
        if not all(type(number) is int and 0 <= number < batches for number in order):
            raise ValueError(f"order is {order!r:.40}, which must be numbers of {batches} batches")
        self.updates, self.round = saved_number(state, "updates", epochs * batches), saved_number(state, "round")
        self.order, self.place = order, saved_number(state, "place", len(order))
