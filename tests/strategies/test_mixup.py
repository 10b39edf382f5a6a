"""Mixup: the authors' loop, alone and with strategies that select, the draws, and torchvision's MixUp."""

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
    net,
    normalised,
    sgd,
    single_thread,
    trainer,
)

from batchkern.errors import UserError
from batchkern.seeding import generator
from batchkern.strategies import Mixup, RandomSelection, Step, Trimming, parse

one_thread = single_thread()


class Draws:
    """Remembers lambda and the partners of each update."""

    def __init__(self, strategy):
        self.drawn, draw = {}, strategy._draw
        strategy._draw = lambda step: self.drawn.setdefault(step.update, draw(step))


def mixed_run(*others, model=None, alpha=1.0, **options):
    strategy = Mixup(alpha)
    draws = Draws(strategy)
    run = trainer([strategy, *others], model, **options)
    run.fit()
    return run, draws


def paper_loop(run, draws, mutation="", *, smoothing=0.0, select=None):
    """The loss of mixed images is lambda times that with their own labels, and the rest with their partners'."""
    model = copy.deepcopy(run.initial).train()
    optimizer, weights, update, right = sgd(model), [], 0, []
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    for epoch in range(2):
        for rows in run.batches.epoch(epoch):
            lam, partners = draws.drawn[0 if mutation == "drawn once" and len(rows) == 8 else update]
            x, y = inputs[rows], labels[rows]
            if mutation == "lambda of the partner":
                lam = 1 - lam
            logits = model(x if mutation == "labels alone" else lam * x + (1 - lam) * x[partners])
            own, theirs = (
                F.cross_entropy(logits, t, reduction="none", label_smoothing=smoothing) for t in (y, y[partners])
            )
            losses = own if mutation == "images alone" else lam * own + (1 - lam) * theirs
            right.append((logits.argmax(1) == (y if lam >= 0.5 else y[partners])).float())
            descend(
                optimizer, losses.mean() if select is None else losses[select(losses.detach(), epoch, update)].mean()
            )
            weights.append(flat(model))
            update += 1
    run.right = torch.cat(right[6:])
    return weights


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_each_update_is_the_papers(smoothing):
    run, draws = mixed_run(model=net(norm=True), label_smoothing=smoothing)
    assert furthest(run.weights, paper_loop(run, draws, smoothing=smoothing)) <= EXACT
    assert sum(map(len, run.fed)) == 88  # partners are not fetched anew


def test_a_wrong_reading_would_show():
    run, draws = mixed_run()
    assert furthest(run.weights, paper_loop(run, draws)) <= EXACT
    for mutation in ("drawn once", "lambda of the partner", "labels alone", "images alone"):
        assert furthest(run.weights, paper_loop(run, draws, mutation)) > DIFFERENT


def test_a_prediction_is_right_where_it_is_the_class_of_the_most_weight():
    run, draws = mixed_run()
    paper_loop(run, draws)
    assert 0 < run.right.mean() < 1
    assert run.history[-1]["train_accuracy"] == pytest.approx(float(run.right.mean()))


@pytest.mark.parametrize("backward", ["masked", "compact"])
def test_mixed_losses_are_trimmed(backward):
    run, draws = mixed_run(Trimming(0.8, 0.3, backward=backward))

    def hardest(losses, epoch, update):
        return losses.topk(round((0.8, 0.3)[epoch] * len(losses))).indices

    assert furthest(run.weights, paper_loop(run, draws, select=hardest)) <= EXACT
    assert furthest(run.weights, paper_loop(run, draws)) > DIFFERENT


@pytest.mark.parametrize("backward", ["masked", "compact"])
def test_mixed_rows_are_chosen_at_random(backward):
    run, draws = mixed_run(RandomSelection("rows", 0.8, 0.3, backward=backward))

    def chosen(losses, epoch, update):
        order = torch.randperm(len(losses), generator=generator(run.seed, "random rows", update))
        return order[: round((0.8, 0.3)[epoch] * len(losses))]

    assert furthest(run.weights, paper_loop(run, draws, select=chosen)) <= EXACT


def test_trimming_by_another_order_takes_mixed_targets():
    run, draws = mixed_run(Trimming(0.5, 0.5, order="lowest"))

    def easiest(losses, epoch, update):
        return losses.topk(max(round(0.5 * len(losses)), 1), largest=False).indices

    assert furthest(run.weights, paper_loop(run, draws, select=easiest)) <= EXACT


# --- which rows are at hand, and other transforms ---------------------------------------------------------------------


@pytest.mark.parametrize("text", ["cutout+mixup(alpha=1)", "mixup(alpha=1)+cutout", "cutout(size=2)+cutmix"])
def test_rows_are_the_same_whichever_are_at_hand(text):
    """A rank's rows, those worth a full pass, in any order: those of the whole batch."""
    run = trainer(parse(text), augment="crop+flip")
    step = Step(run.run, next(iter(run.batches)), 0)
    whole_images, whole_target = run.updater._rows(step, torch.arange(8))
    assert whole_target.shape == (8, 4)
    assert not torch.equal(whole_images, run.feed.batch(step.batch.indices, 0)[0])
    for positions in ([0, 1, 2, 3], [4, 5, 6, 7], [6, 1], [3]):
        some, target = run.updater._rows(step, torch.tensor(positions))
        assert torch.equal(some, whole_images[positions])
        assert torch.equal(target, whole_target[positions])


def test_transforms_apply_in_the_order_given():
    """An image that is cut out and then mixed has half of the other image in its square, or is zero there."""
    parts = {}
    for text in ("cutout", "mixup(alpha=1)", "cutout+mixup(alpha=1)", "mixup(alpha=1)+cutout"):
        run = trainer(parse(text))
        parts[text] = run, Step(run.run, next(iter(run.batches)), 0)
    (run, step), everything = parts["cutout"], torch.arange(8)
    plain, labels = run.feed.batch(step.batch.indices, 0)
    cut, _ = run.updater._rows(step, everything)
    weight, partners = parts["mixup(alpha=1)"][0].strategies[0]._draw(step)
    first, _ = parts["cutout+mixup(alpha=1)"][0].updater._rows(step, everything)
    torch.testing.assert_close(first, weight * cut + (1 - weight) * cut[partners])
    then, target = parts["mixup(alpha=1)+cutout"][0].updater._rows(step, everything)
    torch.testing.assert_close(then, (weight * plain + (1 - weight) * plain[partners]).where(cut != 0, 0))
    classes = F.one_hot(labels, 4)
    torch.testing.assert_close(target, weight * classes + (1 - weight) * classes[partners])


# --- the draws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lambda_is_of_the_beta_distribution(alpha):
    strategy, run = Mixup(alpha), fake_run()
    drawn = torch.tensor([strategy._draw(fake_step(run, update=i))[0] for i in range(4000)]).double()
    expected = torch.from_numpy(pytest.importorskip("numpy").random.default_rng(1).beta(alpha, alpha, 400_000))
    places = torch.linspace(0.05, 0.95, 19).double()
    below = (drawn[:, None] < expected.quantile(places)).double().mean(0)
    assert (below - places).abs().max() < 0.031  # Kolmogorov's limit for 4000 numbers, p = 0.001


def test_partners_are_a_permutation_that_each_update_draws_anew():
    strategy, run = Mixup(), fake_run()
    partners = [strategy._draw(fake_step(run, update=i))[1] for i in range(300)]
    assert all(sorted(p.tolist()) == list(range(8)) for p in partners)
    counts = torch.stack(partners)[:, 0].bincount(minlength=8)
    assert ((counts - 37.5) ** 2 / 37.5).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001
    weight, again = strategy._draw(fake_step(run, update=7))
    assert torch.equal(again, partners[7])
    assert weight == strategy._draw(fake_step(run, update=7))[0]
    assert weight != strategy._draw(fake_step(fake_run(seed=1), update=7))[0]


def test_torchvisions_mixup_with_the_same_lambda_and_partners():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    run, strategy = fake_run(), Mixup()
    numbers = torch.Generator().manual_seed(3)
    x, y = torch.randn(8, 3, 5, 7, generator=numbers), torch.randint(4, (8,), generator=numbers)
    partners = torch.arange(8).roll(1)  # as torchvision pairs them
    strategy._draw = lambda step: (0.3, partners)
    ours = strategy.transform(fake_step(run), torch.arange(8), x, y, lambda places: (x[places], y[places]))
    theirs = v2.MixUp(alpha=1.0, num_classes=4)
    params = {"labels": y, "batch_size": 8, "lam": 0.3}
    expected = theirs.transform(x, params), theirs.transform(y, params)
    for own, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=EXACT)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), 1e308])
def test_wrong_options_are_refused_at_once(alpha):
    with pytest.raises(UserError, match="alpha must be (in|above)"):
        Mixup(alpha)
