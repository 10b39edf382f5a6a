"""SRIP: the paper's penalty with explicit matrices, its schedule, and what the metrics say of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
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
from batchkern.strategies import SRIP, Trimming
from batchkern.strategies.srip import spectral_deviation

one_thread = single_thread()


def paper_penalty(model, numbers, mutation=""):
    """For each layer W (S H C, M): u = A v, w = A u, ||w|| / ||u||, with A = W^T W - I."""
    total, starts = 0.0, iter(torch.randn(4 + 6 + 16 + 4, generator=numbers).split([4, 6, 16, 4]))
    for layer in (model.conv1, model.conv2, model.hidden, model.fc):
        v = next(starts)
        if isinstance(layer, nn.Conv2d):
            w = layer.weight.permute(2, 3, 1, 0).reshape(-1, layer.out_channels)
        elif mutation == "convolutions alone":
            continue
        else:
            w = layer.weight.T
        a = w.T @ w - (0 if mutation == "no identity" else torch.eye(w.shape[1]))
        if mutation == "the other side":
            a, v = w @ w.T - torch.eye(w.shape[0]), torch.randn(w.shape[0], generator=numbers)
        u = a @ v
        if mutation == "a constant vector":
            u = u.detach()
        sigma = (a @ u).norm() / u.norm()
        total = total + (sigma**2 if mutation == "squared" else sigma)
    return total


def paper_loop(run, factors, mutation=""):
    model = copy.deepcopy(run.initial)
    optimizer, weights, update = sgd(model), [], 0
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    run.penalties = []
    for epoch in range(run.run.epochs):
        for rows in run.batches.epoch(epoch):
            loss = F.cross_entropy(model(inputs[rows]), labels[rows])
            numbers = generator(run.seed, "srip", 0 if mutation == "drawn once" else update)
            penalty = paper_penalty(model, numbers, mutation)
            run.penalties.append((loss.item(), penalty.item(), len(rows)))
            descend(optimizer, loss + factors[epoch] * penalty)
            weights.append(flat(model))
            update += 1
    return weights


def test_each_update_is_the_papers():
    run = trainer([SRIP(0.1)])
    run.fit()
    for mutation in (
        "convolutions alone",
        "no identity",
        "the other side",
        "a constant vector",
        "squared",
        "drawn once",
    ):
        assert furthest(run.weights, paper_loop(run, (0.1, 0.1), mutation)) > DIFFERENT, mutation
    assert furthest(run.weights, paper_loop(run, (0.1, 0.1))) <= EXACT
    last = run.penalties[6:]
    assert run.history[1]["srip_sigma"] == pytest.approx(sum(p for _, p, _ in last) / 6, rel=1e-5)
    objective = sum(rows * (loss + 0.1 * p) for loss, p, rows in last) / 44
    assert run.history[1]["train_objective"] == pytest.approx(objective, rel=1e-5)
    assert run.history[1]["train_loss"] == pytest.approx(sum(rows * loss for loss, _, rows in last) / 44, rel=1e-5)


def test_with_trimming_and_the_papers_schedule():
    """Ten epochs: lambda falls at epochs 1, 2.5 and 3.5, and is 0 from epoch 6 on."""
    run = trainer([SRIP(), Trimming(0.5, 0.5)], epochs=10, batch_size=44)
    run.fit()
    model, factors = copy.deepcopy(run.initial), (0.1, 1e-3, 1e-3, 1e-4, 1e-6, 1e-6, 0, 0, 0, 0)
    optimizer, weights = sgd(model), []
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    for epoch, factor in enumerate(factors):
        (rows,) = run.batches.epoch(epoch)
        losses = F.cross_entropy(model(inputs[rows]), labels[rows], reduction="none")
        penalty = paper_penalty(model, generator(run.seed, "srip", epoch))
        descend(optimizer, losses.topk(22).values.mean() + factor * penalty)
        weights.append(flat(model))
    assert furthest(run.weights, weights) <= EXACT
    assert ["srip_sigma" in row for row in run.history] == [True] * 6 + [False] * 4


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [(0, 0.1), (19, 0.1), (20, 1e-3), (49, 1e-3), (50, 1e-4), (69, 1e-4), (70, 1e-6), (119, 1e-6), (120, 0), (199, 0)],
)
def test_lambda_in_200_epochs(epoch, factor):
    assert SRIP().factor(epoch / 200) == factor
    assert SRIP(0.3).factor(epoch / 200) == 0.3


def test_weights_that_are_an_isometry_cost_nothing():
    for rows, columns in ((4, 9), (6, 6)):
        weight = torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64)).Q.T.float().requires_grad_()
        sigma = spectral_deviation(weight, torch.randn(rows))
        assert sigma < 1e-5
    weight = torch.eye(5, requires_grad=True)  # exactly one, where norms have no gradient
    sigma = spectral_deviation(weight, torch.ones(5))
    sigma.backward()
    assert sigma == 0
    assert torch.equal(weight.grad, torch.zeros(5, 5))


def test_the_estimate_is_at_most_the_norm_and_equal_where_one_direction_stands_out():
    numbers = torch.Generator().manual_seed(2)
    weight = torch.randn(7, 3, 3, 3, generator=numbers)
    matrix = weight.flatten(1).double()
    deviation = matrix @ matrix.T - torch.eye(7)
    norm, start = float(torch.linalg.matrix_norm(deviation, 2)), torch.randn(7, generator=numbers)
    assert 0.5 * norm < float(spectral_deviation(weight, start)) < norm
    top = torch.linalg.eigh(deviation).eigenvectors[:, -1].float()
    assert float(spectral_deviation(weight, top)) == pytest.approx(norm, rel=1e-5)


def test_autocast_leaves_the_penalty_alone():
    strategy, run = SRIP(), fake_run()
    strategy.setup(run)
    exact = strategy.penalty(fake_step(run))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(strategy.penalty(fake_step(run)), exact)


@pytest.mark.parametrize("coefficient", [-0.1, float("inf")])
def test_wrong_options_are_refused_at_once(coefficient):
    with pytest.raises(UserError, match="coefficient must be a number of at least 0"):
        SRIP(coefficient)


def test_a_model_without_such_layers_is_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x.flatten(1)[:, :4] * self.scale

    with pytest.raises(UserError, match="srip needs a model with convolutions or linear layers"):
        trainer([SRIP()], Scaled())
    trainer([SRIP()], net(norm=True))
