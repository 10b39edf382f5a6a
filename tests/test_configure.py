"""What a training is given: refused with a sentence, or turned into what it says."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from batchkern import configure
from batchkern.data import TensorImages
from batchkern.errors import UserError


def images(rows, classes=2, channels=1):
    generator = torch.Generator().manual_seed(rows)
    pixels = torch.randint(256, (rows, channels, 8, 8), generator=generator, dtype=torch.uint8)
    return TensorImages(pixels, torch.arange(rows) % classes, [str(c) for c in range(classes)], name="made-up")


@pytest.mark.parametrize(
    ("name", "cls", "options"),
    [
        ("sgd", torch.optim.SGD, {"lr": 0.3, "momentum": 0.7, "weight_decay": 0.01}),
        ("adam", torch.optim.Adam, {"lr": 0.3, "betas": (0.7, 0.999), "weight_decay": 0.01}),
        ("adamw", torch.optim.AdamW, {"lr": 0.3, "betas": (0.7, 0.999), "weight_decay": 0.01}),
    ],
)
def test_named_optimizers_get_the_options(name, cls, options):
    optimizer = configure.build_optimizer(name, [nn.Parameter(torch.zeros(2))], 0.3, 0.7, 0.01)
    assert type(optimizer) is cls
    assert {key: optimizer.param_groups[0][key] for key in options} == options


def test_a_function_makes_its_own_optimizer():
    weights = [nn.Parameter(torch.zeros(2))]
    made = torch.optim.RMSprop(weights)
    assert configure.build_optimizer(lambda parameters: made, weights, 0.1, 0.9, 0.0) is made


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: configure.build_optimizer("lion", [], 0.1, 0.9, 0.0), "optimizer must be one of sgd, adam, adamw"),
        (lambda: configure.check_rates(0.0, 0.9, 0.0), "lr must be above 0, got 0"),
        (lambda: configure.check_rates(float("nan"), 0.9, 0.0), "lr must be in"),
        (lambda: configure.check_rates(0.1, 1.5, 0.0), r"momentum must be in \[0, 1\], got 1.5"),
        (lambda: configure.pick_schedule("linear"), "schedule must be one of constant, cosine, step"),
        (lambda: configure.pick_device("gpu"), "device must be cpu, cuda or cuda:N, got 'gpu'"),
        (lambda: configure.check_counts(epochs=0), "epochs must be a whole number of at least 1, got 0"),
        (lambda: configure.check_counts(batch_size=1.5), "batch_size must be a whole number of at least 1, got 1.5"),
        (lambda: configure.check_data(images(8), images(8, channels=3), 4), r"test images are of shape \(3, 8, 8\)"),
        (lambda: configure.check_data(images(8), images(9, classes=3), 4), "test data have 3 classes"),
        (lambda: configure.check_data(images(8), images(8), 9), "batch_size is 9, but made-up has 8 samples"),
    ],
)
def test_bad_settings_are_named(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def test_a_comparison_in_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2: a comparison runs in one process.*batchkern train"):
        configure.check_one_process()
    monkeypatch.setenv("WORLD_SIZE", "1")
    configure.check_one_process()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), r"logits of shape \(batch, 2\), got \(2, 3\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(10, 2)), r"cannot take images of shape \(1, 8, 8\)"),
        (nn.LSTM(8, 8), "cannot take images|must give logits"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(model, sentence):
    with pytest.raises(UserError, match=sentence):
        configure.check_model(model, torch.zeros(2, 1, 8, 8), 2, ())


def test_checking_a_model_leaves_it_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    configure.check_model(model, torch.zeros(2, 1, 8, 8), 2, ())
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_descriptions_tell_data_sets_apart():
    a, b, c = images(8), images(8), images(8)
    b.labels = b.labels.flip(0)
    c.images = 255 - c.images
    assert configure.describe_data(a) == configure.describe_data(images(8))
    assert configure.describe_data(a) != configure.describe_data(b)
    assert configure.describe_data(a) != configure.describe_data(c)
    assert configure.describe_data(a)["shape"] == [1, 8, 8]
    assert configure.describe_model(nn.Linear(3, 2)) == "Linear with 8 parameters"


# --- optimizers and schedules of the user's -------------------------------------------------------------------------


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
    built = configure.build_optimizer(lambda p: sgd(p, **options), parameters, 0.1, 0.9, 0.0)
    for group in (*built.param_groups, built.defaults):
        assert {name: (type(group[name]), group[name]) for name in expected} == {
            name: (type(value), value) for name, value in expected.items()
        }
    betas = (np.float64(0.75), 0.5)
    built = configure.build_optimizer(lambda p: torch.optim.Adam(p, betas=betas), parameters, 0.1, 0.9, 0.0)
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
        configure.build_optimizer(optimizer, [nn.Parameter(torch.zeros(2))], 0.1, 0.9, 0.0)


def test_steps_are_given_as_text():
    schedule = configure.pick_schedule("step(milestones=(0.25, 0.75), gamma=0.1)")
    assert [schedule(progress) for progress in (0, 0.24, 0.25, 0.75)] == pytest.approx([1, 1, 0.1, 0.01])
    with pytest.raises(
        UserError, match=r"schedule must be one of constant, cosine, step, step\(mile.*got 'step\(30\)'"
    ):
        configure.pick_schedule("step(30)")


def test_what_a_schedule_returns_becomes_a_float_or_is_refused():
    schedule = configure.pick_schedule(lambda progress: np.float32(0.5) if progress < 0.5 else None)
    assert (type(schedule(0.0)), schedule(0.0)) == (float, 0.5)
    with pytest.raises(UserError, match=r"schedule must return a factor on the learning rate, got None at 0.75"):
        schedule(0.75)
    with pytest.raises(UserError, match=r"schedule must return a factor .*, got nan at 0"):
        configure.pick_schedule(lambda progress: math.nan)


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
    configure.load_optimizer(optimizer, copy.deepcopy(state))
    change(state["state"][0])
    with pytest.raises(ValueError, match=said):
        configure.load_optimizer(optimizer, state)


# --- models in training ---------------------------------------------------------------------------------------------


class InTraining(nn.Module):
    """Gives ``change(logits)`` in training."""

    def __init__(self, change):
        super().__init__()
        self.fc, self.change = nn.Linear(64, 2), change
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += self.training
        logits = self.fc(x.flatten(1))
        return self.change(logits) if self.training else logits


def least(model, *, world=1, batch_size=4):
    return configure.least_rows(model, torch.zeros(2, 1, 8, 8), 2, (), torch.device("cpu"), world, batch_size)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda z: (z, z), "in training, too, got tuple"),
        (lambda z: z[:0], r"in training, too, got torch.float32 of shape \(0, 2\) for a batch of 1"),
        (lambda z: z @ torch.ones(3, 2), r"cannot take images of shape \(1, 8, 8\) in training: mat1 and mat2"),
        (lambda z: z.long(), "in training, too, got torch.int64"),
        (lambda z: z.detach(), "logits in training have no gradient"),
    ],
)
def test_a_model_that_does_something_else_in_training_is_refused(change, said):
    with pytest.raises(UserError, match=said):
        least(InTraining(change))


def test_looking_at_a_model_in_training_leaves_it_and_torchs_generator_as_they_were():
    model, before = InTraining(nn.Dropout(0.5)).eval(), torch.get_rng_state()
    assert least(model) == 1
    assert model.calls == 0
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda z: nn.functional.batch_norm(z, None, None, training=True),
        lambda z: nn.functional.batch_norm(z.squeeze(), None, None, training=True),  # without rows where there is one
    ],
)
def test_batch_norm_that_is_no_module_needs_two_rows_too(change):
    assert least(InTraining(change), world=2) == 3
    with pytest.raises(UserError, match="batch_size is 2, but the model, as by batch norm, needs 3 rows"):
        least(InTraining(change), world=2, batch_size=2)
