"""What the tests of trainings share: small data, a small model, a trainer that remembers every update.

A strategy's test writes the paper's loop in plain PyTorch and compares the weights after each update. The loop starts
from the trainer's initial weights and asks it only for what is arbitrary: the order of the data and random draws.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchkern.data import ImageData, TensorImages
from batchkern.plan import Batch
from batchkern.strategies import Run, Step, Strategy
from batchkern.trainer import Trainer

CLASSES = 4
SHAPE = (1, 6, 6)
EXACT = 1e-6
"""What weights may differ by where the same thing was computed in another order."""
DIFFERENT = 1e-5
"""What a wrong selection must make them differ by, at the least."""


def images(rows: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE, classes: int = CLASSES) -> TensorImages:
    """Noise around one random picture for each class: learnable, and with losses that differ from row to row."""
    numbers = torch.Generator().manual_seed(1000 + seed)
    centres = torch.randint(60, 196, (classes, *shape), generator=torch.Generator().manual_seed(7))
    labels = torch.randint(classes, (rows,), generator=numbers)
    labels[:classes] = torch.arange(classes)
    pixels = centres[labels] + 60 * torch.randn(rows, *shape, generator=numbers)
    return TensorImages(
        pixels.clamp(0, 255).to(torch.uint8), labels, [str(c) for c in range(classes)], name=f"noise-{rows}-{seed}"
    )


def normalised(data: TensorImages, like: TensorImages | None = None) -> Tensor:
    """All images in [0, 1], less the mean and over the deviation of each channel of ``like``."""
    reference = (like or data).images.double() / 255
    mean = reference.mean(dim=(0, 2, 3), keepdim=True)
    deviation = reference.std(dim=(0, 2, 3), keepdim=True, correction=0)
    return ((data.images.double() / 255 - mean) / deviation).float()


class Net(nn.Module):
    """Two convolutions and two linear layers; batch norm and dropout where asked for."""

    def __init__(self, *, norm: bool = False, dropout: float = 0.0, channels: int = 1, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.hidden = nn.Linear(54, 16)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(16, classes)
        with torch.no_grad():
            self.fc.weight *= 6  # else all losses would start at log(classes), and no selection would mean much

    def early(self, x: Tensor) -> Tensor:
        """Up to the input of ``conv2``."""
        return F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2)

    def late(self, x: Tensor) -> Tensor:
        """From the input of ``conv2`` to that of ``fc``."""
        return self.dropout(F.relu(self.hidden(F.relu(self.conv2(x)).flatten(1))))

    def trunk(self, x: Tensor) -> Tensor:
        return self.late(self.early(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x))


def net(seed: int = 0, **options: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**options)


def flat(module: nn.Module) -> Tensor:
    """Every parameter and buffer, in one float64 vector."""
    return torch.cat([torch.zeros(0).double(), *(t.double().flatten() for t in module.state_dict().values())])


class RecordingTrainer(Trainer):
    """Remembers the weights after every update, those of extra heads beside them, and the rows it was fed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.weights: list[Tensor] = []
        self.heads: list[Tensor] = []
        self.fed: list[Tensor] = []
        super().__init__(*args, **options)
        self.initial = copy.deepcopy(self.model)
        self.initial_extras = copy.deepcopy(self.run.extras)
        batch = self.feed.batch

        def fed(indices: Tensor, step: int | None, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
            if step is not None:  # not where it is only evaluated
                self.fed.append(indices)
            return batch(indices, step, positions)

        self.feed.batch = fed  # type: ignore[method-assign]
        step = self.updater._step

        def recorded() -> None:
            step()
            self.weights.append(flat(self.model))
            self.heads.append(flat(self.run.extras))

        self.updater._step = recorded  # type: ignore[method-assign]


def trainer(
    strategies: Sequence[Strategy] = (),
    model: nn.Module | str | None = None,
    train: ImageData | None = None,
    test: ImageData | None = None,
    **options: Any,
) -> RecordingTrainer:
    defaults = {
        "epochs": 2,
        "batch_size": 8,
        "lr": 0.03,
        "momentum": 0.9,
        "weight_decay": 1e-3,
        "schedule": "constant",
        "device": "cpu",
        "progress": False,
    }
    return RecordingTrainer(
        net() if model is None else model,
        images(44) if train is None else train,
        images(20, seed=1) if test is None else test,
        strategies=strategies,
        **defaults | options,
    )


def sgd(module: nn.Module, lr: float = 0.03, momentum: float = 0.9, weight_decay: float = 1e-3) -> torch.optim.SGD:
    """The optimizer of :func:`trainer`."""
    return torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def furthest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference of any weight after any update; infinite where the numbers of updates differ."""
    if len(ours) != len(theirs):
        return math.inf
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def fake_run(
    rows: int = 44, epochs: int = 2, batch_size: int = 8, seed: int = 0, model: nn.Module | None = None
) -> Run:
    """What a strategy's ``setup`` is given, without a trainer."""
    return Run(
        model=net() if model is None else model,
        shape=SHAPE,
        classes=CLASSES,
        rows=rows,
        epochs=epochs,
        batch_size=batch_size,
        device=torch.device("cpu"),
        seed=seed,
    )


def fake_step(run: Run, *, epoch: int = 0, update: int = 0, rows: int = 8) -> Step:
    """The seams' view of one update."""
    return Step(run, Batch(torch.arange(rows), epoch, epoch / run.epochs, ends_epoch=False), update)


def single_thread() -> Any:
    """An autouse fixture for a test module: with tensors this small, a second thread is only waited for."""

    @pytest.fixture(autouse=True)
    def one_thread() -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

    return one_thread


def without_plots(monkeypatch: Any) -> None:
    """Figures have tests of their own, and take longer than these trainings."""
    monkeypatch.setitem(sys.modules, "batchkern.plots", SimpleNamespace(plot_run=lambda path: None))
