"""Seeds that are derived from others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from batchkern.errors import UserError
from batchkern.seeding import derived_seed, generator


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ((3, "a", 1), 6471893753174027592),
        ((-1, "a", 1), 6550763763829745880),
        ((10**40, "a", 1), 3405256170159853070),
        ((0, "order"), 7267664299586512972),
    ],
)
def test_numbers_are_pinned(place: tuple[Any, ...], expected: int) -> None:
    # Runs that are resumed, and results that are reproduced, hang on them.
    assert derived_seed(*place) == expected


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32, torch.tensor, int])
def test_a_number_is_the_same_in_every_type(kind: Any) -> None:
    assert derived_seed(kind(3), "a", 1) == derived_seed(3, "a", kind(1)) == 6471893753174027592
    assert generator(kind(3), "a", 1).initial_seed() == 6471893753174027592


@pytest.mark.parametrize("seed", [3.0, np.float64(3), float("nan"), "3", b"3", None, True, [3], np.array([3, 4])])
def test_seeds_that_are_none(seed: Any) -> None:
    with pytest.raises(UserError, match="seed must be a whole number, got "):
        derived_seed(seed, "a", 1)
