"""Hard mini-batches against Algorithm 2: one epoch over N fixed batches, then rounds over the hardest of them."""

import copy
import math
import random
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from training import (
    DIFFERENT,
    EXACT,
    RecordingTrainer,
    descend,
    fake_run,
    fake_step,
    flat,
    furthest,
    images,
    net,
    normalised,
    sgd,
    single_thread,
    trainer,
)

from batchkern.errors import UserError
from batchkern.plan import EpochBatches
from batchkern.strategies import HardBatches, RandomSelection, Trimming

ROWS, BATCH, EPOCHS, RATE = 78, 6, 3, 0.01  # 13 batches
one_thread = single_thread()


def hard_run(*strategies, delta=0.4, **options):
    if not any(isinstance(s, HardBatches) for s in strategies):
        strategies = [HardBatches(delta), *strategies]
    options = {"train": images(ROWS), "batch_size": BATCH, "epochs": EPOCHS, "lr": RATE} | options
    return trainer(list(strategies), **options)


def paper_loop(run: RecordingTrainer, mutation="", *, delta=0.4, epochs=EPOCHS, order="loss", smoothing=0.0):
    """Algorithm 2, in plain Python lists, with eq. 4's number of updates; also which batch each update trained."""
    model = copy.deepcopy(run.initial).train()
    optimizer, weights, trained = sgd(model, RATE), [], []
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    batches = run.batches.epoch(0)
    updates = epochs * len(batches)

    def train(number):
        if len(trained) == updates:
            return None
        rows = batches[number]
        losses = F.cross_entropy(model(inputs[rows]), labels[rows], reduction="none", label_smoothing=smoothing)
        descend(optimizer, losses.mean())
        weights.append(flat(model))
        trained.append(number)
        if mutation == "loss after the update":
            with torch.no_grad():
                losses = F.cross_entropy(model(inputs[rows]), labels[rows], reduction="none")
        return float(losses.detach().sum() if mutation == "summed loss" else losses.detach().mean())

    losses = [train(number) for number in range(len(batches))]
    count = math.floor(delta * len(batches)) + {"one more": 1, "one fewer": -1}.get(mutation, 0)
    while len(trained) < updates:
        ranked = sorted(range(len(batches)), key=lambda n: losses[n], reverse=mutation != "easiest")
        chosen = ranked[:count]
        if mutation == "second hardest on":
            chosen = ranked[1 : count + 1]
        if mutation == "ascending":
            chosen.reverse()
        if order == "index":
            chosen.sort()
        for number in chosen:
            loss = train(number)
            if loss is not None and mutation != "never refreshed":
                losses[number] = loss
            if mutation == "ranked after every update":
                break
    return weights, trained


@pytest.mark.parametrize("order", ["loss", "index"])
@pytest.mark.parametrize(("delta", "epochs"), [(0.4, 3), (0.2, 4), (0.99, 3), (1.0, 3), (1 / 13, 2), (0.4, 1)])
def test_each_update_is_the_papers(order, delta, epochs):
    run = hard_run(HardBatches(delta, order=order), epochs=epochs)
    run.fit()
    weights, _ = paper_loop(run, delta=delta, epochs=epochs, order=order)
    assert len(weights) == epochs * 13
    assert furthest(run.weights, weights) <= EXACT


def test_a_smaller_last_batch_is_ranked_by_its_mean():
    run = hard_run(train=images(ROWS - 3), epochs=4)
    run.fit()
    assert furthest(run.weights, paper_loop(run, epochs=4)[0]) <= EXACT
    assert furthest(run.weights, paper_loop(run, "summed loss", epochs=4)[0]) > DIFFERENT


def test_with_batch_norm_and_label_smoothing():
    run = hard_run(model=net(norm=True), label_smoothing=0.1)
    run.fit()
    assert furthest(run.weights, paper_loop(run, smoothing=0.1)[0]) <= EXACT


@cache
def finished():
    run = hard_run()
    run.fit()
    return run


@pytest.mark.parametrize(
    "mutation",
    [
        "easiest",
        "one more",
        "one fewer",
        "second hardest on",
        "ascending",
        "never refreshed",
        "loss after the update",
        "ranked after every update",
    ],
)
def test_a_wrong_selection_would_show(mutation):
    run = finished()
    assert furthest(run.weights, paper_loop(run, mutation)[0]) > DIFFERENT


def test_the_two_orders_differ():
    run = finished()
    assert furthest(run.weights, paper_loop(run, order="index")[0]) > DIFFERENT


def test_the_ledger_holds_the_last_loss_of_each_batch():
    strategy = HardBatches(0.4)
    run = hard_run(strategy)
    run.fit()
    model = copy.deepcopy(run.initial)
    optimizer, expected = sgd(model, RATE), {}
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    for number in paper_loop(run)[1]:
        rows = run.batches.epoch(0)[number]
        loss = F.cross_entropy(model(inputs[rows]), labels[rows])
        expected[number] = loss.item()
        descend(optimizer, loss)
    assert strategy.rounds.ledger.losses.tolist() == pytest.approx([expected[n] for n in range(13)], abs=1e-5)


def test_only_the_batches_needed_are_loaded():
    run = hard_run()
    run.fit()
    batches = run.batches.epoch(0)
    trained = paper_loop(run)[1]
    assert len(run.fed) == len(trained) == EPOCHS * 13
    assert all(torch.equal(rows, batches[number]) for rows, number in zip(run.fed, trained, strict=True))


def test_trimming_beside_it_leaves_the_untrimmed_loss_in_the_ledger():
    plain, trimmed = HardBatches(1.0), HardBatches(1.0)
    hard_run(plain, epochs=1, lr=1e-12).fit()
    hard_run(trimmed, Trimming(0.3, 0.3), epochs=1, lr=1e-12).fit()
    assert torch.allclose(plain.rounds.ledger.losses, trimmed.rounds.ledger.losses, atol=1e-6)


# --- the plan alone, with made-up losses ----------------------------------------------------------------------------


def planned(strategy, *, rows, batch_size, epochs, seed=0):
    """The plan's batches, when batch b has the loss ``losses[b]`` redrawn at each visit; and the losses it saw."""
    run = fake_run(rows=rows, batch_size=batch_size, epochs=epochs, seed=seed)
    strategy.setup(run)
    batches = EpochBatches(rows, batch_size, epochs, seed)
    numbers, seen = random.Random(seed), []
    plan = []
    for batch in strategy.plan(batches, iter(batches)):
        plan.append(batch)
        seen.append((batch.number, float(torch.tensor(numbers.random()))))
        step = fake_step(run)
        step.batch = batch
        strategy.observe(step, torch.tensor([seen[-1][1]]))
    return plan, seen


@pytest.mark.parametrize("kind", ["hard", "random"])
def test_updates_for_many_shapes_of_training(kind):
    """E * N updates whatever delta: each round of floor(delta * N) batches, the last cut short."""
    numbers = random.Random(1)
    for case in range(80):
        batches, epochs, batch_size = numbers.randint(1, 30), numbers.randint(1, 7), numbers.randint(1, 5)
        delta = 1.0 if case % 5 == 0 else numbers.uniform(1 / batches, 1)
        if math.floor(delta * batches) < 1:
            continue
        rows = batches * batch_size - numbers.randrange(batch_size)
        strategy = HardBatches(delta) if kind == "hard" else RandomSelection("batches", delta=delta)
        plan, seen = planned(strategy, rows=rows, batch_size=batch_size, epochs=epochs, seed=case)
        assert len(plan) == epochs * batches
        assert [b.number for b in plan[:batches]] == list(range(batches))
        count, ledger = math.floor(delta * batches), dict(seen[:batches])
        for start in range(batches, len(plan), count):
            chosen = [b.number for b in plan[start : start + count]]
            assert len(set(chosen)) == len(chosen)
            if kind == "hard":
                assert chosen == sorted(ledger, key=lambda n: (-ledger[n], n))[: len(chosen)]
            ledger.update(seen[start : start + count])
        assert [b.epoch for b in plan] == [update // batches for update in range(len(plan))]
        assert [b.ends_epoch for b in plan] == [(update + 1) % batches == 0 for update in range(len(plan))]
        assert [b.progress for b in plan] == [update / len(plan) for update in range(len(plan))]
        fixed = {b.number: b.indices for b in plan[:batches]}
        assert all(torch.equal(b.indices, fixed[b.number]) for b in plan)
        assert sorted(torch.cat(list(fixed.values())).tolist()) == list(range(rows))


def test_equal_losses_are_replayed_by_lower_index():
    strategy, run = HardBatches(0.5), fake_run(rows=8, batch_size=1, epochs=2)
    strategy.setup(run)
    strategy.rounds.ledger.update(torch.arange(8), torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 0.0, 0.0]))
    assert strategy.rounds._hardest(0) == [1, 3, 5, 0]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"delta": 0.0}, "delta"), ({"delta": 1.1}, "delta"), ({"delta": math.nan}, "delta"), ({"order": "id"}, "order")],
)
def test_wrong_options_are_refused_at_once(options, named):
    with pytest.raises(UserError, match=named):
        HardBatches(**options)


def test_a_delta_that_selects_nothing_is_refused_before_training():
    with pytest.raises(UserError, match=r"delta=0.05 selects none of 13 batches; it must be at least 0.0769"):
        hard_run(delta=0.05)


def test_a_strategy_serves_a_second_run():
    """What it learnt in one run must not reach another one."""
    strategy = HardBatches(0.4)
    first, second = hard_run(strategy), None
    first.fit()
    second = hard_run(strategy)
    second.fit()
    assert furthest(first.weights, second.weights) == 0
