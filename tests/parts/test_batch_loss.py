"""Loops made of the parts end in the weights of the trainer, with workers, with accelerate, killed and resumed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from trained import STRATEGIES, Parts, assert_trained, keep, parts
from training import single_thread

from batchkern.errors import UserError
from batchkern.parts import BatchLoss, EpochBatchSampler, HardBatchSampler, VirtualSamples, is_passive

one_thread = single_thread()


def train(made: Parts, begin: int = 0, stop: int | None = None) -> int:
    """A loop of one's own; the number of updates."""
    update = begin
    while update < made.updates:
        for batch in made.loader:
            x, y = batch
            if made.head is not None and is_passive(batch):
                with made.head.used_by(batch):
                    loss = F.cross_entropy(made.model(x), y)
            else:
                loss = made.loss(made.model(x), y)
            made.optimizer.zero_grad()
            loss.backward()
            made.optimizer.step()
            if made.schedule is not None:
                made.schedule.step()
            update += 1
            if update == stop:
                return update
    return update


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_of_ones_own_ends_in_the_weights_of_the_trainer(name: str, workers: int) -> None:
    made = parts(name, workers)
    keep_of(name, made)
    assert train(made) == made.updates
    assert_trained(name, made)


def keep_of(name: str, made: Parts, begin: int = 0) -> None:
    """Trimming's keep before each update, as a schedule would set it."""
    if name == "trimming":
        loss, count = made.loss, iter(range(begin + 1, 1000))
        loss.keep = keep(begin)
        made.optimizer.register_step_post_hook(lambda *_: setattr(loss, "keep", keep(next(count))))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("workers", [0, 2])
def test_prepared_by_accelerate(name: str, workers: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    made = parts(name, workers, prepare=accelerator.prepare)
    keep_of(name, made)
    train(made)
    assert_trained(name, made)


@pytest.mark.parametrize(("name", "stop"), [(name, 13) for name in STRATEGIES] + [("passive", 4), ("hard-batches", 8)])
def test_killed_and_resumed(name: str, stop: int) -> None:
    first = parts(name, 2)
    keep_of(name, first)
    train(first, stop=stop)
    states = copy.deepcopy([stateful.state_dict() for stateful in resumable(first)])
    second = parts(name, 2)
    for stateful, state in zip(resumable(second), states, strict=True):
        stateful.load_state_dict(state)
    keep_of(name, second, stop)
    train(second, stop)
    assert_trained(name, second)


def resumable(made: Parts) -> list[Any]:
    found = [made.model, made.optimizer, made.loader, made.schedule, made.loss.virtual]
    return [stateful for stateful in found if stateful is not None]


def test_the_loss_that_is_recorded_is_the_mean_of_all_rows_that_count() -> None:
    sampler, logits = HardBatchSampler(12, 6, delta=1.0), torch.randn(6, 5, 4)
    target = torch.randint(4, (6, 5))
    target[0, :3] = -100
    loss = BatchLoss(0.5, sampler=sampler)
    batches = iter(sampler)
    next(batches)
    flat = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    kept = flat[target.flatten() != -100]
    torch.testing.assert_close(loss(logits.flatten(0, 1), target.flatten()), kept.topk(14).values.mean())
    next(batches)
    soft = torch.rand(6, 4).softmax(1)
    torch.testing.assert_close(
        loss(logits[:, 0], soft), F.cross_entropy(logits[:, 0], soft, reduction="none").topk(3)[0].mean()
    )
    torch.testing.assert_close(
        sampler.rounds.ledger.losses, torch.stack([kept.mean(), F.cross_entropy(logits[:, 0], soft)])
    )


def test_in_evaluation_it_is_the_mean_of_all_rows_and_nothing_else() -> None:
    sampler, model, x = HardBatchSampler(12, 6, delta=0.5), torch.nn.Linear(5, 3), torch.randn(6, 5)
    loss = BatchLoss(0.3, sampler=sampler, virtual=VirtualSamples(model, omega=0.0), label_smoothing=0.1)
    target = torch.randint(3, (6,))
    expected = F.cross_entropy(model.eval()(x), target, label_smoothing=0.1)
    torch.testing.assert_close(loss.eval()(model(x), target), expected)
    with torch.no_grad():
        torch.testing.assert_close(loss.train()(model(x), target), expected)
    assert sampler.rounds.ledger.losses.isinf().all()


def test_of_sequences_the_penalty_is_over_the_positions_that_count() -> None:
    model = torch.nn.Linear(6, 4)
    virtual = VirtualSamples(model, omega=0.0, seed=1)
    x, target = torch.randn(5, 3, 6), torch.randint(4, (5, 3))
    target[:2, 1:] = -100
    logits = model(x).flatten(0, 1)
    loss = BatchLoss(virtual=virtual)(logits, target.flatten())
    virtual.passes = 0
    model(x)
    expected = F.cross_entropy(logits, target.flatten()) + virtual.penalty(target != -100)
    torch.testing.assert_close(loss, expected)


def test_a_batch_without_a_label_that_counts_does_not_rank_hardest() -> None:
    sampler = HardBatchSampler(12, 6, delta=0.5)
    next(iter(sampler))
    BatchLoss(sampler=sampler)(torch.randn(6, 3, requires_grad=True), torch.full((6,), -100))
    assert sampler.rounds.ledger.losses.min() == 0


def test_wrong_parts() -> None:
    with pytest.raises(UserError, match="sampler must be a HardBatchSampler, got EpochBatchSampler"):
        BatchLoss(sampler=EpochBatchSampler(12, 6))  # type: ignore[arg-type]
