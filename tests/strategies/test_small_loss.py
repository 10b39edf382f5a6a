"""Small-loss selection against a loop over Algorithm 1 of Co-teaching, with one network."""

import copy

import pytest
import torch
import torch.nn.functional as F
from training import DIFFERENT, EXACT, descend, flat, furthest, net, normalised, sgd, single_thread, trainer

from batchkern.errors import UserError
from batchkern.seeding import generator
from batchkern.strategies import SmallLoss

EPOCHS, NOISE, WARM_UP = 5, 0.6, 3
KEPT = (1.0, 0.8, 0.6, 0.4, 0.4)
one_thread = single_thread()


def paper_loop(run, mutation="", *, smoothing=0.0, at_random=False):
    model = copy.deepcopy(run.initial).train()
    optimizer, weights = sgd(model), []
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    for epoch, fraction in enumerate(KEPT):
        if mutation == "counted from 1":
            fraction = (*KEPT, 0.4)[epoch + 1]
        if mutation == "no warm-up":
            fraction = 0.4
        for rows in run.batches.epoch(epoch):
            losses = F.cross_entropy(model(inputs[rows]), labels[rows], reduction="none", label_smoothing=smoothing)
            order = losses.argsort(descending=mutation == "highest")
            if at_random:
                order = torch.randperm(len(rows), generator=generator(run.seed, "random rows", len(weights)))
            kept = order[: max(round(fraction * len(rows)), 1)]
            descend(optimizer, losses[kept].mean())
            weights.append(flat(model))
    return weights


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("at_random", [False, True])
def test_each_update_is_over_the_samples_that_lose_least(smoothing, at_random):
    strategy = SmallLoss(NOISE, WARM_UP, at_random)
    run = trainer([strategy], net(norm=True), epochs=EPOCHS, label_smoothing=smoothing)
    row = run.fit()
    assert furthest(run.weights, paper_loop(run, smoothing=smoothing, at_random=at_random)) <= EXACT
    for mutation in () if at_random else ("counted from 1", "no warm-up", "highest"):
        assert furthest(run.weights, paper_loop(run, mutation, smoothing=smoothing)) > DIFFERENT
    # Of five batches of 8 and one of 4; the passes are over all of them.
    assert row["samples_kept"] == sum(5 * round(8 * keep) + round(4 * keep) for keep in KEPT)
    assert row["samples_forward"] == row["samples_backward"] == row["samples_seen"] == EPOCHS * 44


def test_the_samples_that_count_are_those_the_log_calls_kept():
    runs = [trainer([SmallLoss(0.5, 1, at_random)], epochs=2) for at_random in (False, True)]
    for run in runs:
        run.fit()
    lowest, control = (run.history[-1] for run in runs)
    assert lowest["kept_loss"][1] < lowest["dropped_loss"][1]
    assert control["kept_loss"][1] > lowest["kept_loss"][1]
    assert lowest["samples_kept"] == control["samples_kept"] == 44 + 22


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"noise": 1.0}, r"noise must be in \[0, 1\), got 1.0"),
        ({"noise": -0.1}, "noise must be in"),
        ({"warm_up": 0}, "warm_up must be"),
        ({"at_random": 1}, "at_random"),
    ],
)
def test_wrong_options_are_refused_at_once(options, sentence):
    with pytest.raises(UserError, match=sentence):
        SmallLoss(**options)
