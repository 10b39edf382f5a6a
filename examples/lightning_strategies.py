"""Each of the five strategies in Lightning's automatic optimization, on the images of scikit-learn's digits.

    python examples/lightning_strategies.py --strategy hard-batches

Needs ``pip install lightning 'batchkern[train]'``. What a strategy adds to an ordinary script is in ``parts``.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from batchkern import data, models
from batchkern.integrations.lightning import KeepSchedule, VaryingEpochs
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


class Digits(lightning.LightningModule):
    def __init__(self, net: nn.Module, loss: BatchLoss, head: SecondHead | None, subsets: SubsetSampler | None) -> None:
        super().__init__()
        self.net, self.loss, self.head, self.subsets = net, loss, head, subsets

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        if self.head is not None and is_passive(batch):
            with self.head.used_by(batch):
                return F.cross_entropy(self.net(x), y)
        return self.loss(self.net(x), y)

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        return ([optimizer], [StepwiseLR(optimizer, self.subsets)]) if self.subsets is not None else optimizer


def parts(strategy: str, net: nn.Module, train: TensorDataset, batch: int, epochs: int, workers: int) -> dict[str, Any]:
    """The loader, the loss, the head, the callbacks of a strategy."""
    made: dict[str, Any] = {"loss": BatchLoss(), "head": None, "callbacks": []}
    sampler: Any = EpochBatchSampler(len(train), batch)
    if strategy == "trimming":
        made["callbacks"] = [KeepSchedule(linear(1.0, 0.2))]
    elif strategy == "hard-batches":
        sampler = HardBatchSampler(len(train), batch, delta=0.2)
        made["loss"] = BatchLoss(sampler=sampler)
    elif strategy == "stepwise":
        sampler = SubsetSampler(len(train), batch, epochs)
    elif strategy == "augmentation":
        made["loss"] = BatchLoss(virtual=VirtualSamples(net, gaussian=4, dropout=4))
    loader: Any = WholeEpochs(DataLoader(train, batch_sampler=sampler, num_workers=workers))
    if strategy == "passive":
        made["head"] = SecondHead(net, 2, train[:2][0])
        patches = data.match_shape(data.load("photo-patches"), tuple(train[0][0].shape))
        loader = inject(loader, DataLoader(tensors(patches), batch, shuffle=True), every=20)
    if strategy in ("stepwise", "passive"):
        made["callbacks"] = [VaryingEpochs(loader)]
    return made | {"loader": loader, "subsets": sampler if strategy == "stepwise" else None}


def tensors(images: Any) -> TensorDataset:
    return TensorDataset(images.images.float() / 255 - 0.5, images.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["none", "trimming", "hard-batches", "stepwise", "augmentation", "passive"]
    parser.add_argument("--strategy", choices=choices, default="trimming")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    lightning.seed_everything(0)
    train, test = map(tensors, data.load_pair("digits"))
    net = models.build("cnn", shape=(1, 8, 8), classes=10)
    made = parts(options.strategy, net, train, 32, options.epochs, options.workers)
    module = Digits(net, made["loss"], made["head"], made["subsets"])
    plain = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=options.epochs, callbacks=made["callbacks"], **plain)
    trainer.fit(module, made["loader"], DataLoader(test, 512))
    print(
        f"{options.strategy}: {trainer.global_step} updates, test accuracy {trainer.callback_metrics['accuracy']:.1%}"
    )


if __name__ == "__main__":
    main()
