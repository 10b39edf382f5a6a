"""What a comparison concludes: intervals and tests by hand, and that a planted effect is found where none is not."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("statsmodels")

from batchkern.compare.report import costs
from batchkern.compare.statistics import converged, correct, first_reaching, interval, paired_difference
from batchkern.compare.summary import summarise


def test_interval_by_hand():
    mean, half = interval([0.90, 0.95, 0.97])
    assert mean == pytest.approx(0.94)
    deviation = math.sqrt((0.04**2 + 0.01**2 + 0.03**2) / 2)
    assert half == pytest.approx(4.302652729911275 * deviation / math.sqrt(3), rel=1e-9)  # a table's t for 2 degrees
    assert interval([0.9, 0.9])[1] == 0
    assert interval([0.9, 1.0])[1] == pytest.approx(12.706204736174694 * 0.05)
    assert interval([0.9]) == (0.9, None)


def test_paired_difference_by_hand():
    """Student's sleep data (1908): extra hours by two drugs in ten patients; its published t is 4.06, p 0.0028."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    difference = paired_difference(dict(enumerate(second)), dict(enumerate(first)))
    assert difference["mean"] == pytest.approx(1.58)
    assert difference["p"] == pytest.approx(0.00283, abs=5e-6)
    assert difference["half_width"] == pytest.approx(0.8798858, abs=1e-7)
    assert difference["seeds"] == 10


def test_only_common_seeds_are_paired():
    difference = paired_difference({0: 0.5, 1: 0.7, 3: 9.0}, {1: 0.6, 0: 0.2, 2: -9.0})
    assert (difference["mean"], difference["seeds"]) == (pytest.approx(0.2), 2)
    assert paired_difference({0: 0.5}, {1: 0.5}) is None
    alone = paired_difference({0: 0.5}, {0: 0.25})
    assert (alone["mean"], alone["half_width"], alone["p"]) == (0.25, None, None)


def test_differences_without_a_deviation_are_no_certainty():
    """Three times one test image more is three coins of one side, not an infinite t."""
    thrice = paired_difference({0: 0.5, 1: 0.75, 2: 0.25}, {0: 0.25, 1: 0.5, 2: 0.0})
    assert (thrice["mean"], thrice["half_width"], thrice["p"]) == (0.25, None, 0.25)
    assert paired_difference({0: 0.5, 1: 0.75}, {0: 0.5, 1: 0.75})["p"] == 1
    third = 1 / 3  # 0.1 + 0.2 and 0.3 differ in the last place, which is no deviation
    assert paired_difference({0: 0.1 + 0.2, 1: third}, {0: 0.3, 1: third})["p"] == 1


def test_holms_correction_by_hand():
    tests = [{"p": p, "p_corrected": None} for p in (0.01, 0.04, None, 0.03, 0.005)]
    correct(tests)
    # Sorted .005, .01, .03, .04 times 4, 3, 2, 1, none below the one before it.
    assert [test["p_corrected"] for test in tests] == [
        pytest.approx(0.03),
        pytest.approx(0.06),
        None,
        pytest.approx(0.06),
        pytest.approx(0.02),
    ]
    correct([{"p": None, "p_corrected": None}])


@pytest.mark.parametrize(
    ("losses", "epoch"),
    [
        ([2.0], 1),
        ([1.0, 1.0, 1.0], 1),
        ([3.0, 2.0, 1.0], 3),
        ([3.0, 1.02, 1.0, 1.0], 2),  # 1 % of a fall by 2
        ([3.0, 1.03, 1.0, 1.0], 3),
        ([1.0, 2.0, 0.5, 1.5], 3),  # the least, though it rises again
        ([1.0, 2.0, 3.0], 1),
    ],
)
def test_the_epoch_of_convergence(losses, epoch):
    assert converged(losses) == epoch


def test_first_reaching():
    assert first_reaching([0.1, 0.5, 0.4, 0.6], [10, 20, 30, 40], 0.5) == 20
    assert first_reaching([0.1, 0.5], [10, 20], 0.51) is None


# --- a whole table ---------------------------------------------------------------------------------------------------

ARMS = ("baseline", "a", "b", "c", "random")


def comparison(accuracies, seeds=5):
    """Settings and runs of arms that differ in their last accuracy alone: ``{arm: (seeds,)}``."""
    settings = {
        "budgets": ["updates"],
        "arms": list(accuracies),
        "seeds": list(range(seeds)),
        "controls": {"a": "random"} if "random" in accuracies else {},
        "arm_epochs": {arm: {"updates": 2} for arm in accuracies},
    }
    runs = [run(arm, seed, [0.1, float(values[seed])]) for arm, values in accuracies.items() for seed in range(seeds)]
    return settings, runs


def run(arm, seed, curve, *, epochs=2, error=None, forward=100, train=1.0, **more):
    updates = [10 * (n + 1) for n in range(len(curve))]
    samples = [forward * (n + 1) for n in range(len(curve))]
    final = {
        "test_accuracy": curve[-1],
        "train_set_accuracy": train,
        "updates": updates[-1],
        "samples_forward": samples[-1],
        "samples_backward": samples[-1],
        "seconds": 1.0 + seed,
        **more,
    }
    columns = {"test_accuracy": curve, "updates": updates, "samples_forward": samples, "samples_backward": samples}
    return {
        "arm": arm,
        "epochs": epochs,
        "seed": seed,
        "error": error,
        "curve": None if error else columns,
        "final": None if error else final,
    }


def found(accuracies, seeds=5):
    """The arms whose difference, to the baseline or to a control, counts as found."""
    entries = summarise(*comparison(accuracies, seeds))
    return {
        (entry["arm"], name)
        for entry in entries
        for name, test in entry["difference"].items()
        if test["p_corrected"] < 0.05
    }


def seeds_and_noise(numbers, effects, seeds=5, size=2000):
    """Accuracies as trainings give them: a good or bad seed for all arms, chance in each, in whole test images."""
    seed_effect = 0.01 * numbers.standard_normal(seeds)
    return {
        arm: np.round((0.9 + effect + seed_effect + 0.004 * numbers.standard_normal(seeds)) * size) / size
        for arm, effect in effects.items()
    }


@pytest.fixture
def quick(monkeypatch):
    """statsmodels collects garbage in each call, for a tenth of a second; here are hundreds."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def test_no_effect_is_found_where_none_is(quick):
    """In 200 comparisons of arms that differ by chance alone, with five tests each."""
    numbers = np.random.default_rng(0)
    wrong = sum(bool(found(seeds_and_noise(numbers, dict.fromkeys(ARMS, 0.0)))) for _ in range(200))
    assert wrong <= 19  # 5 % are 10, with a deviation of 3

    # What correction is for: one test in twenty would be wrong, and one comparison in five.
    uncorrected = 0
    for _ in range(200):
        entries = summarise(*comparison(seeds_and_noise(numbers, dict.fromkeys(ARMS, 0.0))))
        uncorrected += any(test["p"] < 0.05 for entry in entries for test in entry["difference"].values())
    assert uncorrected > 22


def test_a_planted_effect_is_found_and_no_other(quick):
    """A gain of five standard deviations of an arm's own chance, under seeds that vary more than that."""
    numbers = np.random.default_rng(1)
    tables = [found(seeds_and_noise(numbers, dict.fromkeys(ARMS, 0.0) | {"a": 0.02})) for _ in range(100)]
    assert sum(("a", "baseline") in table for table in tables) >= 80
    assert sum(("a", "control") in table for table in tables) >= 80
    assert sum(bool(table - {("a", "baseline"), ("a", "control")}) for table in tables) <= 12


def test_a_gain_that_its_control_has_too_is_not_the_selections(quick):
    numbers = np.random.default_rng(2)
    effects = dict.fromkeys(ARMS, 0.0) | {"a": 0.03, "random": 0.03}
    tables = [found(seeds_and_noise(numbers, effects, seeds=8), seeds=8) for _ in range(60)]
    assert sum({("a", "baseline"), ("random", "baseline")} <= table for table in tables) >= 55
    assert sum(("a", "control") in table for table in tables) <= 8


def test_a_summary_by_hand():
    runs = [
        run("baseline", 0, [0.5, 0.8, 0.7], train=0.9),
        run("baseline", 1, [0.5, 0.6, 0.6], train=0.9),
        run("baseline", 2, [0.5, 0.6, 0.9]),
        run("a", 0, [0.4, 0.9, 0.9], train=1.0, forward=50, passive_updates=4),
        run("a", 1, [0.4, 0.5, 0.5], train=0.9, forward=50, passive_updates=6),
        run("a", 2, [0.1], error="it broke"),
        run("a", 0, [0.7] * 6, epochs=6, forward=50),
        run("a", 1, [0.7] * 6, epochs=6, forward=50),
    ]
    settings = {
        "budgets": ["updates", "cost"],
        "arms": ["baseline", "a"],
        "seeds": [0, 1, 2],
        "controls": {},
        "arm_epochs": {"baseline": {"updates": 2, "cost": 2}, "a": {"updates": 2, "cost": 6}},
    }
    entries = {(entry["budget"], entry["arm"]): entry for entry in summarise(settings, runs)}
    assert list(entries) == [(budget, arm) for budget in ("updates", "cost") for arm in ("baseline", "a")]
    plain, a, longer = entries["updates", "baseline"], entries["updates", "a"], entries["cost", "a"]
    assert (plain["seeds"], a["seeds"], longer["seeds"]) == (3, 2, 2)
    assert a["failed"] == [{"seed": 2, "error": "it broke"}]
    assert longer["failed"] == plain["failed"] == []
    assert a["test_accuracy"]["values"] == [0.9, 0.5]
    assert a["gap"]["values"] == pytest.approx([0.1, 0.4])
    assert plain["difference"] == {}
    assert a["difference"]["baseline"]["mean"] == pytest.approx((0.2 - 0.1) / 2)
    # The best of the baseline are .8, .6 and .9, after 2, 2 and 3 of its epochs.
    # Who never gets there is the last of all: half of two seeds are no median.
    assert plain["reach"] == {"median": 2, "reached": 3, "seeds": 3, "values": [2, 2, 3]}
    assert a["reach"] == {"median": None, "reached": 1, "seeds": 2, "values": [2, None]}
    # At half the samples an epoch costs half of one of the baseline's; the second seed is there at once.
    assert longer["reach"] == {"median": None, "reached": 1, "seeds": 2, "values": [None, 0.5]}
    assert (plain["cost"], a["cost"], longer["cost"]) == (1, 0.5, 1)
    assert plain["converged"] is None
    for outcome, losses in zip(runs, [[3, 2, 1], [3, 1, 1], [3, 1, 1.1], [3, 2, 1], [3, 2, 1]], strict=False):
        outcome["curve"]["train_loss"] = losses
    converging = summarise(settings, runs)
    assert converging[0]["converged"] == {"median": 2, "values": [3, 2, 2]}
    assert converging[1]["converged"] == {"median": 3, "values": [3, 3]}
    assert {row[0]: row[2] for row in costs({"settings": settings, "summary": converging}, "updates")} == {
        "arm": "converged",
        "baseline": "2",
        "a (1 failed)": "3",
    }
    assert (plain["passive_updates"], a["passive_updates"]) == (None, 5)
    assert (plain["seconds"], a["seconds"]) == (2, 1.5)
    # p of a's two trainings against the baseline, and no other, were corrected together.
    p = sorted(entry["difference"]["baseline"]["p"] for entry in (a, longer))
    corrected = sorted(entry["difference"]["baseline"]["p_corrected"] for entry in (a, longer))
    assert corrected == pytest.approx([min(1, 2 * p[0]), max(min(1, 2 * p[0]), p[1])])


def test_one_training_in_two_budgets_is_one_test():
    settings, runs = comparison({"baseline": [0.5, 0.6, 0.5], "a": [0.55, 0.62, 0.6]}, seeds=3)
    once = summarise(settings, runs)[1]["difference"]["baseline"]
    settings |= {"budgets": ["updates", "cost"]}
    settings["arm_epochs"] = {arm: {"updates": 2, "cost": 2} for arm in settings["arms"]}
    twice = [entry["difference"]["baseline"] for entry in summarise(settings, runs) if entry["arm"] == "a"]
    assert twice == [once, once]
    assert once["p_corrected"] == once["p"]


def test_arms_without_a_run_have_no_figures():
    settings, runs = comparison({"baseline": [0.5], "a": [0.6]}, seeds=1)
    runs = [run("a", 0, [0.1], error="no")] + [outcome for outcome in runs if outcome["arm"] == "baseline"]
    entry = summarise(settings, runs)[1]
    assert entry["test_accuracy"] is entry["gap"] is entry["reach"] is entry["cost"] is None
    assert entry["difference"] == {"baseline": None}
    settings, runs = comparison({"baseline": [0.5], "a": [0.6]}, seeds=1)
    runs = [outcome for outcome in runs if outcome["arm"] == "a"] + [run("baseline", 0, [0.1], error="no")]
    entry = summarise(settings, runs)[1]
    assert entry["test_accuracy"]["mean"] == 0.6
    assert entry["reach"] is entry["cost"] is None
