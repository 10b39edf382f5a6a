"""Mini-batch trimming against the paper's loop: topk of the per-sample losses, its fraction falling by epochs."""

import copy
import math
from functools import cache
from types import SimpleNamespace

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

from batchkern import schedules
from batchkern.errors import UserError
from batchkern.strategies import Trimming, trimming

EPOCHS = 3
one_thread = single_thread()


def paper_loop(
    run: RecordingTrainer,
    mutation="",
    *,
    start=1.0,
    end=0.2,
    smoothing=0.0,
    compact=False,
    epochs=EPOCHS,
    order="highest",
    skip=0.0,
    above=math.inf,
):
    """Section 2: sort the losses of the batch, average the highest fraction, which falls linearly per epoch."""
    model = copy.deepcopy(run.initial).train()
    optimizer, weights = sgd(model), []
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    for epoch in range(epochs):
        at = min(epoch + 1, epochs - 1) if mutation == "fraction of the next epoch" else epoch
        fraction = start + (end - start) * at / (epochs - 1) if epochs > 1 else start
        for rows in run.batches.epoch(epoch):
            count = max(round(fraction * len(rows)), 1)
            count += {"one more": 1, "one fewer": -1}.get(mutation, 0)
            count = min(max(count, 1), len(rows))
            if mutation == "all":
                count = len(rows)
            before = copy.deepcopy(model.state_dict())
            losses = F.cross_entropy(model(inputs[rows]), labels[rows], reduction="none", label_smoothing=smoothing)
            ranked = losses.sort(descending=(order == "highest") != (mutation == "easiest")).indices[
                round(skip * len(rows)) :
            ]
            count = max(count, int((losses[ranked] > above).sum()))
            hardest = ranked[:count]
            if mutation == "the first rows":
                hardest = torch.arange(count)
            if compact and count < len(rows):
                model.load_state_dict(before)  # the pass for the losses leaves nothing behind
                kept = rows[hardest.sort().values]
                losses = F.cross_entropy(model(inputs[kept]), labels[kept], reduction="none", label_smoothing=smoothing)
                hardest = torch.arange(count)
            divisor = len(rows) if mutation == "mean over the batch" else count
            descend(optimizer, losses[hardest].sum() / divisor)
            weights.append(flat(model))
    return weights


@pytest.mark.parametrize("backward", ["masked", "compact"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.2), (0.5, 0.5), (0.3, 1.0), (0.01, 0.01)])
def test_each_update_is_the_papers(backward, smoothing, start, end):
    run = trainer([Trimming(start, end, backward=backward)], epochs=EPOCHS, label_smoothing=smoothing)
    run.fit()
    assert len(run.weights) == EPOCHS * 6
    assert furthest(run.weights, paper_loop(run, start=start, end=end, smoothing=smoothing)) <= EXACT


@pytest.mark.parametrize("backward", ["masked", "compact"])
@pytest.mark.parametrize(
    "options",
    [
        {"order": "lowest"},
        {"start": 0.7, "skip": 0.3},
        {"start": 0.5, "end": 0.125, "skip": 0.25, "order": "lowest"},
        {"start": 0.25, "end": 0.25, "above": 1.15},
        {"start": 0.25, "end": 0.25, "above": 1.15, "skip": 0.25},
    ],
    ids=lambda options: "+".join(options),
)
def test_each_update_is_that_of_the_selection(backward, options):
    run = trainer([Trimming(backward=backward, **options)], epochs=EPOCHS)
    row = run.fit()
    compact = backward == "compact"
    assert furthest(run.weights, paper_loop(run, compact=compact, **options)) <= EXACT
    for other in ({"order": "highest"}, {"skip": 0.0}, {"above": math.inf}):
        if not other.items() <= {"order": "highest", "skip": 0.0, "above": math.inf, **options}.items():
            assert furthest(run.weights, paper_loop(run, compact=compact, **{**options, **other})) > DIFFERENT
    if "above" in options:
        assert row["samples_kept"] > 3 * sum(round(0.25 * b) for b in [8] * 5 + [4])
        assert row["samples_backward"] == (row["samples_kept"] if compact else 3 * 44)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": "both"}, ["order", "highest or lowest", "both"]),
        ({"skip": 1.0}, ["skip", "[0, 1)", "1.0"]),
        ({"skip": -0.1}, ["skip", "[0, 1)", "-0.1"]),
        ({"skip": "a"}, ["skip", "number", "'a'"]),
        ({"start": "x"}, ["start", "number", "'x'"]),
        ({"above": math.nan}, ["above", "nan"]),
        ({"above": True}, ["above", "number", "True"]),
        ({"above": 1.0, "order": "lowest"}, ["above", "order", "lowest"]),
    ],
)
def test_wrong_selections(options, words):
    with pytest.raises(UserError) as raised:
        Trimming(**options)
    assert all(word in str(raised.value) for word in words)


def test_more_than_all_rows_is_refused_before_the_training():
    with pytest.raises(UserError, match=r"at most 1 together, got 0.25 \+ 1.0 in epoch 0: start at 0.75 or less"):
        trainer([Trimming(skip=0.25)], epochs=EPOCHS)


@cache
def finished(backward):
    run = trainer([Trimming(backward=backward)], epochs=EPOCHS)
    run.fit()
    return run


@pytest.mark.parametrize("backward", ["masked", "compact"])
@pytest.mark.parametrize(
    "mutation",
    ["easiest", "one more", "one fewer", "all", "the first rows", "mean over the batch", "fraction of the next epoch"],
)
def test_a_wrong_selection_would_show(backward, mutation):
    run = finished(backward)
    assert furthest(run.weights, paper_loop(run, mutation)) > DIFFERENT


def test_masked_with_batch_norm_normalises_over_the_whole_batch():
    run = trainer([Trimming()], net(norm=True), epochs=EPOCHS)
    run.fit()
    assert furthest(run.weights, paper_loop(run)) <= EXACT  # running statistics included
    assert furthest(run.weights, paper_loop(run, compact=True)) > DIFFERENT


def test_compact_with_batch_norm_normalises_over_the_kept_rows_and_says_so():
    with pytest.warns(UserWarning, match="batch norm"):
        run = trainer([Trimming(backward="compact")], net(norm=True), epochs=EPOCHS)
    run.fit()
    # Running statistics included: the pass for the losses alone must not reach them.
    assert furthest(run.weights, paper_loop(run, compact=True)) <= EXACT


def test_adam_as_in_the_paper():
    run = trainer([Trimming()], epochs=EPOCHS, optimizer="adam", lr=1e-3, weight_decay=1e-4)
    run.fit()
    model = copy.deepcopy(run.initial)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    for epoch, fraction in enumerate((1.0, 0.6, 0.2)):
        for rows in run.batches.epoch(epoch):
            losses = F.cross_entropy(model(inputs[rows]), labels[rows], reduction="none")
            descend(optimizer, losses.topk(max(round(fraction * len(rows)), 1)).values.mean())
    # Adam divides by the square root of gradients that may be tiny: 1e-6 is more than it can keep after 18 updates.
    assert furthest(run.weights[-1:], [flat(model)]) <= 1e-5


def test_counts_of_samples():
    kept = {epoch: sum(max(round(p * b), 1) for b in [8] * 5 + [4]) for epoch, p in enumerate((1.0, 0.6, 0.2))}
    for backward, forward_rows, backward_rows in (
        ("masked", 3 * 44, 3 * 44),
        ("compact", 44 + (44 + kept[1]) + (44 + kept[2]), sum(kept.values())),
    ):
        row = trainer([Trimming(backward=backward)], epochs=EPOCHS).fit()
        assert row["samples_seen"] == 3 * 44
        assert row["samples_kept"] == sum(kept.values())
        assert (row["samples_forward"], row["samples_backward"]) == (forward_rows, backward_rows)


# --- how many rows ------------------------------------------------------------------------------------------------


def official_count(epoch: int, epochs: int, batch: int) -> int:
    """The rule of the official code (hfassold/mbtrim), in its order of operations.

    It interpolates the *number* of rows from all of the batch to a fifth of it over the epochs, rounds it as Python
    does (half to even), and keeps one row at the least. With one epoch it would divide by zero; here that keeps all.
    """
    first, last = 1.0 * batch, 0.2 * batch
    rows = epoch * (last - first) / (epochs - 1) + first if epochs > 1 else first
    return max(round(rows), 1)


@pytest.mark.parametrize("epochs", [1, 2, 150])
def test_kept_rows_are_the_official_number(epochs):
    strategy, run = Trimming(), SimpleNamespace(epochs=epochs)
    for epoch in range(epochs):
        for batch in range(1, 513):
            step = SimpleNamespace(run=run, batch=SimpleNamespace(indices=range(batch), epoch=epoch), kept=None)
            strategy.narrow(step, score=None)
            assert step.kept == official_count(epoch, epochs, batch), (epoch, batch)


@pytest.mark.parametrize("epochs", [1, 2, 150])
def test_rows_with_a_gradient_are_the_official_number(epochs):
    strategy, run = Trimming(), fake_run(epochs=epochs)
    for epoch in range(0, epochs, 7):
        for batch in (1, 2, 3, 5, 7, 8, 31, 64, 100, 127, 128, 250, 512):
            logits = torch.randn(batch, 3, requires_grad=True)
            loss, losses = strategy.loss(fake_step(run, epoch=epoch, rows=batch), logits, torch.randint(3, (batch,)))
            loss.backward()
            count = official_count(epoch, epochs, batch)
            used = logits.grad.abs().sum(1) > 0
            assert int(used.sum()) == count
            assert set(losses.topk(count).indices.tolist()) == set(used.nonzero().flatten().tolist())


def test_a_constant_fraction_is_constant():
    """0.3 of 5 rows is a tie: an error in the last place of the fraction would change the number of rows."""
    strategy = Trimming(0.3, 0.3)
    for epochs in (1, 2, 3, 10, 150):
        assert {strategy.keep(epoch, epochs) for epoch in range(epochs)} == {0.3}


def test_a_schedule_replaces_the_line():
    run = trainer([Trimming(schedule=schedules.stages({0: 1.0, 1: 0.5, 2: 0.25}))], epochs=4)
    run.fit()
    kept = [row["samples_kept"] for row in run.history]
    assert kept == [44, 44 + 22, 44 + 22 + 11, 44 + 22 + 11 + 11]


# --- which form ---------------------------------------------------------------------------------------------------


def timed(monkeypatch, forward, full):
    """Makes the two passes take these many seconds, and counts how often they are timed."""
    calls = []

    def seconds(action, device):
        action()
        calls.append(action)
        return forward if len(calls) % 2 else full

    monkeypatch.setattr(trimming, "_seconds", seconds)
    return calls


def test_auto_is_compact_where_that_is_cheaper(monkeypatch):
    # A pass for the losses costs a quarter of a full one: worth it while less than three quarters are kept.
    calls = timed(monkeypatch, 1.0, 4.0)
    fractions = {0: 1.0, 1: 0.8, 2: 0.7, 3: 0.3}
    run = trainer([Trimming(backward="auto", schedule=schedules.stages(fractions))], epochs=4)
    timings = len(calls)
    before = flat(run.initial)
    run.fit()
    assert len(calls) == timings  # timed once, before the training
    assert torch.equal(before, flat(trainer([Trimming()]).initial))  # which timing leaves as it was
    forward = [row["samples_forward"] for row in run.history]
    kept = [row["samples_kept"] for row in run.history]
    costs = [b - a for a, b in zip([0, *forward], forward, strict=False)]
    kept = [b - a for a, b in zip([0, *kept], kept, strict=False)]
    assert costs == [44, 44, 44 + kept[2], 44 + kept[3]]

    same = trainer([Trimming(backward="masked", schedule=schedules.stages(fractions))], epochs=4)
    same.fit()
    assert furthest(run.weights, same.weights) <= EXACT


def test_auto_never_compact_where_it_does_not_pay(monkeypatch):
    timed(monkeypatch, 3.0, 2.0)
    assert trainer([Trimming(backward="auto")], epochs=EPOCHS).fit()["samples_forward"] == EPOCHS * 44


def test_auto_with_batch_norm_is_masked_without_timing(monkeypatch):
    monkeypatch.setattr(trimming, "_seconds", lambda *_: pytest.fail("there is nothing to decide"))
    run = trainer([Trimming(backward="auto")], net(norm=True), epochs=EPOCHS)
    run.fit()
    assert run.history[-1]["samples_forward"] == EPOCHS * 44
    assert furthest(run.weights, paper_loop(run)) <= EXACT


def test_timing_leaves_the_run_as_it_was():
    model = net(dropout=0.5)
    state, before = torch.get_rng_state(), flat(model)
    strategy = Trimming(backward="auto")
    strategy.setup(fake_run(model=model))
    assert 0 <= strategy.compact_below < 1
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(before, flat(model))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_decision_survives_a_resume(monkeypatch):
    timed(monkeypatch, 1.0, 4.0)
    strategy = Trimming(backward="auto")
    strategy.setup(fake_run())
    timed(monkeypatch, 1.0, 1.0)  # another machine, or a busy one
    resumed = Trimming(backward="auto")
    resumed.setup(fake_run())
    assert (strategy.compact_below, resumed.compact_below) == (0.75, 0.0)
    resumed.load_state_dict(strategy.state_dict())
    assert resumed.compact_below == 0.75


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"start": 0.0}, "start"),
        ({"start": 1.5}, "start"),
        ({"end": -0.2}, "end"),
        ({"end": float("nan")}, "end"),
        ({"backward": "sparse"}, "backward"),
        ({"schedule": "cosine"}, "schedule"),
    ],
)
def test_wrong_options_are_refused_at_once(options, named):
    with pytest.raises(UserError, match=named):
        Trimming(**options)


def test_a_schedule_that_leaves_its_range_is_refused_before_training():
    with pytest.raises(UserError, match="0.0 in epoch 2"):
        trainer([Trimming(schedule=lambda epoch, epochs: 1 - epoch / 2)], epochs=4)


def test_unused_rows_do_not_reach_the_gradient():
    """A row that is dropped may hold anything: its gradient is an exact zero, not a small number."""
    strategy, run = Trimming(0.5, 0.5), fake_run()
    logits = torch.randn(8, 3, requires_grad=True)
    loss, losses = strategy.loss(fake_step(run), logits, torch.randint(3, (8,)))
    loss.backward()
    dropped = losses.argsort()[:4]
    assert (logits.grad[dropped] == 0).all()


def test_images_are_learnable():
    """The data of these tests are not only noise, or every selection would be as good as any other."""
    run = trainer(train=images(200), epochs=6)
    assert run.fit()["train_accuracy"] > 0.6
