"""Each of the five strategies in a loop of ``accelerate``, on a table: scikit-learn's digits as rows of 64 numbers.

    python examples/accelerate_strategies.py --strategy hard-batches --workers 2

Needs ``pip install accelerate 'batchkern[train]'``. ``save_state`` and ``load_state`` take the loader along.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from batchkern import data
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
    is_passive,
)
from batchkern.schedules import linear


def rows(images: Any) -> TensorDataset:
    return TensorDataset(images.images.flatten(1).float() / 255 - 0.5, images.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["none", "trimming", "hard-batches", "stepwise", "augmentation", "passive"]
    parser.add_argument("--strategy", choices=choices, default="trimming")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    strategy, epochs, batch = options.strategy, options.epochs, 32

    set_seed(0)
    accelerator = Accelerator(cpu=True)
    train, test = map(rows, data.load_pair("digits"))
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    sampler: Any = EpochBatchSampler(len(train), batch)
    if strategy == "hard-batches":
        sampler = HardBatchSampler(len(train), batch, delta=0.2)
    if strategy == "stepwise":
        sampler = SubsetSampler(len(train), batch, epochs)
    loss_of = BatchLoss(
        sampler=sampler if strategy == "hard-batches" else None,
        virtual=VirtualSamples(model, gaussian=4, dropout=4) if strategy == "augmentation" else None,
    )
    head = SecondHead(model, 2) if strategy == "passive" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    schedule = StepwiseLR(optimizer, sampler) if strategy == "stepwise" else None
    model, optimizer, prepared = accelerator.prepare(
        model, optimizer, DataLoader(train, batch_sampler=sampler, num_workers=options.workers)
    )
    loader: Any = WholeEpochs(prepared)  # accelerate reads a batch ahead, workers several
    if strategy == "passive":
        patches = rows(data.match_shape(data.load("photo-patches"), (1, 8, 8)))
        loader = inject(loader, accelerator.prepare(DataLoader(patches, batch, shuffle=True)), every=20)
    accelerator.register_for_checkpointing(loader)
    if loss_of.virtual is not None:
        accelerator.register_for_checkpointing(loss_of.virtual)

    updates = 0
    for epoch in range(epochs):
        if strategy == "trimming":
            loss_of.keep = linear(1.0, 0.2)(epoch, epochs)
        for taken in loader:
            x, y = taken
            if head is not None and is_passive(taken):
                with head.used_by(taken):
                    loss = F.cross_entropy(model(x), y)
            else:
                loss = loss_of(model(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            updates += 1
        if schedule is not None:
            schedule.step()

    model.eval()
    with torch.no_grad():
        x, y = test[:]
        print(f"{strategy}: {updates} updates, test accuracy {(model(x).argmax(1) == y).float().mean():.1%}")


if __name__ == "__main__":
    main()
