"""The strategies in Lightning's automatic optimization: the weights of the trainer, killed and resumed too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from trained import EPOCHS, STRATEGIES, Parts, assert_trained, end_workers, keep, parts
from training import SHAPE, single_thread

pytest.importorskip("lightning")

import lightning

from batchkern.integrations.lightning import KeepSchedule, VaryingEpochs
from batchkern.parts import is_passive

one_thread = single_thread()


class Module(lightning.LightningModule):
    def __init__(self, made: Parts) -> None:
        super().__init__()
        self.net, self.loss, self.made = made.model, made.loss, made

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        if self.made.head is not None and is_passive(batch):
            with self.made.head.used_by(batch):
                return F.cross_entropy(self.net(x), y)
        return self.loss(self.net(x), y)

    def validation_step(self, batch: Any, index: int) -> None:
        """Records nothing, and has no penalty to ask for."""
        x, y = batch
        assert self.loss(self.net(x), y) > 0

    def configure_optimizers(self) -> Any:
        if self.made.schedule is None:
            return self.made.optimizer
        return {"optimizer": self.made.optimizer, "lr_scheduler": {"scheduler": self.made.schedule, "interval": "step"}}


class Count(lightning.Callback):
    def __init__(self) -> None:
        self.epochs = self.batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def on_train_epoch_end(self, *_: Any) -> None:
        self.epochs += 1


class Killed(lightning.Callback):
    """After a checkpoint within an epoch."""

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)
            raise InterruptedError


def fit(name: str, made: Parts, folder: Path, *others: Any, **options: Any) -> Count:
    counted = Count()
    own = {"trimming": lambda: [KeepSchedule(keep)], "hard-batches": list, "augmentation": list}
    callbacks = [counted, *own.get(name, lambda: [VaryingEpochs(made.loader)])(), *others]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    plain = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "enable_checkpointing": False}
    resume = options.pop("ckpt_path", None)
    trainer = lightning.Trainer(default_root_dir=folder, callbacks=callbacks, **quiet, **plain | options)
    held_out = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(9, *SHAPE), torch.arange(9) % 4), 5
    )
    trainer.fit(Module(made), made.loader, held_out, ckpt_path=resume)
    return counted


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("workers", [0, 2])
def test_weights_are_those_of_the_trainer(name: str, workers: int, tmp_path: Path) -> None:
    made = parts(name, workers)
    counted = fit(name, made, tmp_path)
    assert (counted.epochs, counted.batches) == (EPOCHS, made.updates)
    assert_trained(name, made)
    end_workers(made)


@pytest.mark.parametrize("name", STRATEGIES)
def test_killed_and_resumed(name: str, tmp_path: Path) -> None:
    made, file = parts(name), tmp_path / "stopped.ckpt"
    stop = made.updates // 2 + 1
    with pytest.raises(InterruptedError):
        fit(name, made, tmp_path, Killed(stop, file))
    made = parts(name)
    counted = fit(name, made, tmp_path, ckpt_path=file)
    assert counted.batches == made.updates - stop
    assert_trained(name, made)
