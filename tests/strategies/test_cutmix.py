"""CutMix: the paper's pseudo-code, the draws, and torchvision's CutMix."""

import copy
import math

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
    normalised,
    sgd,
    single_thread,
    trainer,
)

from batchkern.errors import UserError
from batchkern.seeding import generator
from batchkern.strategies import CutMix
from batchkern.strategies.cutmix import box_of, paste

one_thread = single_thread()


class Boxes:
    """Remembers the box of each update."""

    def __init__(self, strategy):
        self.drawn, draw = {}, strategy._box
        strategy._box = lambda step: self.drawn.setdefault(step.update, draw(step))


def paper_loop(run, boxes, mutation=""):
    """Pixel by pixel; the loss is weighed by how many of them are the image's own."""
    model = copy.deepcopy(run.initial)
    optimizer, weights, update = sgd(model), [], 0
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    for epoch in range(2):
        for rows in run.batches.epoch(epoch):
            x, y, box = inputs[rows].clone(), labels[rows], boxes.drawn[update]
            place = 0 if mutation == "paired once" and len(rows) == 8 else update
            partners = torch.randperm(len(rows), generator=generator(run.seed, "cutmix partners", place))
            own, inside = x.clone(), 0
            for i, j in [] if box is None else [(i, j) for i in range(box[0], box[2]) for j in range(box[1], box[3])]:
                x[:, :, i, j], inside = own[partners][:, :, i, j], inside + 1
            lam = (inside if mutation == "lambda of the box" else 36 - inside) / 36
            logits = model(own if mutation == "labels alone" else x)
            loss = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])
            descend(optimizer, loss)
            weights.append(flat(model))
            update += 1
    return weights


@pytest.mark.parametrize("probability", [1.0, 0.5])
def test_each_update_is_the_papers(probability):
    strategy = CutMix(probability=probability)
    boxes = Boxes(strategy)
    run = trainer([strategy])
    run.fit()
    assert (None in boxes.drawn.values()) == (probability < 1)
    assert furthest(run.weights, paper_loop(run, boxes)) <= EXACT
    for mutation in ("paired once", "lambda of the box", "labels alone"):
        assert furthest(run.weights, paper_loop(run, boxes, mutation)) > DIFFERENT


@pytest.mark.parametrize(
    ("weight", "y", "x", "box"),
    [
        (0.75, 10, 8, (5, 4, 15, 12)),  # a quarter of 20 x 16 is 10 x 8
        (0.75, 1, 15, (0, 11, 6, 16)),  # cut off by two sides
        (0.0, 10, 8, (0, 0, 20, 16)),
        (0.0, 0, 0, (0, 0, 10, 8)),
        (1.0, 7.3, 2.2, (7, 2, 7, 2)),  # nothing
        (0.91, 9.8, 4.7, (7, 2, 13, 7)),  # 6 x 4.8: 6.8 to 12.8, and 2.3 to 7.1
    ],
)
def test_boxes_by_hand(weight, y, x, box):
    assert box_of(20, 16, weight, y, x) == box


def test_lambda_becomes_the_share_that_is_left():
    own, others = torch.zeros(2, 3, 20, 16), torch.ones(2, 3, 20, 16)
    pasted, weight = paste(own, others, (0, 11, 6, 16))
    assert weight == pytest.approx(1 - 30 / 320)
    assert pasted.mean() == pytest.approx(30 / 320)
    assert own.sum() == 0


def test_draws_are_those_of_the_paper():
    """With uniform lambda the sides' ratio r has P(r < t) = t^2; centres are uniform, so boxes are cut off alike."""
    strategy, run = CutMix(), fake_run()
    run.shape = (1, 1000, 1000)
    boxes = torch.tensor([strategy._box(fake_step(run, update=i)) for i in range(2000)]).double() / 1000
    sides = boxes[:, 2:] - boxes[:, :2]
    # E of what is left of a side r around a uniform centre is r - r^2 / 4; E r = 2 / 3, E r^2 = 1 / 2.
    assert sides.mean(0).tolist() == pytest.approx([2 / 3 - 1 / 8] * 2, abs=5 * 0.25 / math.sqrt(2000))
    centre = boxes[:, :2] + boxes[:, 2:]
    assert (centre / 2).mean(0).tolist() == pytest.approx([0.5, 0.5], abs=5 * 0.3 / math.sqrt(2000))
    inside = ((boxes > 0) & (boxes < 1)).all(1)  # such a box is square
    assert (sides[inside, 0] - sides[inside, 1]).abs().max() <= 0.001 + 1e-9
    assert strategy._box(fake_step(run, update=3)) == strategy._box(fake_step(run, update=3))
    other = fake_run(seed=1)
    other.shape = run.shape
    assert strategy._box(fake_step(run, update=3)) != strategy._box(fake_step(other, update=3))


def test_batches_are_mixed_with_the_probability():
    strategy, run = CutMix(probability=0.3), fake_run()
    mixed = sum(strategy._box(fake_step(run, update=i)) is not None for i in range(2000))
    assert abs(mixed - 600) < 4 * math.sqrt(2000 * 0.3 * 0.7)


def test_torchvisions_cutmix_with_the_same_box_and_partners(monkeypatch):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    numbers = torch.Generator().manual_seed(3)
    x, y = torch.randn(8, 3, 12, 9, generator=numbers), torch.randint(4, (8,), generator=numbers)
    theirs, run, strategy = v2.CutMix(alpha=1.0, num_classes=4), fake_run(), CutMix()
    monkeypatch.setattr(torch, "randperm", lambda rows, generator: torch.arange(rows).roll(1))
    for seed in range(5):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            params = theirs.make_params([x]) | {"labels": y, "batch_size": 8}
        x1, y1, x2, y2 = params["box"]
        strategy._box = lambda step, box=(y1, x1, y2, x2): box
        ours = strategy.transform(fake_step(run), torch.arange(8), x, y, lambda places: (x[places], y[places]))
        for own, other in zip(ours, (theirs.transform(x, params), theirs.transform(y, params)), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"alpha": 0.0}, "alpha"), ({"probability": 0.0}, "probability"), ({"probability": 1.5}, "probability")],
)
def test_wrong_options_are_refused_at_once(options, named):
    with pytest.raises(UserError, match=f"{named} must be"):
        CutMix(**options)
