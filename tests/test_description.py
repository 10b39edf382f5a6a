"""Descriptions of a config.json tell data and models apart."""

import torch
from torch import nn

from batchkern import description
from batchkern.data import TensorImages


def images(rows, classes=2, channels=1):
    generator = torch.Generator().manual_seed(rows)
    pixels = torch.randint(256, (rows, channels, 8, 8), generator=generator, dtype=torch.uint8)
    return TensorImages(pixels, torch.arange(rows) % classes, [str(c) for c in range(classes)], name="made-up")


def test_descriptions_tell_data_sets_apart():
    a, b, c = images(8), images(8), images(8)
    b.labels = b.labels.flip(0)
    c.images = 255 - c.images
    assert description.describe_data(a) == description.describe_data(images(8))
    assert description.describe_data(a) != description.describe_data(b)
    assert description.describe_data(a) != description.describe_data(c)
    assert description.describe_data(a)["shape"] == [1, 8, 8]
    assert description.describe_model(nn.Linear(3, 2)) == "Linear with 8 parameters"
