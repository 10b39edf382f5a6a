"""Passive batch injection: P. Singh, P. Mazumder, V. P. Namboodiri, "Passive Batch Injection Training Technique:
Boosting Network Performance by Injecting Mini-Batches from a different Data Distribution", 2020 (arXiv:2006.04406),
Algorithm 1."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from batchkern import schedules
from batchkern.data import ImageData, as_labelled, feed_of, load, match_shape
from batchkern.data.labelled import Labelled
from batchkern.errors import UserError
from batchkern.models import frozen_statistics
from batchkern.ops import trimmed_cross_entropy
from batchkern.plan import Batch, EpochBatches
from batchkern.saved_state import saved_number
from batchkern.second_head import CONVOLUTIONS, in_place, second_head
from batchkern.seeding import derived_seed
from batchkern.strategies.base import Run, Step, Strategy

HEAD = "passive_head"


@dataclass
class PassiveInjection(Strategy):
    """After every g-th training batch, a batch of another data set passes through the shared trunk and its own head.

    Active batches are counted over the whole training, so a small data set gets its passive batches too:
    floor(active updates / g) of them. The head is a second copy of the layers that are not shared; it is kept
    beside the model and removed at the end. In an update that does not use a head, the head has no gradient, so the
    optimizer does not change it, neither by momentum nor by weight decay.

    Args:
        passive: the passive set, or the name of a source for ``batchkern.data.load``. It is resized to the shape of the
            training images and normalised by its own statistics.
        every: g, the number of active batches for each passive one; or ``f(active batches so far)`` -> bool.
        batch_size: number of rows of a passive batch; default: the run's batch size.
        freeze_bn: passive batches do not change the running statistics of batch norm. By default both sets change them.
        summed: make one update for the sum of the two losses (eq. 4), instead of two successive updates (Algorithm 1).
        shared: which layers both sets share, as in :func:`batchkern.second_head.second_head`: ``"convolutions"``, as
            in the paper (section IV), ``"all but the classifier"``, or the name of the last module that is shared.

    Examples:
        >>> import torch
        >>> from batchkern.strategies import PassiveInjection
        >>> from batchkern.trainer import Trainer
        >>> data = torch.arange(64.0).view(64, 1), torch.arange(64) // 32
        >>> strategy = PassiveInjection(data, every=3, shared="all but the classifier")
        >>> trainer = Trainer("mlp", data, data, strategies=[strategy], epochs=2, batch_size=16)
        >>> trainer.fit()["passive_updates"]  # after the third and the sixth of eight active batches
        2
    """

    name: ClassVar[str] = "passive"
    owns = frozenset({"the passive head"})

    passive: Any
    every: int | Callable[[int], bool] = 100
    batch_size: int | None = None
    freeze_bn: bool = False
    summed: bool = False
    shared: str = CONVOLUTIONS
    active: int = field(default=0, init=False, repr=False)
    injected: int = field(default=0, init=False, repr=False)
    pending: tuple[int, float, bool, float | None] | None = field(default=None, init=False, repr=False)
    """Epoch, progress, ends_epoch and rate of the active batch after which a passive one is due."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._due = self.every if callable(self.every) else schedules.every(self.every)
        if not isinstance(self.passive, str | os.PathLike):
            self.passive = as_labelled("passive", self.passive)
        if self.batch_size is not None and (type(self.batch_size) is not int or self.batch_size < 1):
            raise UserError(f"batch_size must be a whole number of at least 1, got {self.batch_size!r}")
        if not isinstance(self.shared, str):
            raise UserError(
                f"shared must be the name of a part of the model, such as convolutions, got {self.shared!r}"
            )

    def setup(self, run: Run) -> None:
        data = load(self.passive) if isinstance(self.passive, str | os.PathLike) else self.passive
        data = _fitting(data, run)
        assert data.classes is not None
        self.feed = feed_of(data, data.statistics(), device=run.device)
        size = min(self.batch_size or run.batch_size, len(data))
        if size < run.least_rows:
            raise UserError(
                f"passive batches have {size} rows, but the model's batch norm needs {run.least_rows}: "
                "a larger passive set, or batch_size"
            )
        self.batches = EpochBatches(len(data), size, 1, derived_seed(run.seed, "passive"), run.least_rows)
        self.active, self.injected, self.pending = 0, 0, None
        self.seen, self.correct = 0, torch.zeros((), dtype=torch.int64, device=run.device)  # during the epoch
        example = run.example(2)
        with torch.random.fork_rng(devices=[]):  # all arms of a comparison draw the same numbers later
            torch.manual_seed(derived_seed(run.seed, "passive head"))
            classes = len(data.classes)
            head = second_head(run.model, classes, example, shared=self.shared, classifier=run.classifier)
        self.head = run.extras[HEAD] = head.to(run.device)

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            if self.pending:
                batch, self.pending = self._passive_batch(*self.pending), None
                yield batch
            active = next(upstream, None)
            if active is None:
                return
            scored = active.only == "score"  # without an update
            self.active += not scored
            if not scored and self._due(self.active):
                of_active = active.epoch, active.progress, active.ends_epoch, active.rate
                if self.summed:
                    active = replace(active, beside=self._passive_batch(*of_active))
                else:
                    self.pending = of_active
                    active = replace(active, ends_epoch=False)
            yield active

    def _passive_batch(self, epoch: int, progress: float, ends_epoch: bool, rate: float | None) -> Batch:
        indices = self.batches.indices(self.injected)
        self.injected += 1
        ahead = (self.batches.indices(self.injected),)
        return Batch(indices, epoch, progress, ends_epoch, rate, inject=self._passive_loss, ahead=ahead)

    def _passive_loss(self, step: Step) -> Tensor:
        indices = step.share.take(step.batch.indices)
        self.feed.prepare(indices, None)
        for ahead in step.batch.ahead:
            self.feed.prepare(step.run.ranks.share(len(ahead)).take(ahead), None)
        images, target = self.feed.batch(indices, None)
        model = step.run.model
        with frozen_statistics(model) if self.freeze_bn else nullcontext(), in_place(model, self.head):
            logits = model(images)
        target, ranks = step.share.ignore_filling(target), step.run.ranks
        hits, _ = ranks.gather(step.share, (logits.detach().argmax(1) == target)[None].float(), logits.new_zeros(()))
        self.correct += hits.sum().long()
        self.seen += step.share.rows
        return trimmed_cross_entropy(logits, target, 1.0, group=ranks.group)

    def finish(self, run: Run) -> None:
        self.feed.forget()
        if HEAD in run.extras:  # absent if fit() is called again after the training has ended
            del run.extras[HEAD]

    def diagnostics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """``passive_accuracy``: accuracy on the passive batches of the epoch, each measured before its update."""
        figures: dict[str, float] = {"passive_updates": self.injected}
        if self.seen:
            figures["passive_accuracy"] = float(self.correct) / self.seen
        self.correct.zero_()
        self.seen = 0
        return figures

    def state_dict(self) -> dict[str, Any]:
        names = ("active", "injected", "pending", "seen")
        return {name: getattr(self, name) for name in names} | {"correct": int(self.correct)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.active, self.injected, self.seen = (saved_number(state, name) for name in ("active", "injected", "seen"))
        self.correct.fill_(saved_number(state, "correct", self.seen))
        pending = state["pending"]
        if pending is not None:
            epoch, progress, ends_epoch, rate = pending
            pending = int(epoch), float(progress), bool(ends_epoch), None if rate is None else float(rate)
        self.pending = pending


def _fitting(data: Labelled, run: Run) -> Labelled:
    """``data`` with the input shape of the model."""
    run.require("passive")
    shape = run.shape
    if isinstance(data, ImageData) and shape is not None and len(shape) == 3:
        return match_shape(data, (shape[0], shape[1], shape[2]))
    if data.shape != shape:
        raise UserError(f"passive inputs are of shape {data.shape}, but those of training of shape {shape}")
    if data.classes is None:
        raise UserError(f"passive: {data.name} must have classes, for its head: give from_dataset their names")
    if data.labels is not None:
        data.one_label_each("passive")
    return data
