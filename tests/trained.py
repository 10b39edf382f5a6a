"""Trainings of the trainer with one strategy each, and what another loop needs to end in the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import SHAPE, RecordingTrainer, images, net, normalised, sgd, trainer

from batchkern.parts import (
    BatchLoss,
    EpochBatchSampler,
    HardBatchSampler,
    SecondHead,
    StepwiseLR,
    SubsetSampler,
    VirtualSamples,
    WholeEpochs,
    inject,
)
from batchkern.schedules import linear
from batchkern.seeding import derived_seed
from batchkern.strategies import HardBatches, PassiveInjection, Stepwise, StochasticAugmentation, Strategy, Trimming

ROWS, SIZE, EPOCHS, EVERY, SEED = 46, 6, 3, 3, 5
PER_EPOCH = 8
NOISE = {"omega": 0.7, "sigma": 0.6, "tau": 1.0, "eta": 0.5}
PASSIVE = images(26, seed=3, classes=3)
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "trimming": lambda: Trimming(1.0, 0.4),
    "hard-batches": lambda: HardBatches(0.4),
    "stepwise": lambda: Stepwise((0.5, 1.0), (1, 2)),
    "augmentation": lambda: StochasticAugmentation(**NOISE, vote=False),  # type: ignore[arg-type]
    "passive": lambda: PassiveInjection(PASSIVE, EVERY),
}


@cache
def run(name: str) -> RecordingTrainer:
    """A finished training."""
    made = trainer([STRATEGIES[name]()], net(norm=True), images(ROWS), epochs=EPOCHS, batch_size=SIZE, seed=SEED)
    made.fit()
    return made


class Logits(nn.Module):
    """The model for trainers that call it by the names of a dataset's columns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


@dataclass
class Parts:
    """All that a loop needs."""

    model: nn.Module
    loader: Any
    loss: BatchLoss
    optimizer: torch.optim.Optimizer
    schedule: Any = None
    head: SecondHead | None = None
    updates: int = EPOCHS * PER_EPOCH


def keep(update: int, updates: int = EPOCHS * PER_EPOCH) -> float:
    """Trimming's, which is that of an epoch."""
    return linear(1.0, 0.4)(min(update, updates - 1) // PER_EPOCH, EPOCHS)


class Named(torch.utils.data.Dataset):
    """Rows as Transformers takes them."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"x": self.tensors[0][row], "labels": self.tensors[1][row]}


def parts(name: str, workers: int = 0, prepare: Callable[[Any], Any] = lambda x: x, rows: Any = TensorDataset) -> Parts:
    """For a loop with that strategy. ``rows``: how a dataset gives them."""
    of = run(name)
    model = copy.deepcopy(of.initial).train()
    sampler: Any = {
        "hard-batches": lambda: HardBatchSampler(ROWS, SIZE, delta=0.4, seed=SEED),
        "stepwise": lambda: SubsetSampler(ROWS, SIZE, EPOCHS, fractions=(0.5, 1.0), batch_multiples=(1, 2), seed=SEED),
    }.get(name, lambda: EpochBatchSampler(ROWS, SIZE, seed=SEED))()
    data = rows(normalised(of.feed.data), of.feed.data.labels)
    loader: Any = DataLoader(data, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    loader = WholeEpochs(prepare(loader))
    head = virtual = None
    if name == "augmentation":
        virtual = VirtualSamples(model, seed=SEED, **NOISE)  # type: ignore[arg-type]
    if name == "passive":
        head = SecondHead(model, 3, torch.zeros(2, *SHAPE))
        head.layers.load_state_dict(of.initial_extras["passive_head"].state_dict())
        others = EpochBatchSampler(len(PASSIVE), SIZE)
        others.batches.seed = derived_seed(SEED, "passive")
        passive = DataLoader(rows(normalised(PASSIVE), PASSIVE.labels), batch_sampler=others)
        loader = inject(loader, WholeEpochs(passive), EVERY)
    hard = sampler if name == "hard-batches" else None
    made = Parts(model, loader, BatchLoss(sampler=hard, virtual=virtual), sgd(model), head=head)
    if name == "stepwise":
        made.schedule, made.updates = StepwiseLR(made.optimizer, sampler), sampler.updates
    if name == "passive":
        made.updates += made.updates // EVERY
    return made


def assert_trained(name: str, made: Parts) -> None:
    """The weights are those of the trainer, and not those it began with."""
    if made.head is not None:
        made.head.detach()
    of = run(name)
    expected, ours = of.model.state_dict(), made.model.state_dict()
    assert list(ours) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-6)
    moved = [float((value - of.initial.state_dict()[key]).abs().max()) for key, value in expected.items()]
    assert max(moved) > 1e-2


def end_workers(made: Parts) -> None:
    """Now, and not when the garbage of a trainer is collected, in which they would be waited for."""
    whole = made.loader.loader if isinstance(made.loader, inject) else made.loader
    whole.loader._iterator = None
