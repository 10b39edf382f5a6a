"""InfoBatch against a loop over its pruning rule, written with Python lists."""

import copy
import statistics
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from training import DIFFERENT, EXACT, descend, flat, furthest, images, net, normalised, sgd, single_thread, trainer

from batchkern.errors import UserError
from batchkern.seeding import generator
from batchkern.strategies import InfoBatch

ROWS, SIZE, EPOCHS, PRUNE, UNTIL = 44, 8, 6, 0.4, 0.7  # pruned are the epochs 1, 2 and 3 of 0 to 5
one_thread = single_thread()


def paper_loop(run, mutation="", *, smoothing=0.0, at_random=False):
    """The weights after each update, and how many samples were left out of each epoch."""
    model = copy.deepcopy(run.initial).train()
    optimizer, updates, pruned_in = sgd(model), [], []
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    last, seed = [0.0] * ROWS, run.batches.seed
    for epoch in range(EPOCHS):
        weight = [1.0] * ROWS
        if 1 <= epoch < (5 if mutation == "an epoch more" else 4):
            mean = statistics.median(last) if mutation == "below the median" else statistics.fmean(last)
            low = [(loss > mean if mutation == "the highest" else loss < mean) for loss in last]
            numbers = generator(seed, "pruned", epoch)
            draws = torch.rand(ROWS, generator=numbers).tolist()
            out = [is_low and draw < PRUNE for is_low, draw in zip(low, draws, strict=True)]
            if at_random:
                out = [out[place] for place in torch.randperm(ROWS, generator=numbers).tolist()]
                weight = [ROWS / out.count(False)] * ROWS
            elif mutation != "no weights":
                weight = [1 / (1 - PRUNE) if is_low else 1.0 for is_low in low]
            weight = [0.0 if is_out else w for is_out, w in zip(out, weight, strict=True)]
        pruned_in.append(weight.count(0.0))
        order = torch.randperm(ROWS, generator=generator(seed, "epoch", epoch)).tolist()
        kept = [row for row in order if weight[row] > 0]
        for start in range(0, len(kept), SIZE):
            rows = kept[start : start + SIZE]
            losses = F.cross_entropy(model(inputs[rows]), labels[rows], reduction="none", label_smoothing=smoothing)
            factors = torch.tensor([weight[row] for row in rows])
            by = factors.sum() if mutation == "a weighted mean" else len(rows)
            descend(optimizer, (losses * factors).sum() / by)
            updates.append(flat(model))
            for row, loss in zip(rows, losses.tolist(), strict=True):
                if mutation != "losses of the first epoch" or epoch == 0:
                    last[row] = loss
    return updates, pruned_in


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("at_random", [False, True])
def test_each_update_is_the_papers(smoothing, at_random):
    strategy = InfoBatch(PRUNE, UNTIL, at_random)
    # Of seed 0 batch norm makes 2e-6 of a last bit in 30 updates.
    run = trainer([strategy], net(norm=True), epochs=EPOCHS, label_smoothing=smoothing, seed=2)
    row = run.fit()
    updates, pruned = paper_loop(run, smoothing=smoothing, at_random=at_random)
    assert furthest(run.weights, updates) <= EXACT
    assert [round(row["pruned"] * ROWS) for row in run.history] == pruned
    assert pruned[0] == pruned[4] == pruned[5] == 0 < min(pruned[1:4])
    passes = EPOCHS * ROWS - sum(pruned)
    assert [row[f"samples_{what}"] for what in ("seen", "kept", "forward", "backward")] == [passes] * 4


@cache
def finished():
    run = trainer([InfoBatch(PRUNE, UNTIL)], epochs=EPOCHS)
    run.fit()
    return run


@pytest.mark.parametrize(
    "mutation",
    [
        "an epoch more",
        "below the median",
        "the highest",
        "no weights",
        "a weighted mean",
        "losses of the first epoch",
    ],
)
def test_a_wrong_rule_would_show(mutation):
    assert furthest(finished().weights, paper_loop(finished(), mutation)[0]) > DIFFERENT


def test_the_control_prunes_whatever_the_loss_is():
    """Among samples that are pruned at random, losses above the mean occur."""
    strategy, first = InfoBatch(0.5, 1.0, at_random=True), InfoBatch()
    run = trainer([strategy], epochs=2)
    run.fit()
    trainer([first], epochs=1).fit()  # the same first epoch
    low = first.losses < first.losses.mean()
    pruned = strategy.weights == 0
    draws = torch.rand(ROWS, generator=generator(run.batches.seed, "pruned", 1))
    assert int(pruned.sum()) == int((low & (draws < 0.5)).sum()) > 0
    assert (pruned & ~low).any()
    assert float(strategy.weights.sum()) == pytest.approx(ROWS)
    assert len(set(strategy.weights.tolist())) == 2


@pytest.mark.parametrize(("until", "epochs", "pruned"), [(0.875, 8, 7), (0.875, 3, 2), (0.29, 100, 29), (1.0, 4, 4)])
def test_the_last_epochs_are_whole(until, epochs, pruned):
    strategy = InfoBatch(until=until)
    trainer([strategy], epochs=epochs)
    assert strategy.whole_from == pruned


def test_a_sample_without_a_known_loss_is_not_pruned():
    """With drop_last, an epoch leaves some out."""
    strategy = InfoBatch(0.9, 1.0)
    run = trainer([strategy], train=images(46), epochs=2, drop_last=True)
    run.fit()
    left_out = torch.randperm(46, generator=generator(run.batches.seed, "epoch", 0))[40:]
    assert torch.equal(strategy.weights[left_out], torch.ones(6))
    assert (strategy.weights == 0).any()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prune": 1.0}, r"prune must be in \[0, 1\), got 1.0"),
        ({"until": 1.5}, r"until must be in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_options_are_refused_at_once(options, sentence):
    with pytest.raises(UserError, match=sentence):
        InfoBatch(**options)


def test_losses_of_another_training_set_are_refused():
    strategy = InfoBatch()
    trainer([strategy])
    state = strategy.state_dict()
    with pytest.raises(ValueError, match=r"losses is torch.float32 \(3,\), which must be torch.float32 \(44,\)"):
        strategy.load_state_dict(state | {"losses": torch.zeros(3)})
