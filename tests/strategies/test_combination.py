"""Which strategies may train together, and that those that may do."""

import pytest

from batchkern.errors import UserError
from batchkern.strategies import (
    HardBatches,
    PassiveInjection,
    RandomSelection,
    Stepwise,
    StochasticAugmentation,
    Trimming,
    check_combination,
    parse,
)
from batchkern.strategies.passive_injection import HEAD
from training import furthest, images, net, single_thread, trainer

PASSIVE = images(20, seed=5, classes=3)
one_thread = single_thread()

SENSIBLE = [
    "trimming+augmentation+passive(every=2)",
    "hard-batches(delta=0.5)+trimming",
    "stepwise(fractions=(0.5,1),batch_multiples=(2,1))+trimming(backward=compact)+passive(every=3)",
    "hard-batches(delta=0.5)+passive(every=2)+augmentation(omega=0)",
    "hard-batches(delta=0.5)+random",
    "random(select=batches,delta=0.5)+trimming+augmentation(two_step=True)+passive(every=4)",
    "stepwise(fractions=(0.5,1),batch_multiples=(1,2),reset_optimizer=True)+random+augmentation(per=epoch)",
    "augmentation(omega=0)+trimming(start=0.5,backward=compact)",
]
NONSENSE = [
    ("hard-batches+stepwise", "the batch plan"),
    ("hard-batches+random(select=batches)", "the batch plan"),
    ("stepwise+random(select=batches)", "the batch plan"),
    ("random(select=batches)+random(select=batches)", "the batch plan"),
    ("trimming+random", "the loss"),
    ("trimming+augmentation+trimming(end=0.3)", "the loss"),
    ("augmentation+augmentation(eta=1)", "the virtual samples"),
    ("passive+passive(every=3)", "the passive head"),
]


@pytest.mark.parametrize("text", SENSIBLE)
def test_sensible_combinations_train(text):
    run = trainer(parse(text, passive=PASSIVE), net(norm="compact" not in text), epochs=2)
    row = run.fit()
    assert len(run.history) == 2
    assert row["train_loss"] < 3
    assert row["samples_kept"] <= row["samples_seen"] == sum(map(len, run.fed))
    assert (row["samples_kept"] < row["samples_seen"]) == ("trimming" in text or "random" in text.split("+")) or "stepwise" in text
    if "passive" in text:
        assert row["passive_updates"] == row["updates"] // run.strategies[[s.name for s in run.strategies].index("passive")].every
    assert HEAD not in run.run.extras
    updates = row["updates"] + row.get("passive_updates", 0)
    assert len(run.weights) == updates + (row["augmented_updates"] if "two_step" in text else 0)


@pytest.mark.parametrize("text", SENSIBLE)
def test_the_order_in_which_they_are_listed_does_not_matter(text):
    strategies = [parse(text, passive=PASSIVE) for _ in range(2)]
    strategies[1].reverse()
    runs = [trainer(s, epochs=2) for s in strategies]
    for run in runs:
        run.fit()
    assert furthest(runs[0].weights, runs[1].weights) == 0


@pytest.mark.parametrize(("text", "thing"), NONSENSE)
def test_nonsense_is_refused_with_both_names(text, thing):
    with pytest.raises(UserError, match=f"both decide {thing}; use one of them"):
        parse(text, passive=PASSIVE)


@pytest.mark.parametrize(
    "strategies",
    [
        [HardBatches(), Stepwise()],
        [Trimming(), RandomSelection()],
        [RandomSelection("batches"), HardBatches()],
        [StochasticAugmentation(), StochasticAugmentation()],
        [PassiveInjection(PASSIVE), PassiveInjection(PASSIVE)],
    ],
)
def test_the_trainer_refuses_what_parse_refuses(strategies):
    names = " and ".join(s.name for s in strategies)
    with pytest.raises(UserError, match=f"{names} both decide"):
        check_combination(strategies)
    with pytest.raises(UserError, match=f"{names} both decide"):
        trainer(strategies)


def test_one_object_twice_is_refused():
    strategy = Trimming()
    with pytest.raises(UserError, match="both decide"):
        trainer([strategy, strategy])
