"""Batch samplers for ``DataLoader(batch_sampler=...)`` whose pass is one epoch, and a loader that reads such passes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from batchkern.errors import UserError, whole
from batchkern.parts.rounds import HardRounds, RandomRounds
from batchkern.plan import Batch, EpochBatches
from batchkern.seeding import derived_seed

ONE_PASS = (
    "another pass over this loader has begun: only the latest one may continue, so inspect batches before the loop"
)
ENDLESS = 2**40
"""The number of epochs of a sampler for which no number was given."""


class PlannedBatches(Sampler[list[int]]):
    """A batch sampler that follows a plan; one pass is one epoch. A pass that is stopped early continues in the next
    one; two passes cannot run at the same time.

    Raises:
        UserError: an argument is out of its range.
    """

    records = False
    """Whether a batch is finished when its loss is recorded, and not when it is delivered."""

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = False,
        group: dist.ProcessGroup | None = None,
        epochs: int = ENDLESS,
    ) -> None:
        for name, value in (("rows", rows), ("batch_size", batch_size), ("epochs", epochs)):
            if (whole(value) or 0) < 1:
                raise UserError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.group = group
        self.world = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        if min(rows, batch_size) < self.world:
            raise UserError(
                f"rows and batch_size must be at least {self.world}, one for each rank, got {rows} and {batch_size}"
            )
        self.batches = EpochBatches(rows, batch_size, epochs, derived_seed(seed, "order"), self.world, drop_last)
        self.reader: object | None = None
        """The pass of a :class:`WholeEpochs` that is reading: a pass of the sampler may then stop at the end of a
        round."""
        self.in_flight = 0
        """Number of batches that were given to a loader and not delivered yet, while :class:`WholeEpochs` reads."""
        self.epoch_over = False
        """Whether the last batch given to a loader ends an epoch."""
        self._passes = 0
        self._drained = False
        """Whether the pass has no more batches."""
        self._unfinished: deque[tuple[Batch, dict[str, Any]]] = deque()
        """Batches given to a loader and not finished, each with the position in the plan after it."""
        self._finished: dict[str, Any] = {}
        """The position in the plan after the last finished batch, if some batches are not finished."""

    def __iter__(self) -> Iterator[list[int]]:
        if self._drained and not self.in_flight and len(self._unfinished) > 1:
            raise RuntimeError(self.too_early())
        if self._unfinished:  # a pass was stopped early: its unfinished batches are repeated
            self._go_to(self._finished)
        self._unfinished.clear()
        self._drained, self.in_flight = False, 0
        self._passes += 1
        own, stream = self._passes, self._stream()
        for count in itertools.count():
            if self._unfinished and self._needs_losses():
                if self.reader is None:
                    raise RuntimeError(self.too_early())
                self._drained = True
                return
            before = self._place()
            batch = next(stream, None)
            if batch is None:
                if not count:
                    raise RuntimeError(f"the training is over: its sampler was built for {self.batches.epochs} epochs")
                return
            if self.reader is not None or self.records:
                if not self._unfinished:
                    self._finished = before
                self._unfinished.append((batch, self._place()))
                self.in_flight += self.reader is not None
            self.epoch_over = self._drained = batch.ends_epoch
            yield batch.indices.tensor_split(self.world)[self.rank].tolist()
            if own != self._passes:
                raise RuntimeError(ONE_PASS)
            if batch.ends_epoch:
                return

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return self._epoch_of(self._finished if self._unfinished else self._place())

    def batches_of(self, epoch: int) -> int:
        """The number of batches of an epoch."""
        return self.batches.per_epoch

    @property
    def waiting(self) -> int:
        """The number of batches that are not finished."""
        return len(self._unfinished)

    def delivered(self) -> None:
        """Called by :class:`WholeEpochs` when the loader has delivered one more batch."""
        self.in_flight -= 1
        if not self.records:
            self._finish()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch given to a loader, as needed by torchdata's ``StatefulDataLoader``. If a
        loader reads ahead, that batch has not been trained on yet: save the state of :class:`WholeEpochs`, or of that
        loader."""
        return self._state(self._place(), len(self._unfinished))

    def finished_state(self) -> dict[str, Any]:
        """The position after the last finished batch."""
        return self._state(self._finished if self._unfinished else self._place(), 0)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state.

        Raises:
            ValueError: it belongs to another sampler, or losses were missing when it was saved.
        """
        own = self._state(self._place(), 0)
        if state.keys() != own.keys() or state["of"] != own["of"]:
            raise ValueError(f"the state belongs to another sampler: {state.get('of')}, and this one is {own['of']}")
        if state["unfinished"]:
            raise ValueError(
                f"the state was saved before the losses of {state['unfinished']} batches were recorded: save it after "
                "record(), or if a loader reads ahead, save the state of WholeEpochs(loader)"
            )
        self._unfinished.clear()
        self._go_to(state["place"])

    def _state(self, place: dict[str, Any], unfinished: int) -> dict[str, Any]:
        plan = self.batches
        of = {"sampler": type(self).__name__, "rows": plan.rows, "batch_size": plan.batch_size, "order": plan.seed}
        return {"of": of, "place": place, "unfinished": unfinished}

    def _finish(self) -> Batch:
        """Marks the oldest unfinished batch as finished, and returns it."""
        batch, self._finished = self._unfinished.popleft()
        return batch

    def too_early(self) -> str:
        """The error message for a next round that is requested while losses are missing."""
        missing = f"the next batches were requested before the losses of {len(self._unfinished)} were recorded: "
        if self.reader is None:
            return missing + (
                "call record(losses) once for each batch, and if workers or accelerate read ahead, iterate over "
                "WholeEpochs(loader) instead of the loader"
            )
        return missing + (
            "call record(losses) once for each batch; if a trainer reads several micro-batches at once, the numbers of "
            "batches of a round and of an epoch must be multiples of that number"
        )

    # --- what the samplers differ in ---------------------------------------------------------------------------

    def _stream(self) -> Iterator[Batch]:
        return iter(self.batches)

    def _needs_losses(self) -> bool:
        """Whether the next batch can be chosen only after all losses are recorded."""
        return False

    def _place(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def _go_to(self, place: dict[str, Any]) -> None:
        self.batches.load_state_dict(place)

    def _epoch_of(self, place: dict[str, Any]) -> int:
        return int(place["taken"]) // self.batches.per_epoch


class EpochBatchSampler(PlannedBatches):
    """Each epoch a fresh permutation of all rows, cut into batches: the baseline.

    Args:
        rows: number of rows of the data set, at least 1.
        batch_size: number of rows of a batch, of all ranks together, at least 1.
        seed: seed of the order; a ``Trainer`` with the same seed has the same batches.
        drop_last: leave out the last batch of an epoch if it is smaller than the others.
        group: a process group whose ranks share each batch: each rank gets a contiguous part of it. The parts may
            differ in size by one row; a loss with the argument ``group`` then weights them correctly.

    Raises:
        UserError: an argument is out of its range.

    Examples:
        >>> from batchkern.parts import EpochBatchSampler
        >>> batches = list(EpochBatchSampler(rows=5, batch_size=2))
        >>> [len(batch) for batch in batches], sorted(sum(batches, []))
        ([2, 2, 1], [0, 1, 2, 3, 4])
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(rows, batch_size, seed=seed, drop_last=drop_last, group=group)

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return self.batches.per_epoch


class _RoundSampler(EpochBatchSampler):
    """Rounds over the batches of the first epoch."""

    rounds: HardRounds | RandomRounds

    def _stream(self) -> Iterator[Batch]:
        return self.rounds.plan(self.batches)

    def _place(self) -> dict[str, Any]:
        return self.rounds.replay.state_dict()

    def _go_to(self, place: dict[str, Any]) -> None:
        self.rounds.replay.load_state_dict(place, self.batches.per_epoch, self.batches.epochs)

    def _epoch_of(self, place: dict[str, Any]) -> int:
        return int(place["updates"]) // self.batches.per_epoch


class RandomBatchSampler(_RoundSampler):
    """The control of :class:`HardBatchSampler`: rounds of floor(delta * N) random batches.

    Args:
        rows, batch_size, seed, drop_last, group: as :class:`EpochBatchSampler`.
        delta: fraction of the batches in a round, in (0, 1].

    Examples:
        >>> from batchkern.parts import RandomBatchSampler
        >>> sampler = RandomBatchSampler(rows=4, batch_size=1, delta=0.5)
        >>> sorted(list(sampler))  # the first epoch visits all batches
        [[0], [1], [2], [3]]
        >>> a, b, c, d = sampler  # two rounds of two random batches
        >>> a != b, c != d
        (True, True)
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        delta: float = 0.2,
        seed: int = 0,
        drop_last: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(rows, batch_size, seed=seed, drop_last=drop_last, group=group)
        self.rounds = RandomRounds(len(self), delta, seed)


class HardBatchSampler(_RoundSampler):
    """N fixed batches: one epoch over all of them, then rounds over those whose last loss is highest.

    Call :meth:`record` once for each batch that the loader delivered, in their order. A round of floor(delta * N)
    batches can be chosen only when the losses of all batches before it are recorded. With a loader that reads ahead
    this is too early, which is an error, unless the loader is read by :class:`WholeEpochs`. A pass has N batches, which
    is an epoch in the paper's count of updates (eq. 4).

        sampler = HardBatchSampler(len(dataset), 50, delta=0.2)
        for x, y in WholeEpochs(DataLoader(dataset, batch_sampler=sampler, num_workers=2)):
            losses = F.cross_entropy(model(x), y, reduction="none")
            ...  # the update
            sampler.record(losses)

    Args:
        rows, batch_size, seed, drop_last, group: as :class:`EpochBatchSampler`.
        delta: fraction of the batches in a round, in (0, 1].
        order: ``"loss"``: the highest first (Algorithm 2). ``"index"``: as in the first epoch, which is what the
            official code does.

    Source: S. Sahayam, J. Zakkam, U. Jayaraman, "Can we learn better with hard samples?", 2023, Algorithm 2.

    Examples:
        >>> from batchkern.parts import HardBatchSampler
        >>> sampler = HardBatchSampler(rows=4, batch_size=1, delta=0.5)
        >>> for epoch in range(2):
        ...     visited = []
        ...     for rows in sampler:
        ...         visited += rows
        ...         sampler.record(float(rows[0]))  # here the loss of a row is its number
        >>> visited  # in the second epoch: two rounds over the hardest half of the batches
        [3, 2, 3, 2]
    """

    records = True
    rounds: HardRounds

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        delta: float = 0.2,
        order: str = "loss",
        seed: int = 0,
        drop_last: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(rows, batch_size, seed=seed, drop_last=drop_last, group=group)
        self.rounds = HardRounds(len(self), delta, order)

    def record(self, losses: Tensor | float) -> None:
        """Records the losses of the oldest batch without one: a loss for each row of this rank ``(b,)``, or their mean.

        Raises:
            RuntimeError: no batch is waiting for its loss.
            ValueError: the number of losses is not the number of rows of the batch.
        """
        if len(self._unfinished) <= self.in_flight:
            raise RuntimeError("record(losses) was called, but no batch that was delivered is waiting for its loss")
        batch = self._unfinished[0][0]
        losses = torch.as_tensor(losses, dtype=torch.float32).detach()
        rows = len(batch.indices.tensor_split(self.world)[self.rank])
        if losses.dim() and losses.shape != (rows,):
            raise ValueError(f"losses must be of shape ({rows},), one for each row, or (), got {tuple(losses.shape)}")
        mean = losses.mean()
        if self.group is not None:
            mean = mean * (rows / len(batch.indices))
            dist.all_reduce(mean, group=self.group)
        if self.rounds.ledger.losses.device != mean.device:
            self.rounds.ledger.to(mean.device)
        assert batch.number is not None
        self.rounds.record(batch.number, mean)
        self._finish()

    def _needs_losses(self) -> bool:
        replay = self.rounds.replay
        return replay.updates >= len(self) and replay.place == len(replay.order)

    def _state(self, place: dict[str, Any], unfinished: int) -> dict[str, Any]:
        return super()._state(place, unfinished) | {"losses": self.rounds.ledger.losses.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.rounds.ledger.load_state_dict({"losses": state["losses"]})


class WholeEpochs:
    """A loader whose pass is one epoch of its sampler, however far the loader reads ahead.

    With a :class:`HardBatchSampler` it reads the batches of one round from the loader, and starts the next round when
    their losses are recorded. This works with any number of workers and with a loader from ``accelerator.prepare``;
    ``persistent_workers=True`` keeps workers alive between rounds. Its state is the position after the last batch that
    it delivered (with a HardBatchSampler, the last one whose loss was recorded), whatever was read ahead.

    Args:
        loader: a ``DataLoader`` whose ``batch_sampler`` is one of this module.

    Raises:
        UserError: the loader has another batch sampler, or delivers batches out of order.

    Examples:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> from batchkern.parts import HardBatchSampler, WholeEpochs
        >>> sampler = HardBatchSampler(rows=4, batch_size=1, delta=0.5)
        >>> for epoch in range(2):
        ...     for batch in (loader := WholeEpochs(DataLoader(torch.arange(4), batch_sampler=sampler))):
        ...         sampler.record(batch)  # here the loss of a row is its number
        >>> len(loader), sampler.epoch, int(batch)  # the last batch is the second of the hardest
        (4, 2, 2)
    """

    def __init__(self, loader: Any) -> None:
        sampler = getattr(loader, "batch_sampler", None)
        if not isinstance(sampler, PlannedBatches):
            if isinstance(getattr(sampler, "batch_sampler", None), PlannedBatches):
                what = "not wrapped in another one: give the sampler the ranks' group and do not prepare the loader"
            else:
                what = f"such as HardBatchSampler, got {type(sampler).__name__}"
            raise UserError(f"loader must have a batch_sampler of batchkern.parts, {what}")
        if not getattr(loader, "in_order", True):
            raise UserError("loader must deliver batches in order, got in_order=False")
        self.loader = loader
        self.batch_sampler = sampler
        self.sized = hasattr(sampler, "__len__")
        """Whether it has a length. If the length differs between epochs, set it only for a trainer that reads it in
        each epoch."""

    def __iter__(self) -> Iterator[Any]:
        sampler, own = self.batch_sampler, object()
        sampler.reader = own
        try:
            while True:
                for batch in self.loader:
                    if sampler.reader is not own:
                        raise RuntimeError(ONE_PASS)
                    sampler.delivered()
                    yield batch
                if sampler.epoch_over:
                    return
                if sampler.waiting:
                    raise RuntimeError(sampler.too_early())
        finally:
            if sampler.reader is own:
                sampler.reader = None

    def __len__(self) -> int:
        if not self.sized:
            raise TypeError("epochs differ in their number of batches, so there is no len()")
        return self.batch_sampler.batches_of(self.batch_sampler.epoch)

    @property
    def dataset(self) -> Any:
        return self.loader.dataset

    def state_dict(self) -> dict[str, Any]:
        return self.batch_sampler.finished_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch_sampler.load_state_dict(state)
