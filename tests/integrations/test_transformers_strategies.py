"""The strategies in transformers.Trainer: the weights of the trainer, with accumulation, killed and resumed too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from trained import EPOCHS, STRATEGIES, Logits, Named, Parts, assert_trained, end_workers, keep, parts
from training import SHAPE, single_thread

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from transformers import Trainer, TrainingArguments

from batchkern.errors import UserError
from batchkern.integrations.transformers import KeepSchedule, OutputLoss, StrategiesMixin
from batchkern.parts.passive import mark_passive

one_thread = single_thread()


class MyTrainer(StrategiesMixin, Trainer):
    pass


def trainer(name: str, made: Parts, folder: Path, **options: Any) -> MyTrainer:
    plain = {"num_train_epochs": EPOCHS, "max_grad_norm": 0.0, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    # An evaluation records nothing, and has no penalty to ask for.
    plain |= {"eval_strategy": "epoch", "label_names": ["labels"]}
    if name in ("stepwise", "passive"):  # epochs of several lengths
        plain["max_steps"] = made.updates
    arguments = TrainingArguments(folder, disable_tqdm=True, remove_unused_columns=False, **plain | options)
    held_out = Named(torch.randn(9, *SHAPE), torch.arange(9) % 4)
    schedule = made.schedule or torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda _: 1.0)
    return MyTrainer(
        Logits(made.model),
        arguments,
        optimizers=(made.optimizer, schedule),
        callbacks=[KeepSchedule(keep, made.loss)] if name == "trimming" else [],
        compute_loss_func=OutputLoss(made.loss),
        eval_dataset=held_out,
        loader=made.loader,
        second_head=made.head,
    )


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("workers", [0, 2])
def test_weights_are_those_of_the_trainer(name: str, workers: int, tmp_path: Path) -> None:
    made = parts(name, workers, rows=Named)
    mine = trainer(name, made, tmp_path)
    mine.train()
    assert mine.state.global_step == made.updates
    assert_trained(name, made)
    end_workers(made)


@pytest.mark.parametrize("name", STRATEGIES)
def test_killed_and_resumed(name: str, tmp_path: Path) -> None:
    made = parts(name, rows=Named)
    stop = made.updates // 2 + 1

    class Killed(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = control.should_training_stop = state.global_step == stop

    first = trainer(name, made, tmp_path, save_strategy="steps")
    first.add_callback(Killed())
    first.train()
    made = parts(name, rows=Named)
    second = trainer(name, made, tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert second.state.global_step == made.updates
    assert_trained(name, made)


def test_micro_batches_weigh_by_their_labels(tmp_path: Path) -> None:
    """Of text, some of whose labels are ignored."""
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(config).eval()
    tokens, labels = torch.randint(30, (8, 6)), torch.randint(3, (8, 6))
    labels[:3, 2:] = -100
    rows = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
    plain = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
    gradients = torch.autograd.grad(plain, list(model.parameters()), allow_unused=True)
    seen: list[Any] = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **options: Any) -> None:
            seen.append([None if p.grad is None else p.grad.clone() for p in options["model"].parameters()])

    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_grad_norm=0.0,
        save_strategy="no",
        gradient_accumulation_steps=2,
    )
    for dropout in [x for x in model.modules() if isinstance(x, torch.nn.Dropout)]:
        dropout.p = 0.0
    batches = torch.utils.data.DataLoader(rows, batch_size=4)
    loss = OutputLoss(lambda logits, target: F.cross_entropy(logits, target))
    MyTrainer(model, arguments, compute_loss_func=loss, loader=batches, callbacks=[Watch()]).train()
    for ours, expected in zip(seen[0], gradients, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_passive_batch_is_that_of_all_its_rows_by_the_second_head(tmp_path: Path) -> None:
    made = parts("passive", rows=Named)
    mine, rows = trainer("passive", made, tmp_path), Named(torch.randn(6, *SHAPE), torch.arange(6) % 3)
    made.loss.keep = 0.2
    assert made.head is not None
    batch = mark_passive(torch.utils.data.default_collate([rows[i] for i in range(6)]))
    expected = batch["labels"]
    loss = mine.compute_loss(mine.model.eval(), batch, num_items_in_batch=12)
    with made.head.used_by(batch):
        logits = made.model(rows.tensors[0])
    torch.testing.assert_close(loss, F.cross_entropy(logits, expected) / 2)


def test_what_is_refused(tmp_path: Path) -> None:
    made = parts("passive", rows=Named)
    made.head, head = None, made.head
    with pytest.raises(UserError, match="second_head must be given for passive batches"):
        trainer("passive", made, tmp_path).train()
    assert head is not None
    mine = trainer("trimming", parts("trimming", rows=Named), tmp_path)
    with pytest.raises(UserError, match=r"has no batchkern\.pt, with the place in the training data"):
        mine._load_optimizer_and_scheduler(str(tmp_path))
    made = parts("trimming", rows=Named)
    with pytest.raises(ValueError, match="or have a trimmed loss in it, for a schedule of keep"):
        KeepSchedule(keep).on_step_begin(
            None, type("S", (), {"global_step": 0, "max_steps": 1}), None, model=made.model
        )
