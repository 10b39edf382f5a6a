"""Nested subsets and their rates, as a sampler and a scheduler, beside the plan of the trainer's strategy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from training import fake_run

from batchkern.errors import UserError
from batchkern.parts import StepwiseLR, SubsetSampler, WholeEpochs
from batchkern.plan import Batch, EpochBatches
from batchkern.seeding import derived_seed
from batchkern.strategies import Stepwise

ROWS, SIZE, EPOCHS = 107, 5, 11
DATA = TensorDataset(torch.arange(ROWS))


def planned(seed: int = 4, **options: Any) -> list[Batch]:
    """Of the strategy, in the trainer."""
    strategy = Stepwise(**options)
    strategy.setup(fake_run(rows=ROWS, batch_size=SIZE, epochs=EPOCHS))
    batches = EpochBatches(ROWS, SIZE, EPOCHS, derived_seed(seed, "order"))
    return list(strategy.plan(batches, iter(())))


def loader(sampler: SubsetSampler, workers: int) -> DataLoader:
    return DataLoader(DATA, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)


@pytest.mark.parametrize(
    "options", [{}, {"divisor": "run", "gamma": 0.5}, {"rates": (1, 0.5, 0.3, 0.2, 2), "decay_every": 1}]
)
@pytest.mark.parametrize("interval", ["epoch", "update"])
def test_batches_and_rates_are_those_of_the_trainer(options: dict[str, Any], interval: Any) -> None:
    sampler = SubsetSampler(ROWS, SIZE, EPOCHS, seed=4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule, reader = StepwiseLR(optimizer, sampler, **options), loader(sampler, 0)
    seen = []
    for epoch in range(EPOCHS):
        assert sampler.epoch == epoch
        for (rows,) in reader:
            seen.append((rows.tolist(), epoch, pytest.approx(optimizer.param_groups[0]["lr"] / 0.2)))
            optimizer.step()
            if interval == "update":
                schedule.step()
        if interval == "epoch":
            schedule.step()
    assert seen == [(batch.indices.tolist(), batch.epoch, batch.rate) for batch in planned(**options)]
    assert sampler.updates == len(seen)
    assert [sampler.batches_of(epoch) for epoch in (0, 5, 10)] == [5, 5, 22]
    with pytest.raises(RuntimeError, match="the training is over: its sampler was built for 11 epochs"):
        next(iter(reader))


def test_fractions_and_multiples_of_ones_own() -> None:
    sets = {"fractions": (0.3, 1.0), "batch_multiples": (1, 3)}
    sampler = SubsetSampler(ROWS, SIZE, EPOCHS, seed=4, **sets)  # type: ignore[arg-type]
    assert [rows for _ in range(EPOCHS) for rows in sampler] == [x.indices.tolist() for x in planned(**sets)]


def test_lengths_that_change_are_none() -> None:
    """A trainer that asked for the first epoch's would cut the others to it."""
    sampler = SubsetSampler(ROWS, SIZE, EPOCHS)
    for sized in (sampler, loader(sampler, 0), WholeEpochs(loader(sampler, 0))):
        with pytest.raises(TypeError):
            len(sized)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [1, 4, 5, 26, 62])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_goes_on_where_training_was(workers: int, stop: int) -> None:
    sampler = SubsetSampler(ROWS, SIZE, EPOCHS, seed=4)
    reader, seen = WholeEpochs(loader(sampler, workers)), []
    while len(seen) < stop:
        for (rows,) in reader:
            seen.append(rows.tolist())
            if len(seen) == stop:
                break
    resumed = SubsetSampler(ROWS, SIZE, EPOCHS, seed=4)
    again = WholeEpochs(loader(resumed, workers))
    again.load_state_dict(reader.state_dict())
    plan = planned()
    assert resumed.epoch == plan[stop].epoch
    for _ in range(resumed.epoch, EPOCHS):
        seen += [rows.tolist() for (rows,) in again]
    assert seen == [batch.indices.tolist() for batch in plan]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SubsetSampler(ROWS, SIZE, 4), "epochs must be at least 5, one for each step, got 4"),
        (lambda: SubsetSampler(ROWS, 30, 5), "subset of 0.2 has 21 samples, fewer than one batch of 30"),
        (lambda: SubsetSampler(ROWS, SIZE, 5, fractions=(0.5, 0.2), batch_multiples=(1, 1)), "fractions must increase"),
        (lambda: SubsetSampler(ROWS, SIZE, 5, fractions=0.5), "fractions must be a tuple, .* got 0.5"),  # type: ignore[arg-type]
        (lambda: StepwiseLR(torch.optim.SGD([torch.zeros(1)]), 3), "sampler must be a SubsetSampler, got int"),  # type: ignore[arg-type]
        (lambda: lr(gamma=0.0), r"gamma must be in \(0, 1\], got 0.0"),
        (lambda: lr(rates=(1, 2)), "rates must be 5 numbers above 0, one a fraction"),
        (lambda: lr(rates=(1,) * 5, divisor="run"), "divisor is 'run', but it belongs to eq. 9, which rates replace"),
    ],
)
def test_wrong_arguments(make: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()


def lr(**options: Any) -> StepwiseLR:
    return StepwiseLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), SubsetSampler(ROWS, SIZE, 5), **options)


def test_a_finished_training_is_an_error_after_its_state_too() -> None:
    sampler = SubsetSampler(ROWS, SIZE, EPOCHS)
    whole = WholeEpochs(loader(sampler, 0))
    assert sum(len(list(whole)) for _ in range(EPOCHS)) == sampler.updates
    again = WholeEpochs(loader(SubsetSampler(ROWS, SIZE, EPOCHS), 0))
    again.load_state_dict(whole.state_dict())
    for reader in (whole, again):
        with pytest.raises(RuntimeError, match="the training is over"):
            next(iter(reader))


def test_the_rate_is_that_of_the_samplers_epoch_where_a_pass_is_left_early() -> None:
    sampler = SubsetSampler(ROWS, SIZE, EPOCHS)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, reader, seen = StepwiseLR(optimizer, sampler), loader(sampler, 0), []
    for _ in range(12):
        for place, (rows,) in enumerate(reader):
            seen.append((len(rows), optimizer.param_groups[0]["lr"]))
            if place == 2:
                break
        optimizer.step()
        schedule.step()
    expected = [(len(batch.indices), pytest.approx(batch.rate)) for batch in planned(seed=0)]
    assert seen == expected[: len(seen)]
