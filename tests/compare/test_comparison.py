"""What a comparison is of: the data of its runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from training import single_thread

pytest.importorskip("sklearn")

from batchkern.compare import Comparison
from batchkern.compare.comparison import RunOf, load_data
from batchkern.errors import UserError

one_thread = single_thread()


@pytest.fixture(autouse=True)
def fresh():
    load_data.cache_clear()
    yield
    load_data.cache_clear()


def data_of(**options):
    comparison = Comparison("digits", "cnn", Path("out"), arms=("baseline",), training={"epochs": 1}, **options)
    settings = [comparison.trainer(RunOf("baseline", 1, seed), write=False).settings for seed in (0, 1)]
    assert settings[0]["test"] == settings[1]["test"]
    return settings[0]["train"], settings[0]["test"]


def test_a_validation_set_takes_the_place_of_the_test_set():
    """The same images in every run; the training rows are taken of the rest; noise does not touch it."""
    train, test = data_of()
    assert (train["rows"], test["rows"]) == (1438, 359)
    rest, held = data_of(validation=0.25)
    assert (rest["rows"], held["rows"], held["name"]) == (1078, 360, "digits (validation)")
    assert held["images_crc32"] != test["images_crc32"]
    fewer, again = data_of(validation=0.25, train_rows=500, noise=0.5)
    assert (fewer["rows"], again) == (500, held)


def test_a_validation_set_that_is_none():
    with pytest.raises(UserError, match=r"^validation must be in \(0, 1\), got 1.5"):
        data_of(validation=1.5)
