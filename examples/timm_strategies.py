"""Each of the five strategies in a training with timm's model, mixup, optimizer and schedule, on digits.

    python examples/timm_strategies.py --strategy trimming

Needs ``pip install timm 'batchkern[train]'``. Mixup's targets are probabilities, which every loss here takes.
"""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
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


def tensors(images: Any) -> TensorDataset:
    return TensorDataset(F.interpolate(images.images.float() / 255 - 0.5, 32), images.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["none", "trimming", "hard-batches", "stepwise", "augmentation", "passive"]
    parser.add_argument("--strategy", choices=choices, default="trimming")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    strategy, epochs, batch = options.strategy, options.epochs, 32

    torch.manual_seed(0)
    train, test = map(tensors, data.load_pair("digits"))
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)

    sampler: Any = EpochBatchSampler(len(train), batch, drop_last=True)  # mixup wants an even number of images
    if strategy == "hard-batches":
        sampler = HardBatchSampler(len(train), batch, delta=0.2, drop_last=True)
    if strategy == "stepwise":
        sampler = SubsetSampler(len(train), batch, epochs, drop_last=True)
    loss_of = BatchLoss(
        sampler=sampler if strategy == "hard-batches" else None,
        virtual=VirtualSamples(model, gaussian=4, dropout=4) if strategy == "augmentation" else None,
    )
    head = SecondHead(model, 2, train[:2][0]) if strategy == "passive" else None
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    schedule: Any = CosineLRScheduler(optimizer, t_initial=epochs)
    if strategy == "stepwise":
        schedule = StepwiseLR(optimizer, sampler)
    mixup = Mixup(mixup_alpha=0.2, num_classes=10, label_smoothing=0.0)
    loader: Any = WholeEpochs(DataLoader(train, batch_sampler=sampler))
    if strategy == "passive":
        patches = tensors(data.match_shape(data.load("photo-patches"), (1, 8, 8)))
        loader = inject(loader, DataLoader(patches, batch, shuffle=True), every=20)

    updates = 0
    for epoch in range(epochs):
        model.train()
        if strategy == "trimming":
            loss_of.keep = linear(1.0, 0.2)(epoch, epochs)
        for taken in loader:
            x, y = taken
            if head is not None and is_passive(taken):
                with head.used_by(taken):
                    loss = F.cross_entropy(model(x), y)
            else:
                x, y = mixup(x, y)
                loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
        schedule.step(epoch + 1) if isinstance(schedule, CosineLRScheduler) else schedule.step()

    model.eval()
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) == y for x, y in DataLoader(test, 128)]).float().mean()
    print(f"{strategy}: {updates} updates, test accuracy {right:.1%}")


if __name__ == "__main__":
    main()
