"""Arms: their notation, the controls that match them, and the epochs for which they use a budget up."""

from __future__ import annotations

import pytest
from training import images, trainer

from batchkern.cli import _compare
from batchkern.compare import ARMS, control_of, split_arms, with_controls
from batchkern.compare.arms import forecast, matched_epochs
from batchkern.data import with_label_noise
from batchkern.errors import UserError
from batchkern.strategies import parse

PASSIVE = images(20, seed=5, classes=3)


def test_default_arms_are_the_baseline_and_all_strategies():
    strategies = [parse(arm, passive="digits") for arm in ARMS]
    assert strategies[0] == []
    names = [arm[0].name for arm in strategies[1:]]
    assert names == ["trimming", "hard-batches", "stepwise", "augmentation", "passive"]


@pytest.mark.parametrize(
    ("text", "arms"),
    [
        ("", []),
        ("baseline", ["baseline"]),
        (" baseline, trimming(end=0.3, start=0.9),", ["baseline", "trimming(end=0.3, start=0.9)"]),
        (
            "stepwise(fractions=(.5,1),batch_multiples=(1,2)),a+b",
            ["stepwise(fractions=(.5,1),batch_multiples=(1,2))", "a+b"],
        ),
        ("all, a", [*ARMS, "a"]),
    ],
)
def test_arms_in_one_text(text, arms):
    assert split_arms(text) == arms


@pytest.mark.parametrize("text", [",", " , ,", " "])
def test_commas_alone_are_no_arms(text):
    with pytest.raises(UserError, match=f"arms must be strategies joined by commas.*got '{text}'"):
        split_arms(text)


def test_the_baseline_by_any_name():
    assert _compare._chosen_arms([" baseline ", "trimming "], None, "digits") == (("baseline", "trimming"), None)
    assert [control_of(arm) for arm in ("", " baseline ", "\n")] == [None, None, None]
    assert with_controls((" baseline ", "stepwise")) == ("baseline", "stepwise")
    for empty in ("", "  "):
        with pytest.raises(UserError, match="arm must be a strategy, such as trimming, or baseline, got ''"):
            _compare._chosen_arms(["trimming", empty], None, "digits")


def test_arms_without_a_passive_set():
    """digits has one by default, anything else only what it is given."""
    assert _compare._chosen_arms([], None, "digits") == (ARMS, "photo-patches")
    assert _compare._chosen_arms([], None, "photo-patches") == (tuple(a for a in ARMS if "passive" not in a), None)
    assert _compare._chosen_arms([], "digits", "photo-patches") == (ARMS, "digits")
    assert _compare._chosen_arms(["trimming"], None, "digits") == (("trimming",), None)


# --- controls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "control"),
    [
        ("baseline", None),
        ("stepwise", None),
        ("augmentation+passive(every=3)", None),
        ("trimming", "random(select=rows)"),
        ("trimming(start=0.9,end=0.3)", "random(select=rows,start=0.9,end=0.3)"),
        ("trimming(backward=compact)", "random(select=rows,backward=compact)"),
        ("hard-batches", "random(select=batches)"),
        ("hard-batches(delta=0.5,order=index)", "random(select=batches,delta=0.5)"),
        ("trimming(end=0.3)+augmentation(eta=1)", "random(select=rows,end=0.3)+augmentation(eta=1)"),
        ("passive+hard-batches+trimming", "passive+random(select=batches)+random(select=rows)"),
        ("random(select=rows)", None),
        ("infobatch", "infobatch(at_random=True)"),
        ("cutout+infobatch(prune=0.3)", "cutout+infobatch(prune=0.3,at_random=True)"),
        ("selective-backprop(beta=2)", "selective-backprop(beta=2.0,at_random=True)"),
        ("importance(ratio=5)+srip", "importance(ratio=5,at_random=True)+srip"),
        ("rho(reference=cnn)", "rho(reference=cnn,at_random=True)"),
        ("small-loss", "small-loss(at_random=True)"),
        ("small-loss(warm_up=3, noise=0.20)+mixup", "small-loss(warm_up=3,at_random=True)+mixup"),
        ("small-loss(noise=0.3,at_random=True)", None),
        ("cutout+mixup+batch-augmentation+srip", None),
        ("cutmix+trimming(end=0.3)", "cutmix+random(select=rows,end=0.3)"),
    ],
)
def test_the_control_of_an_arm(arm, control):
    assert control_of(arm) == control
    if control:
        parse(control, passive="digits")


def test_the_baseline_comes_first_and_controls_last_each_once():
    arms = ["trimming", "augmentation", "baseline", "trimming(backward=auto)", "random(select=batches)", "hard-batches"]
    assert with_controls(arms) == (
        "baseline",
        "trimming",
        "augmentation",
        "trimming(backward=auto)",
        "random(select=batches)",
        "hard-batches",
        "random(select=rows)",
    )


def test_a_control_that_is_there_in_other_words_is_not_added():
    assert with_controls(["trimming", "random"]) == ("baseline", "trimming", "random")
    written = "random(select=batches, delta=0.20)"
    assert with_controls(["hard-batches", written]) == ("baseline", "hard-batches", written)


@pytest.mark.parametrize(
    "arm",
    [
        "trimming(end=0.3)",
        "trimming(end=0.3,backward=compact)",
        "hard-batches(delta=0.5)",
        "hard-batches(delta=0.4)+trimming",
        "importance(threshold=0)",
        "rho(fraction=0.4,reference_epochs=1)",
        "small-loss(noise=0.5,warm_up=2)",
    ],
)
def test_a_control_selects_as_much_as_its_arm(arm):
    """As many samples in each epoch, and in its masked form for as many passes."""
    runs = [trainer(parse(text), epochs=4) for text in (arm, control_of(arm))]
    for run in runs:
        run.fit()
    for own, control in zip(runs[0].history, runs[1].history, strict=True):
        assert own["updates"] == control["updates"]
        assert own["samples_kept"] == pytest.approx(control["samples_kept"], abs=8)  # one batch of 5 is the smaller
        if "compact" not in arm:
            assert own["samples_backward"] == pytest.approx(control["samples_backward"], abs=8)


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arm",
    [
        "baseline",
        "trimming(end=0.3)",
        "trimming(end=0.3,backward=compact)",
        "random(end=0.3,backward=compact)",
        "hard-batches(delta=0.4)",
        "stepwise(fractions=(.5,1),batch_multiples=(2,1))",
        "passive(every=3)",
        "passive(every=3,summed=True)+augmentation(two_step=True)",
        "augmentation(two_step=True)",
        "stepwise(fractions=(.5,1),batch_multiples=(1,2))+trimming(backward=compact)+passive(every=2)",
        "mixup+trimming(end=0.3,backward=compact)+srip",
        "cutout+batch-augmentation(copies=3)+passive(every=3)",
        "small-loss(noise=0.5,warm_up=2)",
        "importance(threshold=0,ratio=2)",
        "rho(fraction=0.4,reference_epochs=2)",
        "rho(fraction=0.4,reference_epochs=2,at_random=True)+augmentation(two_step=True)",
    ],
)
def test_a_forecast_is_what_the_training_then_counts(arm):
    foreseen = forecast(trainer(parse(arm, passive=PASSIVE), epochs=3))
    run = trainer(parse(arm, passive=PASSIVE), epochs=3)
    run.fit()
    assert foreseen.updates == run.counts.updates
    replays = "hard" in arm  # which batches are replayed, the smaller one among them, only losses tell
    assert foreseen.samples_forward == pytest.approx(run.counts.samples_forward, abs=8 * replays)
    assert foreseen.samples_backward == pytest.approx(run.counts.samples_backward, abs=8 * replays)
    assert foreseen.samples_backward > 0


def test_what_losses_decide_is_foreseen_by_made_up_ones():
    def foreseen(arm, train):
        return forecast(trainer(parse(arm), train=train, epochs=4))

    data = images(400)
    selected = foreseen("selective-backprop(history=8)", data)
    assert selected.samples_forward - selected.samples_backward == 1600
    # Among 8 losses, the one of rank k is selected with the probability k / 8; fewer than 16 wait at the end.
    assert abs(selected.samples_backward - 900) < 4 * 16.2 + 16
    pruned = 1600 - foreseen("infobatch(until=1)", data).samples_forward
    assert 1200 * 0.25 < pruned < 1200 * 0.5  # half of those below the mean, in three epochs: of more than 50 % of all
    sharp, noisy = (foreseen("importance", train) for train in (data, with_label_noise(data, 0.5, 0)))
    assert sharp.samples_backward == noisy.samples_backward == 1600
    assert sharp.samples_forward > noisy.samples_forward  # half of the gradients are large at the end


def matched(arm, budget, epochs=15, rows=40):
    def build(count):
        return trainer(parse(arm, passive=PASSIVE), train=images(rows), epochs=count)

    baseline = epochs * rows
    return matched_epochs(build, epochs, budget, {"updates": baseline / 8, "cost": 3 * baseline}[budget])


@pytest.mark.parametrize(
    ("arm", "updates", "cost"),
    [
        ("baseline", 15, 15),
        ("trimming", 15, 15),
        ("hard-batches(delta=0.4)", 15, 15),
        # Three quarters of the data: for as much work 20 epochs, 10 of 20 samples and 10 of 40.
        ("stepwise(fractions=(.5,1),batch_multiples=(1,1))", 19, 20),
        # A passive batch for each active one is twice the work, and no update more.
        ("passive(every=1)", 15, 8),
        ("cutout+batch-augmentation(copies=3)", 15, 5),
        ("augmentation(omega=0,two_step=True)", 15, 7),  # 7.5: of two as near, the shorter
        # Rows that were dropped by chance need no pass at all: at a quarter, four times as many epochs.
        ("random(start=0.25,end=0.25,backward=compact)", 15, 60),
        # Those that lose least need one forward pass of the three: 1 / 3 + 1 / 4.
        ("trimming(start=0.25,end=0.25,backward=compact)", 15, 26),
    ],
)
def test_epochs_that_use_a_budget_up(arm, updates, cost):
    assert matched(arm, "updates") == updates
    assert matched(arm, "cost") == cost


def test_the_nearest_number_of_epochs_is_taken():
    """Stepwise on 40 rows in batches of 8: 3, then 5 updates an epoch, in halves of the epochs."""
    arm = "stepwise(fractions=(.5,1),batch_multiples=(1,1))"

    def uses(epochs):
        return forecast(trainer(parse(arm), train=images(40), epochs=epochs)).updates

    best = matched(arm, "updates")
    assert all(abs(uses(best) - 75) <= abs(uses(other) - 75) for other in range(2, 40))


def test_an_arm_that_cannot_train_says_so():
    with pytest.raises(UserError, match="epochs must be at least 5"):
        matched("stepwise", "cost", epochs=3)


@pytest.mark.filterwarnings("ignore:the training has made no update")
def test_an_arm_that_makes_no_update_is_told():
    def build(epochs):
        return trainer(parse("selective-backprop(beta=60)"), epochs=epochs, batch_size=40)

    with pytest.raises(UserError, match="selective-backprop selects too few samples for an update in 1 epochs"):
        matched_epochs(build, 1, "updates", 2.0)
    run = build(1)
    with pytest.warns(UserWarning, match="the training has made no update, so the model is what it was"):
        run.fit()
