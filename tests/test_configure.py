"""What a training is given: refused with a sentence, or turned into what it says."""

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
    made = torch.optim.RMSprop([nn.Parameter(torch.zeros(2))])
    assert configure.build_optimizer(lambda parameters: made, [], 0.1, 0.9, 0.0) is made


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
        configure.check_model(model, (1, 8, 8), 2, torch.device("cpu"))


def test_checking_a_model_leaves_it_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    configure.check_model(model, (1, 8, 8), 2, torch.device("cpu"))
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
