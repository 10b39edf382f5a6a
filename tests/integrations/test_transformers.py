"""A patched model in transformers.Trainer: three steps equal those of a plain loop, and what would go past the patch is
refused."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path
from typing import Any

import plain_loop as plain
import pytest
import torch
import torch.distributed as dist
import warm
from torch import nn
from torch.distributed.fsdp import fully_shard

import batchkern
from batchkern.schedules import linear

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers

from batchkern.integrations.transformers import KeepSchedule, PatchedModelMixin


class Trainer(PatchedModelMixin, transformers.Trainer):
    pass


def trainer(
    model: Any, examples: list[Any], folder: Path, *, kind: type = Trainer, callbacks: Any = None, **options: Any
) -> Any:
    arguments: dict[str, Any] = {
        "optim": "sgd",
        "learning_rate": plain.RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "data_seed": 3,
        "train_sampling_strategy": "sequential",
        **options,
    }
    made = transformers.TrainingArguments(str(folder), **arguments)
    return kind(
        model, made, data_collator=plain.collate, train_dataset=examples, eval_dataset=examples[:8], callbacks=callbacks
    )


@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_three_steps_equal_a_plain_loop(keep: float, tmp_path: Path) -> None:
    model, expected, examples = plain.model(), plain.model(), plain.rows(12)
    losses = plain.train(expected, plain.batches(examples), [keep] * 3)
    batchkern.patch_causal_lm(model, keep)
    trained = trainer(model, examples, tmp_path)
    trained.train()
    assert plain.logged(trained) == pytest.approx(losses, abs=1e-5)
    plain.assert_same_weights(model, expected)


def test_keep_1_is_the_unpatched_trainer(tmp_path: Path) -> None:
    model, unpatched, examples = plain.model(), plain.model(), plain.rows(12)
    trainer(unpatched, examples, tmp_path, kind=transformers.Trainer, gradient_accumulation_steps=3).train()
    batchkern.patch_causal_lm(model, 1.0)
    trainer(model, examples, tmp_path, kind=transformers.Trainer, gradient_accumulation_steps=3).train()
    plain.assert_same_weights(model, unpatched)


def test_accumulation_with_a_micro_batch_without_labels(tmp_path: Path) -> None:
    model, expected, examples = plain.model(), plain.model(), plain.rows(24)
    for example in examples[8:12]:
        example["labels"] = [-100] * 12
    examples[0]["labels"] = [-100] * 8 + examples[0]["labels"][8:]
    losses = plain.train(expected, plain.batches(examples, 2), [0.4] * 3)
    batchkern.patch_causal_lm(model, 0.4)
    trained = trainer(model, examples, tmp_path, gradient_accumulation_steps=2)
    trained.train()
    assert plain.logged(trained) == pytest.approx(losses, abs=1e-5)
    plain.assert_same_weights(model, expected)


def test_a_schedule_of_keep_and_what_is_logged(tmp_path: Path) -> None:
    model, expected, examples = plain.model(), plain.model(), plain.rows(12)
    first = float(plain.token_losses(model, plain.batches(examples)[0][0]).mean().detach())
    plain.train(expected, plain.batches(examples), [1.0, 0.6, 0.2])
    batchkern.patch_causal_lm(model, 1.0)
    trained = trainer(model, examples, tmp_path, callbacks=[KeepSchedule(linear(1.0, 0.2))])
    trained.train()
    plain.assert_same_weights(model, expected)
    assert plain.logged(trained, "keep") == pytest.approx([1.0, 0.6, 0.2])
    assert plain.logged(trained, "untrimmed_loss")[0] == pytest.approx(first, abs=1e-5)
    assert plain.logged(trained, "loss")[2] > plain.logged(trained, "untrimmed_loss")[2] + 0.1


def test_a_schedule_wants_a_patched_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must be patched by patch_causal_lm"):
        trainer(plain.model(), plain.rows(4), tmp_path, callbacks=[KeepSchedule(linear(1.0, 0.2))]).train()


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    model = plain.model()
    batchkern.patch_causal_lm(model, 0.5)
    with pytest.raises(RuntimeError, match="without labels, by compute_loss of transformers.trainer"):
        trainer(model, plain.rows(4), tmp_path, label_smoothing_factor=0.1).train()


def test_evaluation_holds_logits_only_where_they_are_wanted(tmp_path: Path) -> None:
    model, examples = plain.model(), plain.rows(8)
    each = [plain.token_losses(model.eval(), batch).detach() for (batch,) in plain.batches(examples)]
    batchkern.patch_causal_lm(model, 0.5)
    trained = trainer(model, examples, tmp_path)
    held: list[bool] = []
    model.register_forward_hook(lambda module, args, output: held.append(output.logits is not None))
    assert trained.evaluate()["eval_loss"] == pytest.approx(float(torch.cat(each).mean()), abs=1e-5)
    assert held == [False, False]
    assert trained.predict(examples).predictions.shape == (8, 12, plain.WORDS)
    assert held == [False, False, True, True]


def _worker(rank: int, folder: Path, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    results = {}
    for keep in (0.4, 1.0):
        model = plain.model()
        batchkern.patch_causal_lm(model, keep)
        trained = trainer(model, uneven(), folder, ddp_backend="gloo")
        trained.train()
        assert isinstance(trained.model_wrapped, nn.parallel.DistributedDataParallel)
        weights = {name: x.detach() for name, x in model.named_parameters()}
        results["DDP", keep, False] = plain.logged(trained), weights
        for both in (False, True):
            model = plain.model()
            batchkern.patch_causal_lm(model, keep, group=dist.group.WORLD if both else None)
            results["FSDP2", keep, both] = fsdp_steps(model, rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def fsdp_steps(model: Any, rank: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """As Trainer does them on GPUs: on a CPU, accelerate takes DDP in place of FSDP."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=plain.RATE)
    losses = []
    for batches in plain.batches(uneven(), 2):
        count = sum((batch["labels"] != -100).sum() for batch in batches)
        loss = model(**batches[rank], num_items_in_batch=count).loss * 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach() / 2
        dist.all_reduce(loss)
        losses.append(float(loss))
    return losses, {name: x.full_tensor().detach() for name, x in model.named_parameters()}


def uneven() -> list[Any]:
    """Examples for two processes, of which the first has fewer labels."""
    examples = plain.rows(24)
    for example in examples[:4]:
        example["labels"] = [-100] * 8 + example["labels"][8:]
    return examples


@pytest.mark.slow
def test_two_processes_equal_a_plain_loop(tmp_path: Path) -> None:
    """Where they rank their tokens together, too."""
    pairs = plain.batches(uneven(), 2)
    joined = [[{key: torch.cat([batch[key] for batch in pair]) for key in pair[0]}] for pair in pairs]
    expected = {}
    for keep, both in itertools.product((0.4, 1.0), (False, True)):
        model = plain.model()
        losses = plain.train(model, joined if both else pairs, [keep] * 3)
        expected[keep, both] = losses, {name: x.detach() for name, x in model.named_parameters()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    warm.spawn(_worker, 2, tmp_path, port)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == 6
        for (kind, *which), (logged, weights) in found.items():
            losses, theirs = expected[tuple(which)]
            assert logged == pytest.approx(losses, abs=1e-5), kind
            torch.testing.assert_close(weights, theirs, rtol=0, atol=1e-6)
