"""Schedules: what they give at the ends, in between, and what they refuse."""

import math
import pickle

import pytest
import torch

from batchkern import schedules
from batchkern.description import describe_choice
from batchkern.errors import UserError


@pytest.mark.parametrize("epochs", [2, 3, 33, 150])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.2), (0.2, 1.0), (0.7, 0.1), (0.3, 0.3)])
def test_linear(start, end, epochs):
    values = [schedules.linear(start, end)(epoch, epochs) for epoch in range(epochs)]
    assert (values[0], values[-1]) == (start, end)  # exactly
    assert values == pytest.approx([start + (end - start) * e / (epochs - 1) for e in range(epochs)])
    assert all(min(start, end) <= value <= max(start, end) for value in values)
    assert values == sorted(values, reverse=start > end)


def test_linear_with_one_epoch_is_its_start():
    assert schedules.linear(1.0, 0.2)(0, 1) == 1.0


def test_stages():
    value = schedules.stages({5: 0.3, 0: 1.0, 2: 0.5})
    assert [value(epoch, 7) for epoch in range(7)] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.3, 0.3]
    with pytest.raises(UserError, match=r"epoch 0, got epochs \[1, 3\]"):
        schedules.stages({3: 0.5, 1: 1.0})


def test_every():
    due = schedules.every(3)
    assert [n for n in range(1, 11) if due(n)] == [3, 6, 9]
    assert all(schedules.every(1)(n) for n in range(1, 5))


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "3"])
def test_every_refuses(count):
    with pytest.raises(UserError, match="every must be a whole number"):
        schedules.every(count)


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_bernoulli(probability):
    fires, generator = schedules.bernoulli(probability), torch.Generator().manual_seed(0)
    drawn = sum(fires(generator) for _ in range(2000))
    assert abs(drawn - 2000 * probability) <= 4 * math.sqrt(2000 * probability * (1 - probability))


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_bernoulli_refuses(probability):
    with pytest.raises(UserError, match="probability"):
        schedules.bernoulli(probability)


def test_rates():
    at = [0.0, 0.25, 1 / 3, 0.5, 2 / 3, 0.999]
    assert [schedules.constant()(p) for p in at] == [1.0] * 6
    assert [schedules.cosine()(p) for p in at] == pytest.approx([(1 + math.cos(math.pi * p)) / 2 for p in at])
    assert [schedules.step()(p) for p in at] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert [schedules.step((0.5,), 0.1)(p) for p in at] == [1.0, 1.0, 1.0, 0.1, 0.1, 0.1]
    assert set(schedules.RATES) == {"constant", "cosine", "step"}


def test_a_step_schedule_reaches_a_worker_and_says_its_numbers():
    schedule = schedules.step((0.2, 0.9), 0.1)
    sent = pickle.loads(pickle.dumps(schedule))
    assert [sent(p) for p in (0.1, 0.2, 0.95)] == pytest.approx([1, 0.1, 0.01])
    assert describe_choice(schedule) == "step(milestones=(0.2, 0.9), gamma=0.1)"


@pytest.mark.parametrize("per_epoch", [1, 7, 391])
def test_step_decays_at_epochs_50_and_100_of_150(per_epoch):
    """The trimming paper's; neither milestone may come an update late by rounding."""
    total = 150 * per_epoch
    factors = [schedules.step()(update / total) for update in range(total)]
    assert factors == [1.0] * 50 * per_epoch + [0.5] * 50 * per_epoch + [0.25] * 50 * per_epoch


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("step(milestones=(0.3, 0.6, 0.9), gamma=0.1)", schedules.step((0.3, 0.6, 0.9), 0.1)),
        (" step( milestones = (.5,) ) ", schedules.step((0.5,), 0.5)),
        ("step(milestones=(), gamma=2)", schedules.step((), 2.0)),
        ("step(gamma=0.1)", None),
        ("step(milestones=0.5)", None),
        ("step(milestones=(0.5, x))", None),
        ("step(milestones=(0.5,), gamma=0.1, x=1)", None),
        ("cosine(milestones=(0.5,))", None),
    ],
)
def test_steps_of_ones_own(text, expected):
    assert schedules.parse_step(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step(milestones=(0.6, 0.3))", r"milestones must increase within \(0, 1\), .* got \(0.6, 0.3\)"),
        ("step(milestones=(30, 60))", r"milestones must increase within \(0, 1\)"),
        ("step(milestones=(nan,))", r"milestones must increase within"),
        ("step(milestones=(0.5,), gamma=0)", "gamma must be a number above 0, got 0"),
        ("step(milestones=(0.5,), gamma=inf)", "gamma must be a number above 0, got inf"),
    ],
)
def test_impossible_steps(text, said):
    with pytest.raises(UserError, match=said):
        schedules.parse_step(text)
