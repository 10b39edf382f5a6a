"""Optimizers and schedules by name and of the user's own; a state that does not fit is rejected."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from batchkern import optimizers
from batchkern.errors import UserError


@pytest.mark.parametrize(
    ("name", "cls", "options"),
    [
        ("sgd", torch.optim.SGD, {"lr": 0.3, "momentum": 0.7, "weight_decay": 0.01}),
        ("adam", torch.optim.Adam, {"lr": 0.3, "betas": (0.7, 0.999), "weight_decay": 0.01}),
        ("adamw", torch.optim.AdamW, {"lr": 0.3, "betas": (0.7, 0.999), "weight_decay": 0.01}),
    ],
)
def test_named_optimizers_get_the_options(name, cls, options):
    optimizer = optimizers.build_optimizer(name, [nn.Parameter(torch.zeros(2))], 0.3, 0.7, 0.01)
    assert type(optimizer) is cls
    assert {key: optimizer.param_groups[0][key] for key in options} == options


def test_a_function_makes_its_own_optimizer():
    weights = [nn.Parameter(torch.zeros(2))]
    made = torch.optim.RMSprop(weights)
    assert optimizers.build_optimizer(lambda parameters: made, weights, 0.1, 0.9, 0.0) is made


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: optimizers.build_optimizer("lion", [], 0.1, 0.9, 0.0), "optimizer must be one of sgd, adam, adamw"),
        (lambda: optimizers.check_rates(0.0, 0.9, 0.0), "lr must be above 0, got 0"),
        (lambda: optimizers.check_rates(float("nan"), 0.9, 0.0), "lr must be in"),
        (lambda: optimizers.check_rates(0.1, 1.5, 0.0), r"momentum must be in \[0, 1\], got 1.5"),
        (lambda: optimizers.pick_schedule("linear"), "schedule must be one of constant, cosine, step"),
    ],
)
def test_bad_settings_are_named(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def sgd(parameters, **options):
    return torch.optim.SGD(parameters, **{"lr": 0.1} | options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr": np.float64(0.5), "momentum": np.float32(0.5)}, {"lr": 0.5, "momentum": 0.5}),
        ({"weight_decay": np.float64(0.25), "nesterov": np.bool_(False)}, {"weight_decay": 0.25, "nesterov": False}),
    ],
)
def test_numbers_of_numpy_in_an_optimizer_become_pythons(options, expected):
    parameters = [nn.Parameter(torch.zeros(2))]
    built = optimizers.build_optimizer(lambda p: sgd(p, **options), parameters, 0.1, 0.9, 0.0)
    for group in (*built.param_groups, built.defaults):
        assert {name: (type(group[name]), group[name]) for name in expected} == {
            name: (type(value), value) for name, value in expected.items()
        }
    betas = (np.float64(0.75), 0.5)
    built = optimizers.build_optimizer(lambda p: torch.optim.Adam(p, betas=betas), parameters, 0.1, 0.9, 0.0)
    assert [type(beta) for beta in built.param_groups[0]["betas"]] == [float, float]


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (lambda p: torch.optim.LBFGS(p), "optimizer must be one whose step needs no closure, got LBFGS"),
        (lambda p: sgd([nn.Parameter(torch.ones(1))]), "optimizer must train the parameters that it is given"),
        (lambda p: [sgd(p)], "what optimizer returns must be a torch.optim.Optimizer, got"),
    ],
)
def test_an_optimizer_that_cannot_train_the_model_is_refused(optimizer, said):
    with pytest.raises(UserError, match=said):
        optimizers.build_optimizer(optimizer, [nn.Parameter(torch.zeros(2))], 0.1, 0.9, 0.0)


def test_steps_are_given_as_text():
    schedule = optimizers.pick_schedule("step(milestones=(0.25, 0.75), gamma=0.1)")
    assert [schedule(progress) for progress in (0, 0.24, 0.25, 0.75)] == pytest.approx([1, 1, 0.1, 0.01])
    with pytest.raises(
        UserError, match=r"schedule must be one of constant, cosine, step, step\(mile.*got 'step\(30\)'"
    ):
        optimizers.pick_schedule("step(30)")


def test_what_a_schedule_returns_becomes_a_float_or_is_refused():
    schedule = optimizers.pick_schedule(lambda progress: np.float32(0.5) if progress < 0.5 else None)
    assert (type(schedule(0.0)), schedule(0.0)) == (float, 0.5)
    with pytest.raises(UserError, match=r"schedule must return a factor on the learning rate, got None at 0.75"):
        schedule(0.75)
    with pytest.raises(UserError, match=r"schedule must return a factor .*, got nan at 0"):
        optimizers.pick_schedule(lambda progress: math.nan)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda kept: kept.pop("exp_avg"), "the optimizer's"),
        (lambda kept: kept.update(extra=torch.ones(3)), "the optimizer's"),
        (
            lambda kept: kept.update(exp_avg=torch.ones(2)),
            "the optimizer's exp_avg is not that of a parameter of shape",
        ),
        (lambda kept: kept.update(exp_avg_sq=1.5), "the optimizer's exp_avg_sq"),
        (lambda kept: kept.update(step=torch.tensor(-1.0)), "the optimizer's step"),
    ],
)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_state_of_an_optimizer_that_does_not_fit_is_refused(change, said, amsgrad):
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], amsgrad=amsgrad)
    weight.sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    optimizers.load_optimizer(optimizer, copy.deepcopy(state))
    change(state["state"][0])
    with pytest.raises(ValueError, match=said):
        optimizers.load_optimizer(optimizer, state)
