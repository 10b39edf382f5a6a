"""The time of a training in the trainer, compared with that of a bare PyTorch loop.

Both alternate, update by update, in one process, so that other load on the machine affects them equally. A round is a
whole short training, always from the same weights. A ratio is that of the sums of a round; medians are over rounds.
"""

from __future__ import annotations

import copy
import gc
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchkern import models
from batchkern.data import ImageData, TensorImages, load, load_pair
from batchkern.plan import Batch, EpochBatches
from batchkern.strategies import Step, Strategy, parse
from batchkern.trainer import Trainer
from batchkern.updater import Counts
from bench.devices import quantiles

PHOTOS = "photo-patches"
DATA = os.environ.get("BATCHKERN_BENCH_DATA", PHOTOS)
"""A data set of 32 x 32 images, such as CIFAR-10 in a parquet file; the default comes with scikit-learn."""
BATCHES = 5
"""The number of batches in an epoch: with delta = 0.2, five is the fewest of which one is a hard batch."""
EPOCHS = 5
"""Enough for Stepwise, of which each step takes one epoch, and for trimming, which reaches its last fraction in the
last."""
MIN_ROUNDS = 3
COMPACT = "trimming(start=0.2,end=0.2,backward=compact)"
NO_NORM = " without batch norm"
OPTIMIZER = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Case:
    strategy: str
    """Written as on the command line."""
    model: str
    target: float | None = None
    """The target: the largest ratio that is acceptable."""
    batch_size: int = 64


CASES = [
    Case("baseline", "resnet8", target=0.85),
    Case("trimming", "resnet8"),
    Case(COMPACT, "resnet8"),
    Case("hard-batches", "resnet8"),
    Case("stepwise", "resnet8"),
    Case("augmentation", "resnet8"),
    Case("passive(every=5)", "resnet8"),
    Case("random", "resnet8"),
    Case("cutout", "resnet8"),
    Case("mixup", "resnet8"),
    Case("cutmix", "resnet8"),
    Case("batch-augmentation(copies=2)", "resnet8"),
    Case("srip", "resnet8"),
    Case("infobatch", "resnet8"),
    Case("selective-backprop", "resnet8"),
    Case("importance(threshold=0)", "resnet8"),
    Case("rho(fraction=0.5,reference_epochs=1)", "resnet8"),
    Case("small-loss", "resnet8"),
    Case("baseline", "resnet8" + NO_NORM),
    Case(COMPACT, "resnet8" + NO_NORM, target=0.55),
    Case("baseline", "cnn", target=0.8),
    Case(COMPACT, "cnn"),
]


class BareLoop:
    """The plain baseline in well-written PyTorch: images in memory, on the device, and nothing logged."""

    def __init__(self, model: nn.Module, data: TensorImages, batch_size: int, device: torch.device) -> None:
        self.model = model.to(device).train()
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        mean, std = data.statistics()
        self.scale = (1 / (255 * std)).view(-1, 1, 1).to(device)
        self.shift = (-mean / std).view(-1, 1, 1).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), **OPTIMIZER)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=EPOCHS * BATCHES)
        self.batch_size = batch_size
        self.batches = self._batches()

    def _batches(self) -> Iterator[Tensor]:
        order = torch.Generator().manual_seed(0)
        while True:
            yield from torch.randperm(len(self.images), generator=order).to(self.images.device).split(self.batch_size)

    def update(self) -> Tensor:
        rows = next(self.batches)
        images = self.images[rows].float().mul_(self.scale).add_(self.shift)
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(images), self.labels[rows])
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


@dataclass
class Stopwatch(Strategy):
    """Times every update of a training, and an update of the bare loop beside each active one.

    An update is everything that the trainer does from one batch to the next: planning, bookkeeping, checking for
    Ctrl-C. An evaluation follows the last update of an epoch; for that update the trainer's own training time is used.
    """

    name: ClassVar[str] = "stopwatch"

    bare: BareLoop
    device: torch.device
    counts: Counts = field(default_factory=Counts)
    """The counts of the trainer, set when it exists."""
    seconds: list[float] = field(default_factory=list)
    bare_seconds: list[float] = field(default_factory=list)

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            started = self._now()
            batch = next(upstream, None)
            planning = self._now() - started
            if batch is None:
                return
            # The two go first alternately, so that each finds the caches as the other has left them equally often.
            turn = None if batch.inject else len(self.bare_seconds) % 2
            if turn == 0:
                self._time_bare()
            counted, started = self.counts.seconds, self._now()
            yield batch
            elapsed = self._now() - started
            self.seconds.append(planning + (self.counts.seconds - counted if batch.ends_epoch else elapsed))
            if turn == 1:
                self._time_bare()

    def _time_bare(self) -> None:
        started = self._now()
        self.bare.update()
        self.bare_seconds.append(self._now() - started)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class CountedImages(ImageData):
    """Images that are loaded when their batch is due, like those of a large data set, and that are counted."""

    def __init__(self, data: ImageData) -> None:
        super().__init__(data.labels, data.classes, data.shape, data.name)
        self.data = data
        self.loaded = 0

    def rows(self, indices: Tensor) -> Tensor:
        self.loaded += len(indices)
        return self.data.rows(indices)

    def reshaped(self, shape: tuple[int, int, int]) -> CountedImages:
        return self if shape == self.shape else CountedImages(self.data.reshaped(shape))

    def _selected(self, positions: Tensor) -> CountedImages:
        return CountedImages(self.data.select(positions))


@dataclass
class LoadCount(Strategy):
    """Counts the images that the updates of a training load, without those of its evaluations.

    After the last update the training set is loaded once more, for an evaluation; the passive set is not.
    """

    name: ClassVar[str] = "load count"

    train: CountedImages
    passive: CountedImages
    active: int = 0

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        self.train.loaded = self.passive.loaded = 0  # the statistics of the images were computed
        return upstream

    def observe(self, step: Step, losses: Tensor) -> None:
        self.active = self.train.loaded

    @property
    def loaded(self) -> int:
        return self.active + self.passive.loaded


def build(name: str, data: ImageData) -> nn.Module:
    """A built-in model, or one of them with all normalisation taken out."""
    whole = name.removesuffix(NO_NORM)
    model = models.build(whole, shape=data.shape, classes=len(data.classes))
    if whole != name:
        for module in list(model.modules()):
            for key, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, key, nn.Identity())
    return model


def _first(data: ImageData, count: int) -> TensorImages:
    """The first images, in memory. If there are fewer than ``count``, some are repeated."""
    rows = torch.arange(count) % len(data)
    return TensorImages(data.rows(rows), data.labels[rows], data.classes, name=Path(data.name).name)


class Trainings:
    """Trainings of one case, all from the same weights on the same data."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        # Only the images that are needed are decoded, and evaluations are not measured.
        train, test = load_pair(DATA, image_size=32, memory_limit=0)
        self.train, self.test = _first(train, BATCHES * case.batch_size), _first(test, 8)
        self.passive = load(PHOTOS)
        torch.manual_seed(0)
        self.model = build(case.model, self.train)

    def trainer(self, train: ImageData, passive: ImageData, observer: Strategy) -> Trainer:
        return Trainer(
            copy.deepcopy(self.model),
            train,
            self.test,
            strategies=[*parse(self.case.strategy, passive=passive), observer],
            epochs=EPOCHS,
            batch_size=self.case.batch_size,
            channels_last=True,  # as for a model by name; the bare loop has torch's default layout
            device=self.device,
            progress=False,
            **OPTIMIZER,
        )

    def images_loaded(self) -> int:
        """The number of images that the updates of a training load if the data are not in memory."""
        count = LoadCount(CountedImages(self.train), CountedImages(self.passive))
        self.trainer(count.train, count.passive, count).fit()
        return count.loaded

    def round(self) -> Stopwatch:
        """A training, timed."""
        stopwatch = Stopwatch(
            BareLoop(copy.deepcopy(self.model), self.train, self.case.batch_size, self.device), self.device
        )
        trainer = self.trainer(self.train, self.passive, stopwatch)
        stopwatch.counts = trainer.counts
        gc.collect()
        gc.disable()  # a collection would be timed as part of one of the two
        try:
            trainer.fit()
        finally:
            gc.enable()
        return stopwatch


def measure(case: Case, device: torch.device, budget: float) -> dict[str, Any]:
    """The row of a case, from rounds of ``budget`` seconds, at least ``MIN_ROUNDS``. Ratios are of the trainer to the
    bare loop: below 1 the trainer is the faster one."""
    trainings = Trainings(case, device)
    loaded = trainings.images_loaded()  # first, because it warms up the code that the rounds use
    rounds: list[Stopwatch] = []
    end = time.monotonic() + budget
    while len(rounds) < MIN_ROUNDS or time.monotonic() < end:
        rounds.append(trainings.round())
    seconds = [sum(r.seconds) / EPOCHS for r in rounds]
    # A strategy may make fewer updates than the bare loop: an epoch of the bare loop is BATCHES of its mean updates.
    bare = [statistics.fmean(r.bare_seconds) * BATCHES for r in rounds]
    per_epoch = statistics.median(seconds)
    bare_per_epoch = statistics.median(bare)
    return {
        "strategy": case.strategy,
        "model": case.model,
        "data": trainings.train.name,
        "images": len(trainings.train),
        "batch_size": case.batch_size,
        "updates": sum(len(r.seconds) for r in rounds),
        "rounds": len(rounds),
        "seconds_per_epoch": per_epoch,
        "samples_per_s": rounds[0].counts.samples_seen / EPOCHS / per_epoch,
        "bare_seconds_per_epoch": bare_per_epoch,
        "bare_samples_per_s": len(trainings.train) / bare_per_epoch,
        "ratio": quantiles([ours / theirs for ours, theirs in zip(seconds, bare)]),
        "images_loaded_per_epoch": loaded / EPOCHS,
        "target": case.target,
    }
