"""A patched model in a LightningModule: three steps equal those of a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain_loop as plain
import pytest
import torch

import batchkern
from batchkern.schedules import linear

pytest.importorskip("lightning")
pytest.importorskip("transformers")

import lightning

from batchkern.integrations.lightning import KeepSchedule


class Module(lightning.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=plain.RATE)


class FromLogits(Module):
    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.model(input_ids=batch["input_ids"]).logits.logsumexp(-1).mean()


class Logged(lightning.Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.rows.append({name: float(x) for name, x in trainer.callback_metrics.items()})


class Stream(torch.utils.data.IterableDataset):
    """Examples without a known number."""

    def __iter__(self) -> Any:
        return iter(plain.rows(4))


def fit(module: Any, examples: list[Any], folder: Path, *callbacks: Any, **options: Any) -> Any:
    loader = torch.utils.data.DataLoader(examples, batch_size=4, collate_fn=plain.collate)
    options = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, **options}
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **quiet, **options)
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_three_steps_equal_a_plain_loop(keep: float, tmp_path: Path) -> None:
    model, expected, examples, logged = plain.model(), plain.model(), plain.rows(12), Logged()
    losses = plain.train(expected, plain.batches(examples), [keep] * 3)
    batchkern.patch_causal_lm(model, keep)
    fit(Module(model), examples, tmp_path, logged)
    assert [row["loss"] for row in logged.rows] == pytest.approx(losses, abs=1e-5)
    plain.assert_same_weights(model, expected)


def test_a_schedule_of_keep_counts_optimizer_steps(tmp_path: Path) -> None:
    model, expected, examples, logged = plain.model(), plain.model(), plain.rows(24), Logged()
    untrimmed = float(plain.token_losses(model, plain.batches(examples)[0][0]).mean().detach())
    plain.train(expected, plain.batches(examples, 2), [1.0, 0.6, 0.2])
    batchkern.patch_causal_lm(model, 1.0)
    fit(Module(model), examples, tmp_path, KeepSchedule(linear(1.0, 0.2)), logged, accumulate_grad_batches=2)
    plain.assert_same_weights(model, expected)
    assert logged.rows[0]["untrimmed_loss"] == pytest.approx(untrimmed, abs=1e-5)


def test_what_is_refused(tmp_path: Path) -> None:
    examples = plain.rows(4)
    with pytest.raises(ValueError, match="model must be patched by patch_causal_lm"):
        fit(Module(plain.model()), examples, tmp_path, KeepSchedule(linear(1.0, 0.2)))
    model = plain.model()
    batchkern.patch_causal_lm(model, 0.5)
    with pytest.raises(RuntimeError, match="without labels, by training_step of test_lightning"):
        fit(FromLogits(model), examples, tmp_path)
    with pytest.raises(RuntimeError, match="is trained in evaluation mode, .* call train"):  # which Lightning leaves on
        fit(Module(model.eval()), examples, tmp_path)
    with pytest.raises(ValueError, match="max_steps must be set .*got max_epochs=-1 and max_steps=-1"):
        fit(Module(model), examples, tmp_path, KeepSchedule(linear(1.0, 0.2)), max_epochs=-1)
    with pytest.raises(ValueError, match="max_steps must be set .* no length, got max_epochs=1 and max_steps=-1"):
        fit(Module(model), Stream(), tmp_path, KeepSchedule(linear(1.0, 0.2)))
