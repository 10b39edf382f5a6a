"""The control arm: as many rows or batches as the strategy it stands beside, but which ones is left to chance."""

import collections
import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from training import (
    DIFFERENT,
    EXACT,
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
from batchkern.seeding import generator
from batchkern.strategies import HardBatches, RandomSelection, Trimming

EPOCHS = 3
one_thread = single_thread()


def rows_loop(run, mutation="", *, smoothing=0.0):
    """The mean loss over k rows of the batch, drawn without replacement, k as in mini-batch trimming."""
    model = copy.deepcopy(run.initial).train()
    optimizer, weights, update = sgd(model), [], 0
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    for epoch, fraction in enumerate((1.0, 0.6, 0.2)):
        for rows in run.batches.epoch(epoch):
            place = 0 if mutation == "drawn once" else update
            order = torch.randperm(len(rows), generator=generator(run.seed, "random rows", place))
            count = max(round(fraction * len(rows)), 1) + (mutation == "one more")
            losses = F.cross_entropy(model(inputs[rows]), labels[rows], reduction="none", label_smoothing=smoothing)
            kept = losses.topk(min(count, len(rows))).indices if mutation == "hardest" else order[:count]
            if mutation == "the others":
                kept = order[-count:]
            descend(optimizer, losses[kept].sum() / (len(rows) if mutation == "mean over the batch" else len(kept)))
            weights.append(flat(model))
            update += 1
    return weights


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_each_update_is_over_k_random_rows(smoothing):
    run = trainer([RandomSelection()], net(norm=True), epochs=EPOCHS, label_smoothing=smoothing)
    run.fit()
    assert furthest(run.weights, rows_loop(run, smoothing=smoothing)) <= EXACT


@cache
def finished():
    run = trainer([RandomSelection()], epochs=EPOCHS)
    run.fit()
    return run


@pytest.mark.parametrize("mutation", ["drawn once", "one more", "hardest", "the others", "mean over the batch"])
def test_a_wrong_selection_would_show(mutation):
    run = finished()
    assert furthest(run.weights, rows_loop(run, mutation)) > DIFFERENT


def test_random_batches_are_replayed_as_planned():
    run = trainer([RandomSelection("batches", delta=0.5)], train=images(78), batch_size=6, epochs=4)
    run.fit()
    model, batches = copy.deepcopy(run.initial), run.batches.epoch(0)
    optimizer, weights = sgd(model), []
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    trained = list(range(13))
    for round_ in range(7):
        order = torch.randperm(13, generator=generator(run.seed, "random batches", round_))
        trained += order[:6].tolist()
    for number in trained[: 4 * 13]:
        descend(optimizer, F.cross_entropy(model(inputs[batches[number]]), labels[batches[number]]))
        weights.append(flat(model))
    assert furthest(run.weights, weights) <= EXACT


@pytest.mark.parametrize(
    ("strategy", "control"),
    [
        (Trimming(0.9, 0.3), RandomSelection("rows", 0.9, 0.3)),
        (HardBatches(0.3), RandomSelection("batches", delta=0.3)),
    ],
)
def test_the_same_counts_as_the_strategy_but_other_rows(strategy, control):
    runs = [trainer([s], train=images(78), batch_size=6, epochs=4) for s in (strategy, control)]
    rows = [run.fit() for run in runs]
    for key in ("updates", "samples_seen", "samples_forward", "samples_backward", "samples_kept"):
        assert rows[0][key] == rows[1][key]
    assert len(runs[0].weights) == len(runs[1].weights)
    assert furthest(runs[0].weights, runs[1].weights) > DIFFERENT


def chi_square(counts, expected):
    return sum((n - expected) ** 2 / expected for n in counts)


def test_every_row_is_kept_equally_often():
    """Rows with a gradient, over 1000 updates of a batch of 10 of which 3 are kept."""
    strategy, run = RandomSelection("rows", 0.3, 0.3), fake_run()
    strategy.setup(run)
    kept, pairs = collections.Counter(), collections.Counter()
    target = torch.arange(10) % 4
    for update in range(1000):
        logits = torch.zeros(10, 4, requires_grad=True)
        loss, _ = strategy.loss(fake_step(run, update=update, rows=10), logits, target)
        loss.backward()
        rows = logits.grad.abs().sum(1).nonzero().flatten().tolist()
        assert len(rows) == 3
        kept.update(rows)
        pairs[rows[0], rows[1]] += 1
    # Drawn without replacement, a row's count varies less than in independent draws: 9/10 of 7/9 of it.
    assert chi_square([kept[row] for row in range(10)], 300) < 27.9 * 0.7  # 9 degrees of freedom, p = 0.001
    assert len(pairs) > 30


def test_every_batch_is_replayed_equally_often():
    strategy, run = RandomSelection("batches", delta=0.25), fake_run(rows=80, batch_size=4)
    strategy.setup(run)
    rounds = [strategy.rounds._random(r) for r in range(2000)]
    assert all(len(set(r)) == 5 for r in rounds)
    first = collections.Counter(r[0] for r in rounds)
    anywhere = collections.Counter(n for r in rounds for n in r)
    assert chi_square([first[n] for n in range(20)], 100) < 43.8  # 19 degrees of freedom, p = 0.001
    assert chi_square([anywhere[n] for n in range(20)], 500) < 43.8 * 0.75


def test_the_rows_do_not_depend_on_the_losses():
    strategy, run = RandomSelection("rows", 0.5, 0.5), fake_run()
    strategy.setup(run)
    chosen = []
    for logits in (torch.randn(8, 4), torch.randn(8, 4) * 9):
        logits.requires_grad_()
        strategy.loss(fake_step(run, update=3), logits, torch.zeros(8, dtype=torch.int64))[0].backward()
        chosen.append(logits.grad.abs().sum(1) > 0)
    assert torch.equal(*chosen)


def test_the_untrimmed_losses_are_of_every_row():
    strategy, run = RandomSelection("rows", 0.5, 0.5), fake_run()
    strategy.setup(run)
    logits, target = torch.randn(8, 4), torch.randint(4, (8,))
    _, losses = strategy.loss(fake_step(run), logits, target)
    assert torch.allclose(losses, F.cross_entropy(logits, target, reduction="none"))
    assert not losses.requires_grad


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"select": "columns"}, "select"),
        ({"start": 0.0}, "start"),
        ({"end": 1.5}, "end"),
        ({"delta": 0.0}, "delta"),
    ],
)
def test_wrong_options_are_refused_at_once(options, named):
    with pytest.raises(UserError, match=named):
        RandomSelection(**options)


def test_a_delta_that_selects_nothing_is_refused_before_training():
    with pytest.raises(UserError, match="delta=0.1 selects none of 6 batches"):
        trainer([RandomSelection("batches", delta=0.1)])
    trainer([RandomSelection("rows", delta=0.1)])  # where delta decides nothing


@pytest.mark.parametrize("select", ["rows", "batches"])
def test_a_strategy_serves_a_second_run(select):
    strategy = RandomSelection(select, delta=0.5)
    runs = []
    for _ in range(2):
        runs.append(trainer([strategy]))
        runs[-1].fit()
    assert furthest(runs[0].weights, runs[1].weights) == 0


def test_chosen_rows_alone_are_the_masked_update_at_less_work():
    """The same rows as the masked form, and so the same weights without batch norm; no other row is fed."""
    masked, compact = (trainer([RandomSelection(end=0.3, backward=b)], epochs=3) for b in ("masked", "compact"))
    for run in (masked, compact):
        run.fit()
    assert furthest(compact.weights, masked.weights) <= EXACT
    k = [8, 8, 8, 8, 8, 4] + [5] * 5 + [3] + [2] * 5 + [1]  # of batches of 8 and one of 4, at 1, .65 and .3
    assert (
        [row["samples_backward"] for row in compact.history]
        == [44, 44 + 28, 44 + 28 + 11]
        == [sum(k[: 6 * epochs]) for epochs in (1, 2, 3)]
    )
    for key in ("samples_forward", "samples_kept"):
        assert [row[key] for row in compact.history] == [44, 72, 83]
    assert masked.history[-1]["samples_forward"] == 3 * 44
    with pytest.raises(UserError, match="backward must be masked or compact, got 'auto'"):
        RandomSelection(backward="auto")
