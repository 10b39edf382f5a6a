"""Step-wise training against sections III.A and III.C: growing nested subsets, and eqs. 7 and 9 for the rate."""

import copy
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
from batchkern.strategies import Stepwise

# 30 rows in the first subset, 150 in the last; batches of 5, 10, 15, 20, 5 divide every subset.
ROWS, BATCH, EPOCHS, RATE = 150, 5, 10, 0.03
FRACTIONS, MULTIPLES = (0.2, 0.4, 0.6, 0.8, 1.0), (1, 2, 3, 4, 1)
one_thread = single_thread()


def stepwise_run(strategy=None, **options):
    options = {"train": images(ROWS), "batch_size": BATCH, "epochs": EPOCHS, "lr": RATE} | options
    return trainer([Stepwise() if strategy is None else strategy], **options)


def visits(run: RecordingTrainer, fractions=FRACTIONS, multiples=MULTIPLES) -> list[torch.Tensor]:
    """The rows of each epoch in the order in which they were fed: the arbitrary part."""
    fed, epochs = list(run.fed), run.run.epochs
    epochs_of = [[] for _ in range(epochs)]
    for epoch, rows_of_epoch in enumerate(epochs_of):
        step = [e for e in range(len(fractions)) if epoch >= e * epochs // len(fractions)][-1]
        while sum(map(len, rows_of_epoch)) < round(fractions[step] * run.run.rows):
            rows_of_epoch.append(fed.pop(0))
    assert not fed
    return [torch.cat(rows) for rows in epochs_of]


def paper_loop(run, mutation="", *, epochs=EPOCHS, lr=RATE, gamma=0.1, momentum=0.9, weight_decay=1e-3, literal=False):
    """n steps of equally many epochs, weights carried over, the rate of eq. 9 decayed by gamma halfway into a step.

    ``literal``: eq. 7 as it stands, lambda' times the *sum* of a batch's gradients; else b lambda' times their mean.
    """
    model = copy.deepcopy(run.initial).train()
    optimizer, weights = sgd(model, momentum=momentum, weight_decay=weight_decay), []
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    n, per_step, order = 5, epochs // 5, visits(run)
    for step in range(1, n + 1):
        batch = MULTIPLES[step - 1] * BATCH
        shown = min(step + 1, n) if mutation == "rate of the next step" else step
        lambda_ = lr / 10**step if mutation == "compounding" and step > 1 else lr
        if shown in (1, n):
            rate = lambda_ / batch
        else:
            rate = (lambda_ / 10) / ((1 if mutation == "without n" else n) * batch)
        if mutation == "reset":
            optimizer.state.clear()
        for epoch in range(per_step):
            half = epoch + 1 if mutation == "decay one epoch early" else epoch
            decayed = gamma if half >= per_step / 2 and mutation != "no decay" else 1.0
            rows = order[(step - 1) * per_step + epoch]
            if mutation == "all rows":
                rows = torch.cat([rows, torch.arange(ROWS)])[:ROWS]
            size = BATCH if mutation == "one batch size" else batch
            for piece in rows.split(size):
                reduction = "sum" if literal else "mean"
                loss = F.cross_entropy(model(inputs[piece]), labels[piece], reduction=reduction)
                for group in optimizer.param_groups:
                    group["lr"] = rate * decayed * (1 if literal or mutation == "mean gradients" else batch)
                descend(optimizer, loss)
                weights.append(flat(model))
    return weights


@pytest.mark.parametrize("norm", [False, True])
def test_each_update_is_the_papers(norm):
    run = stepwise_run(model=net(norm=norm), lr=0.01)
    run.fit()
    assert len(run.weights) == 2 * (6 + 6 + 6 + 6 + 30)
    assert furthest(run.weights, paper_loop(run, lr=0.01)) <= EXACT


def test_the_sum_convention_is_equation_7_as_it_stands():
    run = stepwise_run(momentum=0.0, weight_decay=0.0)
    run.fit()
    assert furthest(run.weights, paper_loop(run, momentum=0.0, weight_decay=0.0, literal=True)) <= EXACT


def test_the_mean_convention_divides_by_the_batch_size():
    run = stepwise_run(Stepwise(gradients="mean"), lr=0.1)
    run.fit()
    model = copy.deepcopy(run.initial)
    optimizer, expected = sgd(model), []
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    for epoch, rows in enumerate(visits(run)):
        step = epoch // 2
        batch = MULTIPLES[step] * BATCH
        rate = 0.1 * (1 / batch if step in (0, 4) else 0.1 / (5 * batch)) * (0.1 if epoch % 2 else 1)
        for piece in rows.split(batch):
            optimizer.param_groups[0]["lr"] = rate
            descend(optimizer, F.cross_entropy(model(inputs[piece]), labels[piece]))
            expected.append(flat(model))
    assert furthest(run.weights, expected) <= EXACT


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        # Eq. 9 with the run's b, on sums, as means: (lambda / b) b_i, and in between (lambda / 10) / (5 b) times b_i.
        ({"divisor": "run"}, [1, 2 / 50, 3 / 50, 4 / 50, 1]),
        ({"divisor": "run", "gradients": "mean"}, [1 / BATCH, *[0.1 / (5 * BATCH)] * 3, 1 / BATCH]),
        ({"rates": (1, 0.5, 2, 0.25, 1)}, [1, 0.5, 2, 0.25, 1]),
        ({"rates": [1.0] * 5}, [1.0] * 5),
    ],
)
def test_other_rates(options, rates):
    run = stepwise_run(Stepwise(**options), lr=0.01)
    run.fit()
    model = copy.deepcopy(run.initial)
    optimizer, expected = sgd(model), []
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    for epoch, rows in enumerate(visits(run)):
        for piece in rows.split(MULTIPLES[epoch // 2] * BATCH):
            optimizer.param_groups[0]["lr"] = 0.01 * rates[epoch // 2] * (0.1 if epoch % 2 else 1)
            descend(optimizer, F.cross_entropy(model(inputs[piece]), labels[piece]))
            expected.append(flat(model))
    assert furthest(run.weights, expected) <= EXACT


def test_without_shared_weights_each_step_is_a_training_of_its_own():
    run = stepwise_run(Stepwise(share_weights=False), model=net(norm=True), lr=0.01)
    run.fit()
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    expected = []
    for step in range(5):
        model = copy.deepcopy(run.initial).train()
        optimizer = sgd(model)  # with no momentum of another training
        for epoch, rows in enumerate(visits(run)[2 * step : 2 * step + 2]):
            for piece in rows.split(MULTIPLES[step] * BATCH):
                optimizer.param_groups[0]["lr"] = 0.01 * (1 if step in (0, 4) else 1 / 50) * 0.1**epoch
                descend(optimizer, F.cross_entropy(model(inputs[piece]), labels[piece]))
                expected.append(flat(model))
    assert furthest(run.weights, expected) <= EXACT


def test_initial_weights_of_another_model_are_refused():
    strategy, other = Stepwise(share_weights=False), Stepwise(share_weights=False)
    strategy.setup(fake_run(rows=150, batch_size=5, epochs=5))
    other.setup(fake_run(rows=150, batch_size=5, epochs=5, model=net(norm=True)))
    strategy.load_state_dict(strategy.state_dict())
    for state in (other.state_dict(), strategy.state_dict() | {"initial": None}):
        with pytest.raises(ValueError, match="the initial weights are not those of this model"):
            strategy.load_state_dict(state)


@cache
def finished():
    run = stepwise_run()
    run.fit()
    return run


@pytest.mark.parametrize(
    "mutation",
    [
        "rate of the next step",
        "compounding",
        "without n",
        "mean gradients",
        "no decay",
        "decay one epoch early",
        "one batch size",
        "all rows",
        "reset",
    ],
)
def test_a_wrong_reading_would_show(mutation):
    run = finished()
    assert furthest(run.weights, paper_loop(run, mutation)) > DIFFERENT


def test_reset_optimizer_forgets_the_momentum_at_each_step():
    run = stepwise_run(Stepwise(reset_optimizer=True))
    run.fit()
    assert furthest(run.weights, paper_loop(run, "reset")) <= EXACT


def test_the_trainers_own_schedule_is_not_applied_on_top():
    plain, scheduled = stepwise_run(), stepwise_run(schedule="cosine")
    plain.fit()
    scheduled.fit()
    assert furthest(plain.weights, scheduled.weights) == 0


# --- the plan alone -------------------------------------------------------------------------------------------------


def planned(strategy, *, rows, batch_size, epochs, seed=0):
    strategy.setup(fake_run(rows=rows, batch_size=batch_size, epochs=epochs))
    batches = EpochBatches(rows, batch_size, epochs, seed)
    return list(strategy.plan(batches, iter(batches)))


def by_epoch(plan):
    epochs = {}
    for batch in plan:
        epochs.setdefault(batch.epoch, []).append(batch)
    assert sorted(epochs) == list(range(len(epochs)))
    return [epochs[e] for e in sorted(epochs)]


@pytest.mark.parametrize(("rows", "batch_size", "epochs"), [(150, 5, 10), (97, 4, 13), (1000, 32, 5), (61, 3, 21)])
def test_subsets_are_nested_random_and_each_row_comes_once_an_epoch(rows, batch_size, epochs):
    plan = planned(Stepwise(), rows=rows, batch_size=batch_size, epochs=epochs)
    before, subsets = set(), []
    for epoch, batches in enumerate(by_epoch(plan)):
        step = max(i for i in range(5) if i * epochs // 5 <= epoch)
        visited = torch.cat([b.indices for b in batches]).tolist()
        assert len(visited) == len(set(visited)) == round(FRACTIONS[step] * rows)
        assert before <= set(visited)
        before = set(visited)
        subsets.append(before)
        size = MULTIPLES[step] * batch_size
        assert [len(b.indices) for b in batches[:-1]] == [size] * (len(batches) - 1)
        assert 1 <= len(batches[-1].indices) <= size
        assert [b.ends_epoch for b in batches] == [False] * (len(batches) - 1) + [True]
        progress = [(epoch + place / len(batches)) / epochs for place in range(len(batches))]
        assert [b.progress for b in batches] == pytest.approx(progress)
    assert subsets[-1] == set(range(rows))
    assert subsets[0] != set(range(len(subsets[0])))  # random, not the first rows
    other = planned(Stepwise(), rows=rows, batch_size=batch_size, epochs=epochs, seed=1)
    assert {i for b in by_epoch(other)[0] for i in b.indices.tolist()} != subsets[0]
    orders = [torch.cat([b.indices for b in batches]).tolist() for batches in by_epoch(plan)[-2:]]
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("fractions", "multiples", "cost"), [(FRACTIONS, MULTIPLES, 0.6), ((0.5, 1.0), (2, 1), 0.75)])
def test_the_samples_cost_the_mean_fraction(fractions, multiples, cost):
    run = stepwise_run(Stepwise(fractions, multiples))
    row = run.fit()
    assert row["samples_backward"] == row["samples_seen"] == cost * EPOCHS * ROWS


def test_decay_within_a_step():
    """The paper: 20 epochs a step, times gamma at epoch 10."""
    strategy = Stepwise()
    rates = [strategy.rule.of(0, epoch, 20, 12, 12) for epoch in range(20)]
    assert rates == [1.0] * 10 + [0.1] * 10
    rates = [strategy.rule.of(2, epoch, 20, 48, 12) for epoch in range(20)]
    assert rates == pytest.approx([1 / 50] * 10 + [0.1 / 50] * 10)
    assert [strategy.rule.of(4, epoch, 1, 12, 12) for epoch in range(1)] == [1.0]


def test_decay_is_not_late_by_rounding():
    """0.28 of 25 epochs is 7, though not in floating point."""
    for hundredths in range(1, 101):
        strategy = Stepwise(decay_every=hundredths / 100, gamma=0.5)
        for epochs in range(1, 201):
            if hundredths * epochs % 100 or hundredths * epochs < 100:
                continue
            period = hundredths * epochs // 100
            decays = [
                round(-torch.tensor(strategy.rule.of(0, e, epochs, 1, 1)).log2().item()) for e in (period - 1, period)
            ]
            assert decays == [0, 1] or period == epochs, (hundredths, epochs)


def test_one_step_is_the_baseline_with_decay():
    plan = planned(Stepwise((1.0,), (1,)), rows=40, batch_size=8, epochs=4)
    assert [b.rate for b in plan] == [1.0] * 10 + [0.1] * 10


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fractions": ()}, "fractions"),
        ({"fractions": (0.5, 0.4), "batch_multiples": (1, 1)}, "fractions"),
        ({"fractions": (0.5, 0.5), "batch_multiples": (1, 1)}, "fractions"),
        ({"fractions": (0.0, 1.0), "batch_multiples": (1, 1)}, "fractions"),
        ({"fractions": (0.5, 1.2), "batch_multiples": (1, 1)}, "fractions"),
        ({"fractions": (0.5, 1.0)}, "batch_multiples"),
        ({"batch_multiples": (1, 2, 3, 4, 0)}, "batch_multiples"),
        ({"batch_multiples": (1, 2, 3, 4, 1.5)}, "batch_multiples"),
        ({"batch_multiples": (True, 2, 3, 4, 1)}, "batch_multiples"),
        ({"gamma": 0.0}, "gamma"),
        ({"decay_every": 1.5}, "decay_every"),
        ({"gradients": "median"}, "gradients"),
        ({"divisor": "batch"}, "divisor must be step or run"),
        ({"rates": (1, 1)}, "rates must be 5 numbers above 0"),
        ({"rates": (1, 1, 0, 1, 1)}, "rates must be 5 numbers above 0"),
        ({"rates": (1, 1, float("inf"), 1, 1)}, "rates must be 5 numbers above 0"),
        ({"rates": 0.5}, "rates must be a tuple"),
        ({"share_weights": 0}, "share_weights must be True or False"),
    ],
)
def test_wrong_options_are_refused_at_once(options, named):
    with pytest.raises(UserError, match=named):
        Stepwise(**options)


def test_too_few_epochs():
    with pytest.raises(UserError, match="epochs must be at least 5, one for each step, got 4"):
        stepwise_run(epochs=4)


def test_a_subset_smaller_than_a_batch():
    with pytest.raises(UserError, match=r"subset of 0.8 has 120 samples, fewer than one batch of 128"):
        stepwise_run(batch_size=32, strategy=Stepwise((0.8, 1.0), (4, 1)))


def test_a_strategy_serves_a_second_run():
    strategy = Stepwise()
    first = stepwise_run(strategy)
    first.fit()
    second = stepwise_run(strategy)
    second.fit()
    assert furthest(first.weights, second.weights) == 0


@pytest.mark.parametrize("options", [{"gradients": "mean"}, {"divisor": "run"}])
def test_rates_take_the_place_of_what_eq_9_is_read_as(options):
    with pytest.raises(UserError, match=f"{next(iter(options))} is .*, but it belongs to eq. 9, which rates replace"):
        Stepwise((0.5, 1.0), (1, 1), rates=(1.0, 1.0), **options)
