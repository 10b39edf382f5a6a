"""Models that do not fit their data are rejected, and checking leaves a model as it was."""

import pytest
import torch
from torch import nn

from batchkern import model_checks
from batchkern.errors import UserError


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
        model_checks.check_model(model, torch.zeros(2, 1, 8, 8), 2, ())


def test_checking_a_model_leaves_it_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model_checks.check_model(model, torch.zeros(2, 1, 8, 8), 2, ())
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


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
    return model_checks.least_rows(model, torch.zeros(2, 1, 8, 8), 2, (), torch.device("cpu"), world, batch_size)


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
    with pytest.raises(UserError, match=r"batch_size is 2, but the model \(perhaps its batch norm\) needs 3 rows"):
        least(InTraining(change), world=2, batch_size=2)
