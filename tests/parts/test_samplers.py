"""Samplers in the loaders of torch, accelerate and torchdata: the batches of the trainer, whatever reads ahead."""

from __future__ import annotations

import math
import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from batchkern.errors import UserError
from batchkern.parts import EpochBatchSampler, HardBatchSampler, RandomBatchSampler, WholeEpochs
from batchkern.plan import EpochBatches
from batchkern.seeding import derived_seed

ROWS, SIZE, DELTA = 75, 4, 0.3  # 19 batches, rounds of 5
DATA = TensorDataset(torch.arange(ROWS))


def loss_of(rows: list[int], visit: int) -> float:
    """Of a batch: another one each time it is seen, so that a round planned too early is another round."""
    return random.Random(f"{rows} {visit}").random()


class Trained:
    """What a loop trains on, and Algorithm 2 over the same batches in plain Python."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def loss(self, batch: list[int]) -> float:
        self.batches.append(batch)
        return loss_of(batch, self.batches.count(batch))

    @staticmethod
    def expected(epochs: int, seed: int = 0, order: str = "loss") -> list[list[int]]:
        fixed = [x.tolist() for x in EpochBatches(ROWS, SIZE, 1, derived_seed(seed, "order")).epoch(0)]
        total, trained = epochs * len(fixed), Trained()
        losses = [trained.loss(batch) for batch in fixed]
        while len(trained.batches) < total:
            hardest = sorted(range(len(fixed)), key=lambda n: -losses[n])[: math.floor(DELTA * len(fixed))]
            for number in hardest if order == "loss" else sorted(hardest):
                losses[number] = trained.loss(fixed[number])
        return trained.batches[:total]


def hard(**options: Any) -> HardBatchSampler:
    return HardBatchSampler(ROWS, SIZE, delta=DELTA, **options)


def loader(sampler: Any, workers: int = 0, **options: Any) -> DataLoader:
    return DataLoader(DATA, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0, **options)


def train(reader: Any, sampler: HardBatchSampler, trained: Trained, epochs: int, stop: int | None = None) -> list[int]:
    """Passes over ``reader``, to batch ``stop`` of all at most; how many batches each pass had."""
    passes = []
    for _ in range(epochs):
        passes.append(0)
        for (rows,) in reader:
            sampler.record(trained.loss(rows.tolist()))
            passes[-1] += 1
            if len(trained.batches) == stop:
                return passes
    return passes


@pytest.mark.parametrize("order", ["loss", "index"])
def test_a_pass_is_an_epoch_and_rounds_are_of_the_hardest(order: str) -> None:
    sampler, trained = hard(order=order, seed=3), Trained()
    assert train(loader(sampler), sampler, trained, 4) == [19] * 4
    assert trained.batches == Trained.expected(4, seed=3, order=order)
    assert sampler.epoch == 4
    assert len(sampler) == 19


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_read_ahead_see_no_round_before_its_time(workers: int) -> None:
    sampler, trained = hard(), Trained()
    whole = WholeEpochs(loader(sampler, workers, prefetch_factor=3))
    assert train(whole, sampler, trained, 3) == [19] * 3
    assert trained.batches == Trained.expected(3)
    assert len(whole) == 19


def test_a_loader_that_asks_too_early_is_an_error_with_its_remedy() -> None:
    """The counter-example of two workers: they replayed other batches than the hardest, without a word."""
    sampler, trained = hard(), Trained()
    reader = loader(sampler, 2)
    assert train(reader, sampler, trained, 1) == [19]  # all batches of the first epoch are known before it
    with pytest.raises(RuntimeError, match=r"before the losses of \d were recorded: .* WholeEpochs\(loader\)"):
        train(reader, sampler, trained, 1)
    assert trained.batches == Trained.expected(2)[: len(trained.batches)]


def test_accelerate_looks_one_batch_ahead() -> None:
    """The counter-example of accelerate.prepare, which replayed [19, 7, 17, 1]."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    for workers in (0, 2):
        sampler, trained = hard(), Trained()
        prepared = accelerator.prepare(loader(sampler, workers))
        assert train(WholeEpochs(prepared), sampler, trained, 3) == [19] * 3
        assert trained.batches == Trained.expected(3)
    sampler, trained = hard(), Trained()
    with pytest.raises(RuntimeError, match="WholeEpochs"):
        train(accelerator.prepare(loader(sampler)), sampler, trained, 2)
    assert trained.batches == Trained.expected(2)[: len(trained.batches)]


def test_batches_whose_losses_nobody_records() -> None:
    for reader_of in (
        loader,
        lambda sampler: WholeEpochs(loader(sampler)),
        lambda sampler: WholeEpochs(loader(sampler, 2)),
    ):
        sampler = hard()
        reader = reader_of(sampler)
        assert len(list(reader)) == 19
        with pytest.raises(RuntimeError, match=r"before the losses of 19 were recorded: call record\(losses\)"):
            next(iter(reader))
        assert sampler.epoch == 0
    sampler = hard()
    with pytest.raises(RuntimeError, match="no batch that was delivered is waiting for its loss"):
        sampler.record(1.0)


def test_several_batches_taken_at_once_may_not_straddle_a_round() -> None:
    """As a trainer that accumulates gradients takes them."""
    sampler = hard()
    batches = iter(WholeEpochs(loader(sampler)))
    for _ in range(19):
        next(batches)
        sampler.record(1.0)
    batches = iter(WholeEpochs(loader(sampler)))
    for _ in range(5):  # a whole round: fine, if its losses come before the next is asked for
        next(batches)
    with pytest.raises(RuntimeError, match="before the losses of 5 were recorded"):
        next(batches)


@pytest.mark.parametrize("stop", [1, 18, 19, 21, 24, 25, 40])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_goes_on_in_a_round_as_if_never_killed(workers: int, stop: int) -> None:
    sampler, trained = hard(), Trained()
    whole = WholeEpochs(loader(sampler, workers))
    train(whole, sampler, trained, 3, stop)
    state = whole.state_dict()
    train(whole, sampler, Trained(), 1)  # what happens after the state was saved changes nothing
    resumed = hard()
    again = WholeEpochs(loader(resumed, workers))
    again.load_state_dict(state)
    assert resumed.epoch == stop // 19
    train(again, resumed, trained, 3 - resumed.epoch)
    assert trained.batches == Trained.expected(3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_left_early_goes_on(workers: int) -> None:
    sampler, trained = hard(), Trained()
    whole = WholeEpochs(loader(sampler, workers))
    for stop in (3, 17, 23, 38):
        train(whole, sampler, trained, 1, stop)
    assert trained.batches == Trained.expected(2)
    plain = EpochBatchSampler(ROWS, SIZE)
    whole, seen = WholeEpochs(loader(plain, workers)), []
    for stop in (3, 18, 19, 30):
        for (rows,) in whole:
            seen.append(rows.tolist())
            if len(seen) == stop:
                break
    assert seen == planned(2)[:30]


def planned(epochs: int) -> list[list[int]]:
    return [batch.indices.tolist() for batch in EpochBatches(ROWS, SIZE, epochs, derived_seed(0, "order"))]


def test_the_baseline_and_the_control_have_the_batches_of_the_trainer() -> None:
    sampler = EpochBatchSampler(ROWS, SIZE)
    assert [list(sampler), list(sampler)] == [planned(2)[:19], planned(2)[19:]]
    control = RandomBatchSampler(ROWS, SIZE, delta=DELTA, seed=5)
    rounds = [*control, *control][19:]
    fixed = [x.tolist() for x in EpochBatches(ROWS, SIZE, 1, derived_seed(5, "order")).epoch(0)]
    numbers = [fixed.index(batch) for batch in rounds]
    expected: list[int] = []
    for number in range(4):
        place = torch.Generator().manual_seed(derived_seed(5, "random batches", number))
        expected += torch.randperm(19, generator=place)[:5].tolist()
    assert numbers == expected[:19]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stateful_loader_of_torchdata(workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def reader(sampler: Any) -> Any:
        return stateful(DATA, batch_sampler=sampler, num_workers=workers)

    first = reader(EpochBatchSampler(ROWS, SIZE))
    seen = [rows.tolist() for _, (rows,) in zip(range(7), first, strict=False)]
    second = reader(EpochBatchSampler(ROWS, SIZE))
    second.load_state_dict(first.state_dict())
    seen += [rows.tolist() for (rows,) in second]
    assert seen == planned(1)

    sampler, trained = hard(), Trained()
    first = reader(sampler)
    train(first, sampler, trained, 1)
    if workers == 0:
        train(first, sampler, trained, 1, 26)
    state, again = first.state_dict(), hard()
    second = reader(again)
    if workers == 0:
        second.load_state_dict(state)
        train(second, again, trained, 1)
        assert trained.batches == Trained.expected(2)
    else:  # its copy of the state is older than the losses that were recorded since
        second.load_state_dict(state)
        with pytest.raises(ValueError, match=r"before the losses of \d+ batches were recorded: .* WholeEpochs"):
            next(iter(second))


def test_the_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    means, rows = hard(), hard()
    for sampler, recorded in ((means, lambda x: x.mean()), (rows, lambda x: x.clone().requires_grad_())):
        numbers = torch.Generator().manual_seed(1)
        for batch in sampler:
            sampler.record(recorded(torch.rand(len(batch), generator=numbers, dtype=torch.float64)))
    torch.testing.assert_close(means.rounds.ledger.losses, rows.rounds.ledger.losses)
    assert means.rounds.ledger.losses.unique().numel() == 19


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: hard(delta2=1), "delta2"),
        (lambda: HardBatchSampler(ROWS, SIZE, delta=0.05), "delta=0.05 selects none of 19 batches"),
        (lambda: HardBatchSampler(ROWS, SIZE, delta=0.0), r"delta must be in \(0, 1\], got 0.0"),
        (lambda: HardBatchSampler(ROWS, SIZE, delta="x"), "delta must be a number, got 'x'"),  # type: ignore[arg-type]
        (lambda: hard(order="hardest"), "order must be loss or index, got 'hardest'"),
        (lambda: HardBatchSampler(0, SIZE), "rows must be a whole number of at least 1, got 0"),
        (lambda: HardBatchSampler(ROWS, 2.5), "batch_size must be a whole number of at least 1, got 2.5"),
        (lambda: hard(seed="x"), "seed must be a whole number, got 'x'"),
        (lambda: WholeEpochs(DataLoader(DATA)), "loader must have a batch_sampler .* got BatchSampler"),
        (lambda: WholeEpochs([1]), "loader must have a batch_sampler .* got NoneType"),
        (lambda: WholeEpochs(loader(hard(), 1, in_order=False)), "in order, got in_order=False"),
    ],
)
def test_wrong_arguments(make: Any, says: str) -> None:
    with pytest.raises((UserError, TypeError), match=says):
        make()


def test_losses_of_another_number() -> None:
    sampler = hard()
    next(iter(sampler))
    with pytest.raises(ValueError, match=r"losses must be of shape \(4,\), one for each row, or \(\), got \(3,\)"):
        sampler.record(torch.zeros(3))


def test_ranks_share_each_batch_and_know_the_loss_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks in one process: what they would add up is compared, and added by hand."""
    import torch.distributed as dist

    samplers = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        samplers.append(hard(group="a group"))
    reference, numbers = hard(), torch.Generator().manual_seed(1)
    for _ in range(2):
        for batch, *parts in zip(reference, *samplers, strict=True):
            assert parts[0] + parts[1] == batch
            assert len(parts[0]) - len(parts[1]) in (0, 1)
            losses = torch.rand(len(batch), generator=numbers)
            reference.record(losses)
            added: list[float] = []

            def all_reduce(
                x: torch.Tensor, group: str, added: list[float] = added, losses: torch.Tensor = losses
            ) -> None:
                added.append(float(x))
                x.copy_(losses.mean())

            monkeypatch.setattr(dist, "all_reduce", all_reduce)
            for sampler, share in zip(samplers, losses.split([len(part) for part in parts]), strict=True):
                sampler.record(share)
            assert sum(added) == pytest.approx(float(losses.mean()))
    assert torch.equal(samplers[1].rounds.ledger.losses, reference.rounds.ledger.losses)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("wrapped", [True, False])
def test_only_the_latest_pass_goes_on(workers: int, wrapped: bool) -> None:
    """A batch that is looked at within the loop would be given the loss of another one."""
    sampler, trained = hard(), Trained()
    reader = (
        WholeEpochs(loader(sampler, workers))
        if wrapped
        else DataLoader(DATA, batch_sampler=sampler, num_workers=workers)
    )
    for look_at in (False, True):
        with pytest.raises(RuntimeError, match="another pass over this loader has begun") if look_at else nullcontext():
            for (rows,) in reader:
                sampler.record(trained.loss(rows.tolist()))
                if look_at and len(trained.batches) == 21:
                    next(iter(reader))
            assert not look_at
        if not wrapped and workers:
            return  # a second epoch is not for workers that read ahead
    assert trained.batches == Trained.expected(2)[:21]


def test_a_batch_that_is_looked_at_before_the_loop_comes_again() -> None:
    sampler, trained = hard(), Trained()
    whole = WholeEpochs(loader(sampler))
    first = next(iter(whole))[0].tolist()
    assert train(whole, sampler, trained, 2) == [19] * 2
    assert trained.batches == Trained.expected(2)
    assert trained.batches[0] == first
    one = HardBatchSampler(9, 9, delta=1.0)
    assert next(iter(one)) == next(iter(one))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_was_left_may_end_within_the_next(workers: int) -> None:
    sampler, trained = hard(), Trained()
    whole = WholeEpochs(loader(sampler, workers))
    looked_at = iter(whole)
    next(looked_at)
    for place, (rows,) in enumerate(whole):
        sampler.record(trained.loss(rows.tolist()))
        if place == 3:
            del looked_at
    train(whole, sampler, trained, 1)
    assert trained.batches == Trained.expected(2)


def test_a_loss_is_of_a_batch_that_was_delivered() -> None:
    sampler = hard()
    batches = iter(WholeEpochs(loader(sampler, 2)))
    next(batches)
    sampler.record(1.0)
    with pytest.raises(RuntimeError, match="no batch that was delivered is waiting for its loss"):
        sampler.record(2.0)  # the workers have more already
    assert sampler.rounds.ledger.losses.isfinite().sum() == 1


def test_states_of_other_samplers_are_refused() -> None:
    states = [
        EpochBatchSampler(ROWS, SIZE).state_dict(),
        HardBatchSampler(ROWS, 5).state_dict(),
        hard(seed=1).state_dict(),
        {},
    ]
    for state in states:
        with pytest.raises(
            ValueError, match=r"the state belongs to another sampler: .* and this one is .*'batch_size': 4"
        ):
            hard().load_state_dict(state)
