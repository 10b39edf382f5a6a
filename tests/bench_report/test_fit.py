"""Fitted exponents against power laws that were planted, with an overhead at every size."""

from __future__ import annotations

import pytest

pytest.importorskip("jinja2")

from batchkern.bench_report.fit import growth

SIZES = [1000 * 4**step for step in range(8)]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("overhead", [0.0, 0.5, 1.0, 5.0])
def test_a_power_law_with_overhead(exponent, overhead):
    """Overhead in units of what the smallest size costs without it."""
    sizes = [1000 * 4**step for step in range(12)]
    fit = growth(sizes, [1e-4 * (overhead + (size / 1000) ** exponent) for size in sizes])
    assert fit.settled
    assert fit.exponent == pytest.approx(exponent, abs=0.05 * exponent)
    if overhead == 0:
        assert fit.exponent == pytest.approx(exponent, abs=1e-9)


def test_only_costs_of_ten_times_the_least_count():
    # Two decades of nothing, then a line: 10, 40, 160 and 640 are left, of slope 1.
    assert growth(SIZES, [1, 1, 1, 1, 10, 40, 160, 640]).exponent == pytest.approx(1)
    assert growth(SIZES, [1, 1, 1, 9, 11, 40, 160, 640]).exponent != pytest.approx(1, abs=1e-3)
    assert growth(SIZES, [1, 1, 50, 1, 10, 40, 160, 640]).exponent == pytest.approx(1)  # the 50 lies before a gap


def test_where_overhead_still_counts_it_says_so():
    fit = growth(SIZES[:4], [1, 1, 2, 4])  # the first three would have a quarter
    assert (fit.exponent, fit.settled) == (pytest.approx(0.5), False)
    assert growth(SIZES[:5], [1, 1, 1, 10, 40]).settled is False  # two are too few
    assert growth(SIZES[:3], [1, 4, 16]).exponent == pytest.approx(1)


def test_what_does_not_grow():
    assert growth(SIZES, [7.0] * 8).exponent == 0
    assert growth(SIZES, [7.0] * 8).settled
    assert growth(SIZES, [0] * 8).exponent == 0


def test_nothing_at_small_sizes():
    assert growth(SIZES, [0, 0, 0, 10, 40, 160, 640, 2560]).exponent == pytest.approx(1)
    assert growth(SIZES, [0, 0, 0, 0, 0, 0, 0, 3]) is None


def test_fewer_than_three_points():
    assert growth(SIZES, [1, 4]) is None
    assert growth(SIZES, [1, None, 4, None]) is None
    assert growth(SIZES, []) is None


def test_the_order_of_sizes_does_not_matter():
    costs = [3 + size**1.3 for size in SIZES]
    assert growth(SIZES[::-1], costs[::-1]) == growth(SIZES, costs)
