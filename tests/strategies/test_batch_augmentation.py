"""Batch augmentation: the paper's loop over copies, what is counted, and the warning where copies are the same."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from training import (
    DIFFERENT,
    EXACT,
    descend,
    flat,
    furthest,
    images,
    normalised,
    sgd,
    single_thread,
    trainer,
)

from batchkern.errors import UserError
from batchkern.seeding import generator
from batchkern.strategies import BatchAugmentation, Cutout, HardBatches, Mixup, PassiveInjection

one_thread = single_thread()


def paper_loop(run, copies, mutation=""):
    """Each copy is cut out at a place of its own; the gradient is the mean over copies and samples (eq. 3)."""
    model = copy.deepcopy(run.initial)
    optimizer, weights, update = sgd(model), [], 0
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    for epoch in range(2):
        for rows in run.batches.epoch(epoch):
            numbers = generator(run.seed, "cutout", update)
            at_y, at_x = (torch.randint(6, (copies, len(rows)), generator=numbers) for _ in range(2))
            losses = []
            for m in range(copies):
                x, place = inputs[rows].clone(), 0 if mutation == "the same copies" else m
                for image, y, x0 in zip(x, at_y[place].tolist(), at_x[place].tolist(), strict=True):
                    image[:, max(y - 1, 0) : y + 2, max(x0 - 1, 0) : x0 + 2] = 0
                losses.append(F.cross_entropy(model(x), labels[rows]))
            total = torch.stack(losses)
            descend(optimizer, total.sum() if mutation == "summed" else total.mean())
            weights.append(flat(model))
            update += 1
    return weights


def test_each_update_is_the_papers():
    run = trainer([Cutout(3), BatchAugmentation(3)])
    row = run.fit()
    assert furthest(run.weights, paper_loop(run, 3)) <= EXACT
    for mutation in ("the same copies", "summed"):
        assert furthest(run.weights, paper_loop(run, 3, mutation)) > DIFFERENT
    assert row["updates"] == 12
    assert row["samples_seen"] == row["samples_forward"] == row["samples_backward"] == 3 * 88
    assert row["times_kept"] == [6] * 5


def test_the_trainers_augmentation_differs_from_copy_to_copy():
    run = trainer([BatchAugmentation(2)], augment="crop+flip", epochs=1)
    run.fit()
    rows = run.fed[0]
    assert torch.equal(rows[:8], rows[8:])
    x, target = run.feed.batch(rows, 0)
    assert torch.equal(target[:8], target[8:])
    assert not torch.equal(x[:8], x[8:])


def test_fixed_batches_are_copied_and_batches_of_another_set_are_not():
    passive = PassiveInjection(images(20, seed=5, classes=3), 3)
    run = trainer([passive, BatchAugmentation(2), Cutout(2), HardBatches(0.5)])
    row = run.fit()
    assert row["updates"] == 12
    assert row["passive_updates"] == 4
    assert all(torch.equal(a, b) for a, b in (rows.chunk(2) for rows in run.fed))
    assert row["samples_forward"] == row["samples_seen"] + 8 + 8 + 4 + 8  # of 20 rows of the passive set, and again


@pytest.mark.parametrize("others", [[], [PassiveInjection(images(20, seed=5, classes=3))]])
def test_copies_that_are_the_same_are_warned_of(others):
    with pytest.warns(UserWarning, match="BatchAugmentation: the copies of an image are all the same"):
        trainer([BatchAugmentation(2), *others])


@pytest.mark.parametrize(
    ("others", "augment"), [([], "flip"), ([Cutout(2)], "none"), ([Mixup()], "none"), ([Cutout()], "crop")]
)
def test_copies_that_differ_are_not(others, augment):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer([BatchAugmentation(2), *others], augment=augment)


@pytest.mark.parametrize("copies", [1, 0, 2.5])
def test_wrong_options_are_refused_at_once(copies):
    with pytest.raises(UserError, match="copies must be a whole number"):
        BatchAugmentation(copies)


def test_a_batch_names_the_next_one_with_its_copies():
    run = trainer([BatchAugmentation(3)], epochs=2, augment="flip")
    plan = list(run.plan())
    assert len(plan) > 2
    for batch, following in pairwise(plan):
        assert torch.equal(batch.ahead[0], following.indices)
    assert plan[-1].ahead == ()
