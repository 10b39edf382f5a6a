"""Options of strategies: numbers and flags of any kind that Python has, and no other."""

from fractions import Fraction

import numpy as np
import pytest
from training import images

from batchkern.errors import UserError
from batchkern.strategies import (
    HardBatches,
    PassiveInjection,
    RandomSelection,
    Stepwise,
    StochasticAugmentation,
    Trimming,
)


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (Trimming, {"end": np.float32(0.25), "above": np.float64(2)}, {"end": 0.25, "above": 2.0}),
        (HardBatches, {"delta": Fraction(1, 4)}, {"delta": 0.25}),
        (RandomSelection, {"delta": np.float16(0.5)}, {"delta": 0.5}),
        (StochasticAugmentation, {"gaussian": np.int64(3), "eta": 1}, {"gaussian": 3, "eta": 1}),
        (
            Stepwise,
            {"fractions": [np.float32(0.5), 1], "batch_multiples": np.array([1, 2]).tolist()},
            {"fractions": (0.5, 1), "batch_multiples": (1, 2)},
        ),
        (PassiveInjection, {"passive": images(8), "every": np.int32(7)}, {"every": 7}),
    ],
)
def test_numbers_become_pythons(cls, options, expected):
    strategy = cls(**options)
    found = {name: getattr(strategy, name) for name in expected}
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (HardBatches, {"delta": None}, "delta must be a number, got None"),
        (RandomSelection, {"end": "x"}, "end must be a number, got 'x'"),
        (Trimming, {"start": True}, "start must be a number, got True"),
        (Trimming, {"above": 10**400}, "above must be a number, got 1000"),
        (Trimming, {"skip": float("nan")}, "skip must be a number, got nan"),
        (StochasticAugmentation, {"omega": [1]}, r"omega must be a number, got \[1\]"),
        (StochasticAugmentation, {"gaussian": 1.5}, "gaussian must be a whole number, got 1.5"),
        (StochasticAugmentation, {"vote": "no"}, "vote must be True or False, got 'no'"),
        (StochasticAugmentation, {"two_step": 1}, "two_step must be True or False, got 1"),
        (StochasticAugmentation, {"layers": 3}, r"layers must be a tuple, such as \(a, b\), got 3"),
        (Stepwise, {"fractions": 0.5}, r"fractions must be a tuple, such as \(a, b\), got 0.5"),
        (Stepwise, {"fractions": "ab"}, "fractions must be a number, got 'a'"),
        (Stepwise, {"batch_multiples": (1, 2, 3, 4, 1.0)}, "batch_multiples must be a whole number, got 1.0"),
        (Stepwise, {"gamma": None}, "gamma must be a number, got None"),
    ],
)
def test_what_is_no_number_or_flag_is_refused_at_once(cls, options, said):
    with pytest.raises(UserError, match=said):
        cls(**options)
