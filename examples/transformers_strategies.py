"""Each of the five strategies in ``transformers.Trainer``, on text: which module does a line of Python come from?

    python examples/transformers_strategies.py --strategy passive

Needs ``pip install transformers accelerate``. The lines are those of Python's standard library; a small BERT with
random weights reads them byte by byte. What a strategy adds to an ordinary script is in ``parts``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from batchkern.integrations.transformers import KeepSchedule, OutputLoss, StrategiesMixin
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

LENGTH = 48


class MyTrainer(StrategiesMixin, Trainer):
    pass


class Lines(Dataset[dict[str, Any]]):
    """Lines of modules, as bytes, and which module each is of."""

    def __init__(self, *names: str, part: slice = slice(None)) -> None:
        found = [
            ({line.strip() for line in inspect.getsource(importlib.import_module(name)).splitlines()}, label)
            for label, name in enumerate(names)
        ]
        rows = [(line, label) for lines, label in found for line in sorted(lines) if len(line) > 12]
        self.rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))][part]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        line, label = self.rows[row]
        text = line.encode()[:LENGTH].ljust(LENGTH, b"\0")
        ids = torch.tensor(list(text))
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": label}


def parts(strategy: str, model: nn.Module, train: Lines, batch: int, epochs: int) -> dict[str, Any]:
    """What of ``MyTrainer``'s arguments a strategy decides, and the number of updates."""
    head = SecondHead(model, 2) if strategy == "passive" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    sampler: Any = EpochBatchSampler(len(train), batch)
    loss, callbacks = BatchLoss(), []
    if strategy == "trimming":
        callbacks = [KeepSchedule(linear(1.0, 0.2), loss)]
    elif strategy == "hard-batches":
        sampler = HardBatchSampler(len(train), batch, delta=0.2)
        loss = BatchLoss(sampler=sampler)
    elif strategy == "stepwise":
        sampler = SubsetSampler(len(train), batch, epochs)
        schedule = StepwiseLR(optimizer, sampler)
    elif strategy == "augmentation":
        loss = BatchLoss(virtual=VirtualSamples(model, sigma=0.3, tau=0.6))
    loader: Any = WholeEpochs(DataLoader(train, batch_sampler=sampler))
    updates = sampler.updates if strategy == "stepwise" else epochs * len(sampler)
    if strategy == "passive":
        loader = inject(loader, DataLoader(Lines("turtle", "tarfile"), batch, shuffle=True), every=20)
        updates += updates // 20
    return {
        "loader": loader,
        "second_head": head,
        "compute_loss_func": OutputLoss(loss),
        "optimizers": (optimizer, schedule),
        "callbacks": callbacks,
        "updates": updates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["none", "trimming", "hard-batches", "stepwise", "augmentation", "passive"]
    parser.add_argument("--strategy", choices=choices, default="trimming")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    set_seed(0)
    names = ("argparse", "ast", "decimal", "typing")
    train, test = Lines(*names, part=slice(0, 1600)), Lines(*names, part=slice(1600, 2000))
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=256, num_labels=4, max_position_embeddings=LENGTH, **sizes)
    )
    made = parts(options.strategy, model, train, 32, options.epochs)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=made.pop("updates"), use_cpu=True, report_to=[], save_strategy="no", logging_steps=50
        )
        trainer = MyTrainer(model, arguments, **made)
        trainer.train()
    model.eval()
    with torch.no_grad():
        right = [
            (model(batch["input_ids"], batch["attention_mask"]).logits.argmax(1) == batch["labels"]).float()
            for batch in DataLoader(test, 100)
        ]
    print(f"{options.strategy}: {trainer.state.global_step} updates, test accuracy {torch.cat(right).mean():.1%}")


if __name__ == "__main__":
    main()
