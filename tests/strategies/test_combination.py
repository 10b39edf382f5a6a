"""Which strategies may train together, and that those that may do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_stochastic_augmentation import Draws, virtual_samples
from torch import nn
from training import (
    DIFFERENT,
    EXACT,
    flat,
    furthest,
    images,
    net,
    normalised,
    sgd,
    single_thread,
    trainer,
)

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

EPOCHS = 3
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
    "mixup+trimming+augmentation(two_step=True)+passive(every=2)",
    "hard-batches(delta=0.5)+cutmix(probability=0.5)+srip",
    "stepwise(fractions=(0.5,1),batch_multiples=(1,2))+mixup(alpha=1)+batch-augmentation(copies=2)+passive(every=3)",
    "cutout+batch-augmentation(copies=3)+random+srip(coefficient=0.01)",
    "mixup(alpha=1)+trimming(start=0.5,backward=compact)",
    "infobatch(until=1)+mixup+passive(every=2)+batch-augmentation(copies=2)",
    "selective-backprop(beta=0.5)+trimming(backward=compact)+passive(every=2)+mixup",
    "importance(threshold=0)+mixup+batch-augmentation(copies=2)+augmentation+passive(every=2)",
    "rho(fraction=0.5,reference_epochs=1)+cutout+batch-augmentation(copies=2)+augmentation+passive(every=2)",
    "hard-batches(delta=0.5)+small-loss(warm_up=1)+augmentation",
]
ONLY_WEIGHS = {"infobatch"}
"""Own the loss, and count every row of a batch."""
NONSENSE = [
    ("hard-batches+stepwise", "the batch plan"),
    ("hard-batches+random(select=batches)", "the batch plan"),
    ("stepwise+random(select=batches)", "the batch plan"),
    ("random(select=batches)+random(select=batches)", "the batch plan"),
    ("trimming+random", "the loss"),
    ("infobatch+stepwise", "the batch plan"),
    ("infobatch+trimming", "the loss"),
    ("selective-backprop+batch-augmentation", "the copies of a batch"),
    ("importance+infobatch", "the batch plan"),
    ("trimming+importance", "the loss"),
    ("rho+mixup", "whether images are mixed"),
    ("rho+trimming", "the loss"),
    ("rho+stepwise", "the batch plan"),
    ("trimming+small-loss", "the loss"),
    ("trimming+augmentation+trimming(end=0.3)", "the loss"),
    ("augmentation+augmentation(eta=1)", "the virtual samples"),
    ("passive+passive(every=3)", "the passive head"),
    ("mixup+cutmix", "whether images are mixed"),
    ("cutout+cutout(size=2)", "the mask"),
    ("batch-augmentation+batch-augmentation(copies=2)", "the copies of a batch"),
    ("srip+srip(coefficient=1)", "the isometry of weights"),
]


@pytest.mark.parametrize("text", SENSIBLE)
def test_sensible_combinations_train(text):
    run = trainer(parse(text, passive=PASSIVE), net(norm="compact" not in text), epochs=2)
    row = run.fit()
    assert len(run.history) == 2
    assert row["train_loss"] < 3
    fed_again = 8 * row["updates"] if "selective" in text else 44 if "rho" in text else 0  # of what was scored; halves
    assert row["samples_kept"] <= row["samples_seen"] == sum(map(len, run.fed)) - fed_again
    selects = any("the loss" in s.owns and s.name not in ONLY_WEIGHS for s in run.strategies)
    assert (row["samples_kept"] < row["samples_seen"]) == selects, f"a strategy of {text} may belong to ONLY_WEIGHS"
    for strategy in run.strategies:
        if isinstance(strategy, PassiveInjection):
            assert row["passive_updates"] == row["updates"] // strategy.every
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


@pytest.mark.parametrize("backward", ["masked", "compact"])
@pytest.mark.parametrize("mutation", ["", "trimmed loss ranked", "passive updates counted", "penalty on every row"])
def test_four_at_once_against_a_loop(backward, mutation):
    """Hard batches, trimmed, with virtual samples and passive batches: each does its part as if it were alone."""
    strategies = [
        HardBatches(0.5),
        Trimming(0.9, 0.3, backward=backward),
        StochasticAugmentation(eta=0.5, sigma=0.5, tau=0.6),
        PassiveInjection(PASSIVE, 4),
    ]
    draws = Draws(strategies[2])
    run = trainer(strategies, epochs=EPOCHS)
    run.fit()

    model, head = copy.deepcopy(run.initial), copy.deepcopy(run.initial_extras[HEAD])
    trunk, own = nn.ModuleList([model.conv1, model.norm, model.conv2]), nn.ModuleList([model.hidden, model.fc])
    optimizers = {part: sgd(part) for part in (trunk, own, head)}
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    batches, weights, ledger = run.batches.epoch(0), [], {}
    fired = 0

    def update(loss, *parts):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        for part in parts:
            optimizers[part].step()
        weights.append(flat(model))

    order = list(range(6))
    for number in range(EPOCHS * 6):
        if not order:
            order = sorted(ledger, key=lambda n: -ledger[n])[:3]
        batch = order.pop(0)
        rows, fraction = batches[batch], (0.9, 0.6, 0.3)[number // 6]
        count = max(round(fraction * len(rows)), 1)
        losses = F.cross_entropy(model(inputs[rows]), labels[rows], reduction="none")
        loss = losses.topk(count).values.mean()
        if draws.layers[number] is not None:
            fired += 1
            # Compact: the rows that are not kept never reach the layer. Masked: all do.
            compact = backward == "compact" and mutation != "penalty on every row"
            near = rows[losses.topk(count).indices.sort().values] if compact else rows
            hidden = model.trunk(inputs[near])
            raw, virtual = model.fc(hidden).detach(), torch.cat(virtual_samples(draws, number, hidden))
            soft = raw.log_softmax(1).repeat(4, 1)
            loss = loss + 0.5 * F.kl_div(model.fc(virtual).log_softmax(1), soft, log_target=True, reduction="batchmean")
        ledger[batch] = float(loss.detach()) if mutation == "trimmed loss ranked" else float(losses.detach().mean())
        update(loss, trunk, own)
        if (len(weights) if mutation == "passive updates counted" else number + 1) % 4 == 0:
            epoch, place = divmod(number // 4, 3)
            rows = strategies[3].batches.epoch(epoch)[place]
            seen = F.relu(model.conv2(model.early(normalised(PASSIVE)[rows]))).flatten(1)
            logits = head["fc"](F.relu(head["hidden"](seen)))
            update(F.cross_entropy(logits, PASSIVE.labels[rows]), trunk, head)
    assert fired > 3
    if not mutation or (mutation == "penalty on every row" and backward == "masked"):
        assert furthest(run.weights, weights) <= EXACT
    else:
        assert furthest(run.weights, weights) > DIFFERENT


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
