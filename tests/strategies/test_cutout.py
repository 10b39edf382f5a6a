"""Cutout: the paper's loop, where the squares lie, and what is refused."""

import copy

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
    normalised,
    sgd,
    single_thread,
    trainer,
)

from batchkern.errors import UserError
from batchkern.seeding import generator
from batchkern.strategies import Cutout
from batchkern.strategies.cutout import cut_out

one_thread = single_thread()


def centres(seed, update, rows, height=6, width=6):
    numbers = generator(seed, "cutout", update)
    return [torch.randint(side, (rows,), generator=numbers).tolist() for side in (height, width)]


def paper_loop(run, size, mutation=""):
    """One square an image, by hand: the part of it that lies in the image becomes zero, the mean."""
    model = copy.deepcopy(run.initial)
    optimizer, weights, update = sgd(model), [], 0
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    for epoch in range(2):
        for rows in run.batches.epoch(epoch):
            x = inputs[rows]
            at_y, at_x = centres(run.seed, 0 if mutation == "drawn once" else update, len(rows))
            for image, y, x0 in zip(x, at_y, at_x, strict=True):
                if mutation == "one for all":
                    y, x0 = at_y[0], at_x[0]
                if mutation == "inside":
                    y, x0 = min(max(y, size // 2), 6 - size // 2), min(max(x0, size // 2), 6 - size // 2)
                top, left = y - size // 2, x0 - size // 2
                image[:, max(top, 0) : top + size, max(left, 0) : left + size] = 1.0 if mutation == "white" else 0.0
            descend(optimizer, F.cross_entropy(model(x), labels[rows]))
            weights.append(flat(model))
            update += 1
    return weights


@pytest.mark.parametrize("size", [3, 4])
def test_each_update_is_the_papers(size):
    run = trainer([Cutout(size)])
    run.fit()
    assert furthest(run.weights, paper_loop(run, size)) <= EXACT
    for mutation in ("drawn once", "one for all", "inside", "white"):
        assert furthest(run.weights, paper_loop(run, size, mutation)) > DIFFERENT


def test_by_default_half_of_the_shorter_side():
    shape = (1, 9, 6)
    data = images(12, shape=shape)
    strategy = Cutout()
    run = fake_run()
    run.shape = shape
    strategy.setup(run)
    _, target = data.images, data.labels
    changed, same = strategy.transform(fake_step(run, rows=12), torch.arange(12), torch.ones(12, *shape), target, None)
    assert same is target
    ys, xs = centres(run.seed, 0, 12, 9, 6)
    for image, y, x in zip(changed[:, 0], ys, xs, strict=True):
        zeros = (image == 0).nonzero().tolist()
        assert zeros == [[a, b] for a in range(9) for b in range(6) if -1 <= a - y <= 1 and -1 <= b - x <= 1]


def test_every_pixel_is_a_centre_equally_often():
    strategy, run = Cutout(1), fake_run()
    strategy.setup(run)
    counts = torch.zeros(6, 6)
    for update in range(200):
        step = fake_step(run, update=update, rows=36)
        counts += (strategy.transform(step, torch.arange(36), torch.ones(36, 1, 6, 6), None, None)[0] == 0).sum((0, 1))
    assert counts.sum() == 7200
    assert ((counts - 200) ** 2 / 200).sum() < 66.6  # chi-square, 35 degrees of freedom, p = 0.001


def test_all_channels_are_cut_and_the_images_given_stay():
    x = torch.rand(2, 3, 4, 5) + 1
    before = x.clone()
    cut = cut_out(x, torch.tensor([[0, 4], [3, 1]]), 2)
    assert torch.equal(x, before)
    assert torch.equal(cut == 0, (cut == 0)[:, :1].expand(-1, 3, -1, -1))
    assert (cut[0, 0] == 0).nonzero().tolist() == [[0, 3], [0, 4]]
    assert (cut[1, 0] == 0).nonzero().tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]


def test_wrong_sizes_are_refused():
    for size in (0, -3):
        with pytest.raises(UserError, match="size must be a whole number of at least 1"):
            Cutout(size)
    with pytest.raises(UserError, match="size must be a whole number"):
        Cutout(2.5)
    with pytest.raises(UserError, match="size must be at most 6, the shorter side of the images, got 7"):
        trainer([Cutout(7)])
    trainer([Cutout(6)])
