"""The benchmark of trainings: an update takes what it says, and the bare loop is the same training."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from training import flat, single_thread

from batchkern.data import Feed
from batchkern.plan import EpochBatches
from batchkern.strategies import STRATEGIES, Strategy
from batchkern.trainer import Trainer
from batchkern.updater import Updater
from bench import training as bench

pytest.importorskip("sklearn")

CPU = torch.device("cpu")
one_thread = single_thread()


UPDATES = bench.EPOCHS * bench.BATCHES
SIZE = 4
IMAGES = bench.BATCHES * SIZE


@dataclass
class Idle(Strategy):
    """In the place of a stopwatch, and does nothing."""

    name: ClassVar[str] = "idle"


def case(strategy: str, model: str = "cnn", target: float | None = None) -> bench.Case:
    return bench.Case(strategy, model, target, batch_size=SIZE)


def trainings(strategy: str, model: str = "cnn") -> Any:
    return bench.Trainings(case(strategy, model), CPU)


def timed(of: Any) -> tuple[Any, Trainer]:
    """A training under the stopwatch."""
    stopwatch = bench.Stopwatch(bench.BareLoop(copy.deepcopy(of.model), of.train, SIZE, CPU), CPU)
    trainer = of.trainer(of.train, of.passive, stopwatch)
    stopwatch.counts = trainer.counts
    trainer.fit()
    return stopwatch, trainer


# --- the stopwatch ---------------------------------------------------------------------------------------------------


class Clock:
    """Stands still but while something is done that takes a known time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.patch = patch
        patch.setattr(time, "perf_counter", lambda: self.now)

    def takes(self, owner: type, name: str, seconds: Callable[..., float]) -> None:
        do = getattr(owner, name)

        def slow(*args: Any) -> Any:
            self.now += seconds(*args)
            return do(*args)

        self.patch.setattr(owner, name, slow)


@pytest.mark.parametrize("strategy", ["baseline", "passive(every=3)", "stepwise"])
def test_an_update_takes_from_its_planning_to_the_next(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And neither an evaluation nor the bare loop is part of it, whichever of the two goes first."""
    clock = Clock(monkeypatch)
    updates: list[float] = []

    def update(updater: Updater, batch: Any) -> float:
        updates.append(len(batch.indices) + len(updates) / 64)  # no two take as long
        return updates[-1]

    clock.takes(Updater, "update", update)
    clock.takes(Trainer, "_end_epoch", lambda trainer, epoch: 1000.0)
    clock.takes(bench.BareLoop, "update", lambda bare: 100.0)
    stopwatch, trainer = timed(trainings(strategy))
    assert stopwatch.seconds == updates
    assert stopwatch.bare_seconds == [100.0] * trainer.counts.updates


def test_planning_is_part_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.takes(EpochBatches, "epoch", lambda batches, epoch: 1.0)  # once for the batch, and once for the next epoch
    clock.takes(bench.BareLoop, "update", lambda bare: 100.0)
    clock.takes(Trainer, "_end_epoch", lambda trainer, epoch: 1000.0)
    stopwatch, _ = timed(trainings("baseline"))
    ends = [2.0 if (update + 1) % bench.BATCHES == 0 else 1.0 for update in range(UPDATES - 1)]
    assert stopwatch.seconds == [*ends, 1.0]


def test_the_two_go_first_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = Clock(monkeypatch)
    clock.takes(Updater, "update", lambda updater, batch: order.append("trainer") or 0.0)
    clock.takes(bench.BareLoop, "update", lambda bare: order.append("bare") or 0.0)
    timed(trainings("baseline"))
    pairs = list(zip(order[::2], order[1::2]))
    assert pairs[::2] == [("bare", "trainer")] * 13
    assert pairs[1::2] == [("trainer", "bare")] * 12


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["baseline", "augmentation", "passive(every=3)", "hard-batches"])
def test_a_timed_training_is_the_same_training(strategy: str) -> None:
    both = trainings(strategy, "resnet8")
    _, watched = timed(both)
    alone = both.trainer(both.train, both.passive, Idle())
    alone.fit()
    assert torch.equal(flat(watched.model), flat(alone.model))


# --- the bare loop ---------------------------------------------------------------------------------------------------


def test_the_bare_loop_is_the_trainers_baseline() -> None:
    """The same weights after the same batches, so each of the two does what the other does."""
    both = trainings("baseline")
    trainer = both.trainer(both.train, both.passive, Idle())
    bare = bench.BareLoop(copy.deepcopy(both.model), both.train, SIZE, CPU)
    before = flat(trainer.model)
    bare.batches = (batch for epoch in range(bench.EPOCHS) for batch in trainer.batches.epoch(epoch))
    trainer.fit()
    for _ in range(UPDATES):
        bare.update()
    torch.testing.assert_close(flat(bare.model), flat(trainer.model), rtol=0, atol=1e-5)
    assert (flat(bare.model) - before).abs().max() > 0.01


def test_the_bare_loop_sees_every_image_once_an_epoch() -> None:
    of = trainings("baseline")
    batches = bench.BareLoop(of.model, of.train, SIZE, CPU).batches
    epochs = [torch.cat([next(batches) for _ in range(bench.BATCHES)]) for _ in range(2)]
    assert not torch.equal(*epochs)
    assert all(epoch.sort().values.tolist() == list(range(len(of.train))) for epoch in epochs)


def test_a_network_without_batch_norm_is_otherwise_the_same() -> None:
    data = trainings("baseline").train
    whole, bare = bench.build("resnet8", data), bench.build("resnet8" + bench.NO_NORM, data)
    kept = {name: value.shape for name, value in whole.state_dict().items() if "bn" not in name}
    assert {name: value.shape for name, value in bare.state_dict().items()} == kept


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_a_round_of_hard_batches_loads_the_batches_that_it_replays() -> None:
    loads: list[Tensor] = []

    class Recorded(bench.CountedImages):
        def rows(self, indices: Tensor) -> Tensor:
            loads.append(indices)
            return super().rows(indices)

    of = trainings("hard-batches(delta=0.4)")
    trainer = of.trainer(Recorded(of.train), of.passive, Idle())
    fixed = trainer.batches.epoch(0)
    loads.clear()  # statistics
    trainer.fit()
    number = {tuple(rows.tolist()): n for n, rows in enumerate(fixed)}
    replayed = [number[tuple(rows.tolist())] for rows in loads[:UPDATES]]
    assert replayed[: len(fixed)] == list(range(len(fixed)))
    rounds = [replayed[start : start + 2] for start in range(len(fixed), UPDATES, 2)]
    assert all(len(set(round)) == 2 for round in rounds)
    assert sum(map(len, loads[UPDATES:])) == len(of.train), "all are looked at once when the training is over"


@pytest.mark.parametrize(
    ("strategy", "loaded"),
    [
        ("baseline", UPDATES * SIZE),
        ("hard-batches", UPDATES * SIZE),
        (bench.COMPACT, UPDATES * SIZE),
        ("random(start=0.5,end=0.5,backward=compact)", UPDATES * SIZE // 2),
        ("stepwise", (1 + 2 + 3 + 4 + 5) * SIZE),
        ("passive(every=5)", (UPDATES + UPDATES // 5) * SIZE),  # the last update of all is a passive one
        ("passive(every=4)", (UPDATES + UPDATES // 4) * SIZE),
    ],
)
def test_what_is_loaded_is_what_updates_use(strategy: str, loaded: int) -> None:
    assert trainings(strategy).images_loaded() == loaded


def test_what_is_loaded_twice_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    once = Feed.batch

    def twice(*args: Any) -> Any:
        once(*args)
        return once(*args)

    monkeypatch.setattr(Feed, "batch", twice)
    assert trainings("baseline").images_loaded() == 2 * UPDATES * SIZE


# --- the rows --------------------------------------------------------------------------------------------------------


def test_every_strategy_is_measured() -> None:
    names = {case.strategy.partition("(")[0] for case in bench.CASES}
    assert names == {"baseline", *STRATEGIES}
    targets = {(case.strategy, case.model): case.target for case in bench.CASES if case.target}
    assert targets["baseline", "resnet8"] == 0.85
    assert targets[bench.COMPACT, "resnet8 without batch norm"] == 0.55


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "updates", "seen"), [("baseline", 25, 1.0), ("stepwise", 9, 0.6), ("passive(every=5)", 30, 1.0)]
)
def test_a_row_says_what_was_measured(strategy: str, updates: int, seen: float) -> None:
    row = bench.measure(case(strategy, target=0.5), CPU, 0.0)
    assert (row["strategy"], row["model"], row["data"]) == (strategy, "cnn", "photo-patches")
    assert (row["images"], row["batch_size"], row["target"]) == (IMAGES, SIZE, 0.5)
    assert (row["rounds"], row["updates"]) == (bench.MIN_ROUNDS, bench.MIN_ROUNDS * updates)
    assert 0 < row["ratio"]["p20"] <= row["ratio"]["median"] <= row["ratio"]["p80"] < math.inf
    assert row["samples_per_s"] * row["seconds_per_epoch"] == pytest.approx(seen * IMAGES)
    assert row["bare_samples_per_s"] * row["bare_seconds_per_epoch"] == pytest.approx(IMAGES)


def test_figures_are_medians_over_rounds_of_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stepwise training has fewer updates than there are in as many epochs of the bare loop."""
    monkeypatch.setattr(bench, "MIN_ROUNDS", 3)
    rounds = iter([(1.0, 2.0), (1.0, 4.0), (3.0, 4.0)])

    def round(of: Any) -> Any:
        ours, theirs = next(rounds)
        stopwatch = bench.Stopwatch(None, CPU, seconds=[ours] * 10, bare_seconds=[theirs] * 10)
        stopwatch.counts.samples_seen = 60
        return stopwatch

    monkeypatch.setattr(bench.Trainings, "round", round)
    row = bench.measure(case("stepwise"), CPU, 0.0)
    assert row["seconds_per_epoch"] == 10 * 1.0 / bench.EPOCHS
    assert row["bare_seconds_per_epoch"] == 4.0 * bench.BATCHES
    assert row["ratio"]["median"] == pytest.approx(0.2)  # of 0.2, 0.1, 0.3
    assert row["samples_per_s"] == pytest.approx(60 / 10)
