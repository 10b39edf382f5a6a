"""Wrong settings and data of a training raise one clear error each."""

import pytest
import torch

from batchkern import validation
from batchkern.data import TensorImages
from batchkern.errors import UserError


def images(rows, classes=2, channels=1):
    generator = torch.Generator().manual_seed(rows)
    pixels = torch.randint(256, (rows, channels, 8, 8), generator=generator, dtype=torch.uint8)
    return TensorImages(pixels, torch.arange(rows) % classes, [str(c) for c in range(classes)], name="made-up")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: validation.pick_device("gpu"), "device must be cpu, cuda or cuda:N, got 'gpu'"),
        (lambda: validation.check_counts(epochs=0), "epochs must be a whole number of at least 1, got 0"),
        (lambda: validation.check_counts(batch_size=1.5), "batch_size must be a whole number of at least 1, got 1.5"),
        (lambda: validation.check_data(images(8), images(8, channels=3), 4), r"test images are of shape \(3, 8, 8\)"),
        (lambda: validation.check_data(images(8), images(9, classes=3), 4), "test data have 3 classes"),
        (lambda: validation.check_data(images(8), images(8), 9), "batch_size is 9, but made-up has 8 samples"),
    ],
)
def test_bad_settings_are_named(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def test_a_comparison_in_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2: a comparison runs in one process.*batchkern train"):
        validation.check_one_process()
    monkeypatch.setenv("WORLD_SIZE", "1")
    validation.check_one_process()
