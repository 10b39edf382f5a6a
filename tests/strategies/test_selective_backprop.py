"""Selective-Backprop against a loop over Algorithm 1, written with Python lists."""

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
from batchkern.plan import Batch
from batchkern.seeding import generator
from batchkern.strategies import SelectiveBackprop, Trimming

ROWS, SIZE, EPOCHS, HISTORY = 44, 8, 4, 20
one_thread = single_thread()


def paper_loop(run, mutation="", *, beta=1.0, smoothing=0.0, at_random=False):
    """The weights after each update, and what was scored and trained on by the end of each epoch."""
    model = copy.deepcopy(run.initial).train()
    optimizer, updates, passes = sgd(model), [], []
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    history, queue, scored, trained = collections.deque(maxlen=HISTORY), [], 0, 0
    frozen = copy.deepcopy(model).train()

    def losses_of(network, rows):
        return F.cross_entropy(network(inputs[rows]), labels[rows], reduction="none", label_smoothing=smoothing)

    for epoch in range(EPOCHS):
        for number, rows in enumerate(run.batches.epoch(epoch)):
            # An update that is due comes before the next batch is scored, and belongs to its epoch.
            while len(queue) >= SIZE:
                batch, queue = queue[:SIZE], queue[SIZE:]
                descend(optimizer, losses_of(model, batch).mean())
                updates.append(flat(model))
                trained += SIZE
            frozen.load_state_dict(model.state_dict())  # scoring leaves batch norm's running statistics alone
            losses = losses_of(frozen, rows).tolist()
            if mutation != "the batch is ranked among earlier ones":
                history.extend(losses)
            numbers = generator(run.seed, "selected", epoch * 6 + number + 1)
            draws = torch.rand(len(rows), generator=numbers).tolist()
            chosen = []
            for loss, draw in zip(losses, draws, strict=True):
                below = sum(x <= loss for x in history) / max(len(history), 1)
                if mutation == "the easiest":
                    below = 1 - below
                chosen.append(draw < below**beta)
            if mutation == "the batch is ranked among earlier ones":
                history.extend(losses)
            if at_random:
                chosen = [chosen[place] for place in torch.randperm(len(rows), generator=numbers).tolist()]
            queue += [row for row, is_chosen in zip(rows.tolist(), chosen, strict=True) if is_chosen]
            scored += len(rows)
        if mutation == "epochs begin with an empty queue":
            queue = []
        passes.append((scored, trained))
    return updates, passes


@pytest.mark.parametrize(("beta", "smoothing", "at_random"), [(1.0, 0.0, False), (2.0, 0.2, False), (0.5, 0.0, True)])
def test_each_update_is_the_papers(beta, smoothing, at_random):
    strategy = SelectiveBackprop(beta, HISTORY, at_random)
    run = trainer([strategy], net(norm=True), epochs=EPOCHS, label_smoothing=smoothing)
    run.fit()
    updates, passes = paper_loop(run, beta=beta, smoothing=smoothing, at_random=at_random)
    assert len(updates) > 5
    assert furthest(run.weights, updates) <= EXACT
    for row, (scored, trained) in zip(run.history, passes, strict=True):
        assert row["updates"] == trained / SIZE
        assert (row["samples_seen"], row["samples_kept"]) == (scored, trained)
        assert (row["samples_forward"], row["samples_backward"]) == (scored + trained, trained)


@cache
def finished():
    run = trainer([SelectiveBackprop(1.0, HISTORY)], epochs=EPOCHS)
    run.fit()
    return run


@pytest.mark.parametrize(
    "mutation", ["the easiest", "the batch is ranked among earlier ones", "epochs begin with an empty queue"]
)
def test_a_wrong_selection_would_show(mutation):
    assert furthest(finished().weights, paper_loop(finished(), mutation)[0]) > DIFFERENT


def test_the_loss_of_an_epoch_is_that_of_all_samples_and_its_objective_that_of_the_updates():
    """With a rate of nearly nothing every loss is known beforehand."""
    run = trainer([SelectiveBackprop(2.0)], epochs=1, lr=1e-12)
    row = run.fit()
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    with torch.no_grad():
        logits = run.initial(inputs)
        losses = F.cross_entropy(logits, labels, reduction="none")
    trained = [rows for rows in run.fed if not any(torch.equal(rows, batch) for batch in run.batches.epoch(0))]
    assert len(trained) == row["updates"] > 0
    assert row["train_loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
    assert row["train_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()), abs=1e-6)
    assert row["train_objective"] == pytest.approx(float(losses[torch.cat(trained)].mean()), abs=1e-5)
    assert row["train_objective"] > row["train_loss"]
    kept = torch.zeros(ROWS, dtype=torch.int32).index_add_(0, torch.cat(trained), torch.ones(8 * len(trained)).int())
    assert torch.equal(run.samples.times_kept, kept)
    assert torch.allclose(run.samples.last_loss, losses, atol=1e-5)


def test_an_epoch_may_be_without_an_update():
    run = trainer([SelectiveBackprop(100.0)], epochs=1)
    row = run.fit()
    assert (row["updates"], row["samples_backward"], row["train_objective"]) == (0, 0, 0)
    assert row["train_loss"] > 0.5


def test_trimming_beside_it_trims_the_updates_alone():
    run = trainer([SelectiveBackprop(0.0), Trimming(0.5, 0.5)], epochs=2)
    row = run.fit()
    # With beta = 0 all are selected: batches of 8 and of 4 become batches of 8. Four samples wait at the end.
    assert (row["samples_seen"], row["updates"], row["samples_kept"]) == (88, 10, 10 * 4)


def test_how_often_a_rank_is_selected():
    """A loss whose rank is q is selected with the probability q^beta, whatever is asked for at random."""
    run = fake_run(rows=400, batch_size=4)
    counts = {}
    for at_random in (False, True):
        strategy = SelectiveBackprop(2.0, 4, at_random)
        strategy.setup(run)
        step = fake_step(run, rows=4)
        step.batch = Batch(torch.arange(4), 0, 0.0, ends_epoch=False, only="score")
        for strategy.scored in range(2000):
            strategy.observe(step, torch.tensor([0.5, 2.0, 0.1, 1.0]))
        counts[at_random] = torch.bincount(strategy.waiting, minlength=4)
    expected = 2000 * torch.tensor([1 / 4, 1, 1 / 16, 9 / 16])
    assert ((counts[False] - expected).abs() < 4 * (expected * (1 - expected / 2000)).sqrt() + 1e-6).all()
    assert counts[True].sum() == counts[False].sum()
    assert (counts[True] - expected.mean()).abs().max() < 90  # four deviations of a binomial


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"beta": -1.0}, r"beta must be .* got -1"), ({"history": 0}, "history must be .* got 0")],
)
def test_wrong_options_are_refused_at_once(options, sentence):
    with pytest.raises(UserError, match=sentence):
        SelectiveBackprop(**options)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"waiting": torch.tensor([44])}, "waiting has rows that are not among the 44"),
        ({"losses": torch.zeros(1025)}, "losses are 1025, which must be at most 1024"),
        ({"waiting": torch.zeros(3)}, r"waiting is torch.float32 \(3,\), which must be torch.int64"),
        ({"scored": 13}, "scored is 13, which must be a whole number from 0 to 12"),
    ],
)
def test_a_state_of_another_training_is_refused(change, sentence):
    strategy = SelectiveBackprop()
    trainer([strategy], train=images(ROWS))
    with pytest.raises(ValueError, match=sentence):
        strategy.load_state_dict(strategy.state_dict() | change)
