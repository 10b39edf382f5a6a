"""Importance sampling against a loop over Algorithm 1, with the formulas of the paper."""

import copy
import math
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
    net,
    normalised,
    sgd,
    single_thread,
    trainer,
)

from batchkern.errors import UserError
from batchkern.seeding import generator
from batchkern.strategies import ImportanceSampling
from batchkern.strategies.importance_sampling import gradient_norms

ROWS, EPOCHS, RATIO, THRESHOLD = 44, 5, 3, 1.05
one_thread = single_thread()


def paper_loop(run, mutation="", *, smoothing=0.0, at_random=False):
    """The weights after each update, tau at the end of each epoch, and which updates sampled by importance."""
    model = copy.deepcopy(run.initial).train()
    scorer = copy.deepcopy(model).train()
    optimizer, updates, taus, sampled = sgd(model), [], [], []
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    tau = 0.0

    def losses_of(logits, rows):
        return F.cross_entropy(logits, labels[rows], reduction="none", label_smoothing=smoothing)

    def norms_of(logits, rows):
        """The gradient of each loss with respect to its logits, by autograd."""
        leaf = logits.detach().requires_grad_()
        losses_of(leaf, rows).sum().backward()
        return leaf.grad.norm(dim=1).double()

    for epoch in range(EPOCHS):
        for batch in run.batches.epoch(epoch):
            update = len(updates)
            sampled.append(tau > THRESHOLD)
            if sampled[-1]:
                numbers = generator(run.batches.seed, "presample", update + 1)
                rows = torch.randint(ROWS, (RATIO * len(batch),), generator=numbers)
                scorer.load_state_dict(model.state_dict())
                with torch.no_grad():
                    logits = scorer(inputs[rows])
                norms = norms_of(logits, rows)
                g = norms / norms.sum()
                p = torch.full_like(g, 1 / len(g)) if at_random else g
                draws = torch.multinomial(p, len(batch), True, generator=generator(run.seed, "importance", update))
                chosen = rows[draws]
                weights = torch.ones(len(batch)) if mutation == "no weights" else 1 / (len(g) * p[draws])
                losses = losses_of(model(inputs[chosen]), chosen)
                by = weights.sum() if mutation == "a weighted mean" else len(batch)
                descend(optimizer, (losses * weights.float()).sum() / by)
            else:
                logits = model(inputs[batch])
                descend(optimizer, losses_of(logits, batch).mean())
                norms = norms_of(logits, batch)
                g = norms / norms.sum()
            if mutation == "tau of losses":
                g = losses_of(logits.detach(), rows if sampled[-1] else batch)
                g = g / g.sum()
            u = 1 / len(g)
            now = (1 - ((g - u) ** 2).sum() / (g**2).sum()) ** -0.5
            tau = 0.9 * tau + 0.1 * float(now)
            updates.append(flat(model))
        taus.append(tau)
    return updates, taus, sampled


@pytest.mark.parametrize(("smoothing", "at_random"), [(0.0, False), (0.2, False), (0.0, True)])
def test_each_update_is_the_papers(smoothing, at_random):
    run = trainer(
        [ImportanceSampling(RATIO, THRESHOLD, at_random)], net(norm=True), epochs=EPOCHS, label_smoothing=smoothing
    )
    run.fit()
    updates, taus, sampled = paper_loop(run, smoothing=smoothing, at_random=at_random)
    assert 5 < sum(sampled) < len(sampled) - 5
    assert furthest(run.weights, updates) <= EXACT
    assert [row["tau"] for row in run.history] == pytest.approx(taus, abs=1e-5)
    sizes = [len(batch) for epoch in range(EPOCHS) for batch in run.batches.epoch(epoch)]
    scored = sum(RATIO * size for size, by_importance in zip(sizes, sampled, strict=True) if by_importance)
    row = run.history[-1]
    assert (row["updates"], row["samples_backward"], row["samples_kept"]) == (len(sizes), sum(sizes), sum(sizes))
    assert row["samples_forward"] == sum(sizes) + scored
    plain = sum(size for size, by_importance in zip(sizes, sampled, strict=True) if not by_importance)
    assert row["samples_seen"] == plain + scored


@cache
def finished():
    run = trainer([ImportanceSampling(RATIO, THRESHOLD)], epochs=EPOCHS)
    run.fit()
    return run


@pytest.mark.parametrize("mutation", ["no weights", "a weighted mean", "tau of losses"])
def test_a_wrong_rule_would_show(mutation):
    assert furthest(finished().weights, paper_loop(finished())[0]) <= EXACT
    assert furthest(finished().weights, paper_loop(finished(), mutation)[0]) > DIFFERENT


def test_the_expected_gradient_is_that_of_the_presampled_batch():
    """Over many draws from one presampled batch, to within four of the mean's deviations."""
    strategy, run = ImportanceSampling(3, 1.0), fake_run()
    strategy.setup(run)
    strategy.tau = 2.0
    numbers = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 4, generator=numbers)
    target = torch.randint(4, (12,), generator=numbers)
    losses = F.cross_entropy(logits, target, reduction="none")
    norms = gradient_norms(logits, target)
    means = []
    for update in range(3000):
        step = fake_step(run, update=update, rows=12)
        rows = strategy.narrow(step, lambda: norms)
        assert len(rows) == step.kept == 4
        means.append(float((losses[rows] * strategy.weights).mean()))
    means = torch.tensor(means)
    assert abs(float(means.mean() - losses.mean())) < 4 * float(means.std()) / math.sqrt(3000)
    assert float(means.std()) > 0


def test_the_default_threshold_is_where_a_speed_up_is_certain():
    """(B + 3 b) / (3 b)"""
    for ratio in (2, 3, 5):
        strategy = ImportanceSampling(ratio)
        strategy.setup(fake_run())
        strategy.tau = (ratio * 8 + 3 * 8) / (3 * 8)
        assert not strategy.active
        strategy.tau += 1e-6
        assert strategy.active


@pytest.mark.parametrize("broken", [0.0, math.nan])
def test_scores_without_a_proportion_are_drawn_from_evenly(broken):
    """All samples are right with certainty, or the training has diverged, which the loss then tells."""
    strategy, run = ImportanceSampling(3, 1.0), fake_run()
    strategy.setup(run)
    strategy.tau = 2.0
    step = fake_step(run, rows=12)
    strategy.narrow(step, lambda: torch.full((12,), broken))
    assert torch.equal(strategy.weights, torch.ones(4).double())
    step.scores = torch.full((12,), broken)
    strategy.observe(step, step.scores)
    assert strategy.tau == pytest.approx(0.9 * 2 + 0.1)


def test_norms_of_mixed_targets_and_of_ignored_rows():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    mixed = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0]])
    leaf = logits.clone().requires_grad_()
    F.cross_entropy(leaf, mixed, reduction="sum", label_smoothing=0.1).backward()
    assert torch.allclose(gradient_norms(logits, mixed, 0.1), leaf.grad.norm(dim=1), atol=1e-6)
    assert gradient_norms(logits, torch.tensor([0, -100, 3])).isfinite().all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ratio": 1}, "ratio must be .* got 1"),
        ({"threshold": -0.5}, "threshold must be a number of at least 0, got -0.5"),
    ],
)
def test_wrong_options_are_refused_at_once(options, sentence):
    with pytest.raises(UserError, match=sentence):
        ImportanceSampling(**options)
