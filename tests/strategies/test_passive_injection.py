"""Passive batch injection against Algorithm 1: every g-th batch is followed by one of another data set."""

import copy
import random
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from training import (
    DIFFERENT,
    EXACT,
    RecordingTrainer,
    descend,
    fake_run,
    flat,
    furthest,
    images,
    net,
    normalised,
    sgd,
    single_thread,
    trainer,
)

from batchkern.data import TensorImages, match_shape
from batchkern.errors import UserError
from batchkern.plan import Batch, EpochBatches
from batchkern.second_head import CONVOLUTIONS
from batchkern.strategies import HardBatches, PassiveInjection, Stepwise
from batchkern.strategies.passive_injection import HEAD

EPOCHS, EVERY = 3, 4  # 6 batches an epoch: passive ones after updates 4, 8, 12, 16
PASSIVE = images(21, seed=5, classes=3)
one_thread = single_thread()


def passive_run(every=EVERY, *strategies, passive=PASSIVE, model=None, freeze_bn=False, shared=CONVOLUTIONS, **options):
    strategies = [PassiveInjection(passive, every, freeze_bn=freeze_bn, shared=shared), *strategies]
    return trainer(strategies, model, **{"epochs": EPOCHS} | options)


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1)


def paper_loop(
    run: RecordingTrainer,
    mutation="",
    *,
    every=EVERY,
    make=sgd,
    freeze_bn=False,
    passive=PASSIVE,
    own=("hidden", "fc"),
):
    """Algorithm 1: the weights of the model, and of the passive head, after each update.

    The trunk and the two heads have an optimizer each, so that one that is to be kept fixed cannot move.

    Args:
        own: the layers that each head has for itself.
    """
    model = copy.deepcopy(run.initial).train()
    trunk = torch.nn.ModuleList(layer for name, layer in model.named_children() if name not in own)
    active_head = torch.nn.ModuleDict({name: getattr(model, name) for name in own})
    passive_head = torch.nn.ModuleDict({name: copy.deepcopy(run.initial_extras[HEAD][name]) for name in own})
    optimizers = {part: make(part) for part in (trunk, active_head, passive_head)}
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    like = run.feed.data if mutation == "normalised as the training set" else passive
    passive_inputs, passive_labels = normalised(passive, like), passive.labels
    weights, heads, passes = [], [], 0

    def logits(head, x):
        layers = {"hidden": model.hidden, **head}
        hidden = F.relu(layers["hidden"](F.relu(model.conv2(model.early(x))).flatten(1)))
        return layers["fc"](model.dropout(hidden))

    def update(head, x, y, frozen, moves):
        before = [b.clone() for b in model.buffers()]
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        F.cross_entropy(logits(head, x), y).backward()
        for part in (trunk, head):
            optimizers[part].step()
        if moves:  # the idle head too, along a gradient of zero: weight decay and momentum still move it
            for parameter in frozen.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizers[frozen].step()
        if freeze_bn and head is passive_head:
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
        weights.append(flat(model))
        heads.append(flat(passive_head))

    def inject():
        nonlocal passes
        epoch, place = divmod(passes, run.strategies[0].batches.per_epoch)
        rows = run.strategies[0].batches.epoch(epoch)[place]
        passes += 1
        update(passive_head, passive_inputs[rows], passive_labels[rows], active_head, mutation == "active head moves")

    number, owed = 0, False
    for epoch in range(EPOCHS):
        if mutation == "counted per epoch":
            number = 0
        for rows in run.batches.epoch(epoch):
            number += 1
            due = (number + (mutation == "one early")) % every == 0
            update(active_head, inputs[rows], labels[rows], passive_head, mutation == "passive head moves")
            if mutation == "one late":
                due, owed = owed, due
            if due and mutation != "never":
                inject()
    return weights, heads


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("every", [1, 4, 6, 7, 18, 100])
def test_each_update_is_the_papers(norm, every):
    run = passive_run(every, model=net(norm=norm), lr=0.01)
    run.fit()
    weights, heads = paper_loop(run, every=every, make=lambda part: sgd(part, lr=0.01))
    assert len(weights) == EPOCHS * 6 + EPOCHS * 6 // every
    assert furthest(run.weights, weights) <= EXACT
    assert furthest(run.heads, heads) <= EXACT


@pytest.mark.parametrize(
    ("shared", "own"), [("all but the classifier", ("fc",)), ("hidden", ("fc",)), ("conv2", ("hidden", "fc"))]
)
def test_what_is_shared_may_be_chosen(shared, own):
    run = passive_run(shared=shared)
    run.fit()
    weights, heads = paper_loop(run, own=own)
    assert furthest(run.weights, weights) <= EXACT
    assert furthest(run.heads, heads) <= EXACT


def test_a_linear_layer_that_is_shared_would_show():
    assert furthest(finished().weights, paper_loop(finished(), own=("fc",))[0]) > DIFFERENT


@pytest.mark.parametrize("norm", [False, True])
def test_one_update_of_the_summed_losses_is_equation_4(norm):
    strategy = PassiveInjection(PASSIVE, EVERY, batch_size=5, summed=True)
    run = trainer([strategy], net(norm=norm), epochs=EPOCHS, lr=0.01)
    row = run.fit()
    model, second = copy.deepcopy(run.initial).train(), copy.deepcopy(run.initial_extras[HEAD])
    optimizer = sgd(torch.nn.ModuleList([model, second]), lr=0.01)
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    weights, added = [], 0
    for number in range(EPOCHS * 6):
        rows = run.batches.epoch(number // 6)[number % 6]
        loss = F.cross_entropy(model(inputs[rows]), labels[rows])
        if (number + 1) % EVERY == 0:
            own = strategy.batches.epoch(added // strategy.batches.per_epoch)[added % strategy.batches.per_epoch]
            hidden = F.relu(second["hidden"](F.relu(model.conv2(model.early(normalised(PASSIVE)[own]))).flatten(1)))
            loss = loss + F.cross_entropy(second["fc"](hidden), PASSIVE.labels[own])
            added += 1
        descend(optimizer, loss)
        weights.append(flat(model))
    assert added == row["passive_updates"] == 4
    assert furthest(run.weights, weights) <= EXACT
    # As many active updates as without, and the passive rows are counted where they cost something.
    assert (row["updates"], row["samples_seen"]) == (18, 3 * 44)
    assert row["samples_forward"] == row["samples_backward"] == 3 * 44 + 4 * 5


def test_adamw_too():
    run = passive_run(optimizer="adamw", lr=1e-3, weight_decay=0.1)
    run.fit()
    weights, heads = paper_loop(run, make=adamw)
    assert furthest(run.weights, weights) <= EXACT
    assert furthest(run.heads, heads) <= EXACT
    assert furthest(run.weights, paper_loop(run, "active head moves", make=adamw)[0]) > DIFFERENT
    assert furthest(run.heads, paper_loop(run, "passive head moves", make=adamw)[1]) > DIFFERENT


@cache
def finished():
    run = passive_run()
    run.fit()
    return run


@pytest.mark.parametrize(
    "mutation",
    [
        "one late",
        "one early",
        "counted per epoch",
        "never",
        "active head moves",
        "normalised as the training set",
    ],
)
def test_a_wrong_injection_would_show(mutation):
    run = finished()
    assert furthest(run.weights, paper_loop(run, mutation)[0]) > DIFFERENT


def test_an_idle_passive_head_that_moved_would_show():
    run = finished()
    assert furthest(run.heads, paper_loop(run, "passive head moves")[1]) > DIFFERENT


@pytest.mark.parametrize("freeze", [False, True])
def test_freeze_bn_decides_whether_running_statistics_are_shared(freeze):
    run = passive_run(model=net(norm=True), freeze_bn=freeze, lr=0.01)
    run.fit()

    def make(part):
        return sgd(part, lr=0.01)

    assert furthest(run.weights, paper_loop(run, freeze_bn=freeze, make=make)[0]) <= EXACT
    assert furthest(run.weights, paper_loop(run, freeze_bn=not freeze, make=make)[0]) > DIFFERENT


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        {"optimizer": "adamw", "momentum": 0.9, "weight_decay": 0.1, "lr": 1e-3},
    ],
)
def test_an_idle_head_has_no_gradient_no_momentum_and_no_decay(options):
    run = passive_run(**options)
    head, own = run.run.extras[HEAD], torch.nn.ModuleList([run.model.hidden, run.model.fc])
    kinds = []
    step = run.updater._step

    def watched():
        heads = (head, own)
        states = copy.deepcopy([m.state_dict() for m in heads])
        moments = copy.deepcopy([[run.optimizer.state[p] for p in m.parameters()] for m in heads])
        step()
        (idle,) = [i for i, m in enumerate(heads) if all(p.grad is None for p in m.parameters())]
        idle, state, moments = heads[idle], states[idle], moments[idle]
        assert all(torch.equal(state[key], value) for key, value in idle.state_dict().items())
        for parameter, moment in zip(idle.parameters(), moments, strict=True):
            now = run.optimizer.state[parameter]
            assert now.keys() == moment.keys()
            assert all(torch.equal(now[key], moment[key]) for key in now)
        kinds.append("active" if idle is head else "passive")

    run.updater._step = watched
    run.fit()
    assert kinds == (["active"] * 4 + ["passive"]) * 4 + ["active"] * 2


# --- when -----------------------------------------------------------------------------------------------------------


def planned(strategy, *, rows, batch_size, epochs):
    strategy.setup(fake_run(rows=rows, batch_size=batch_size, epochs=epochs))
    batches = EpochBatches(rows, batch_size, epochs, seed=0)
    return list(strategy.plan(batches, iter(batches)))


def test_one_passive_batch_for_every_g_active_ones_over_the_whole_training():
    numbers = random.Random(2)
    short_epochs = 0
    for _ in range(100):
        batches, epochs, every = numbers.randint(1, 12), numbers.randint(1, 8), numbers.randint(1, 20)
        short_epochs += batches < every
        plan = planned(PassiveInjection(PASSIVE, every), rows=3 * batches, batch_size=3, epochs=epochs)
        kinds = ["passive" if b.inject else "active" for b in plan]
        assert kinds.count("active") == epochs * batches
        assert kinds.count("passive") == epochs * batches // every
        expected = []
        for number in range(1, epochs * batches + 1):
            expected += ["active"] + ["passive"] * (number % every == 0)
        assert kinds == expected
        ends = [b.ends_epoch for b in plan]
        assert sum(ends) == epochs
        assert ends[-1]
        assert [b.epoch for b in plan] == [sum(ends[:place]) for place in range(len(plan))]
    assert short_epochs > 25


def test_passive_batches_visit_the_passive_set_again_and_again_without_repeats():
    plan = planned(PassiveInjection(PASSIVE, 1, batch_size=5), rows=60, batch_size=3, epochs=2)
    passive = [b.indices for b in plan if b.inject]
    for start in range(0, 40, 5):
        visited = torch.cat(passive[start : start + 5]).tolist()
        assert sorted(visited) == list(range(21))
    assert not torch.equal(passive[0], passive[5])


def test_the_rate_and_progress_are_those_of_the_active_batch():
    upstream = [Batch(torch.arange(2), 3, 0.25, True, rate=0.5, number=7, reset_optimizer=True)]
    strategy = PassiveInjection(PASSIVE, 1)
    strategy.setup(fake_run())
    active, passive = strategy.plan(EpochBatches(4, 2, 1, 0), iter(upstream))
    assert (active.epoch, active.progress, active.ends_epoch, active.rate, active.number) == (3, 0.25, False, 0.5, 7)
    assert active.reset_optimizer
    assert (passive.epoch, passive.progress, passive.ends_epoch, passive.rate) == (3, 0.25, True, 0.5)
    assert passive.number is None
    assert not passive.reset_optimizer  # or what the active batch left in it would be lost


def test_any_function_of_the_number_of_active_batches_serves():
    run = passive_run(lambda number: number in (3, 4, 18))
    run.fit()
    changed = [not torch.equal(a, b) for a, b in zip(run.heads, run.heads[1:], strict=False)]
    # Updates 4 and 6 of the sequence 1 2 3 P 4 P ... 18 P, counted from 1.
    assert [place + 2 for place, moved in enumerate(changed) if moved] == [4, 6, 21]


def test_passive_updates_are_not_counted_as_active():
    run = passive_run(2)
    row = run.fit()
    plain = trainer(epochs=EPOCHS)
    plain.fit()
    assert len(run.weights) == 18 + 9
    assert row["passive_updates"] == 9
    for key in ("updates", "samples_seen", "samples_kept"):
        assert row[key] == plain.history[-1][key]
    # But their rows do go through the trunk: nine batches, three to a pass over the passive set.
    for key in ("samples_forward", "samples_backward"):
        assert row[key] == plain.history[-1][key] + 3 * len(PASSIVE)
    assert [torch.equal(a, b) for a, b in zip(run.fed, plain.fed, strict=True)] == [True] * 18
    assert [row["epoch"] for row in run.history] == [0, 1, 2]
    # The first epoch's figures are of active batches alone: they start as the plain run's do.
    one = passive_run(6)
    one.fit()
    assert one.history[0]["train_loss"] == plain.history[0]["train_loss"]
    assert one.history[0]["test_loss"] != plain.history[0]["test_loss"]


def test_beside_a_plan_of_another_strategy():
    for other, updates in ((HardBatches(0.5), 18), (Stepwise((0.5, 1.0), (1, 2)), 3 + 2 * 3)):
        run = passive_run(4, other)
        row = run.fit()
        assert row["updates"] == updates
        assert row["passive_updates"] == updates // 4
        swapped = trainer([other, PassiveInjection(PASSIVE, 4)], epochs=EPOCHS)
        swapped.fit()
        assert furthest(run.weights, swapped.weights) == 0  # the order in which they are listed does not matter


# --- the data and the head ------------------------------------------------------------------------------------------


def test_the_head_is_gone_at_the_end():
    run = passive_run()
    assert list(run.run.extras) == [HEAD]
    assert {name: layer.weight.shape for name, layer in run.run.extras[HEAD].items()} == {
        "hidden": (16, 54),
        "fc": (3, 16),
    }
    run.fit()
    assert list(run.run.extras) == []
    assert list(run.model.state_dict()) == list(net().state_dict())
    assert not any(hooks for m in run.model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))
    run.fit()  # there is nothing left to do


def test_passive_images_are_brought_to_the_shape_of_the_training_set():
    colour = images(21, seed=6, shape=(3, 9, 8), classes=3)
    run = passive_run(passive=colour)
    run.fit()
    grey = match_shape(colour, (1, 6, 6))
    assert isinstance(grey, TensorImages)
    assert furthest(run.weights, paper_loop(run, passive=grey)[0]) <= EXACT


def test_a_passive_set_may_be_named():
    pytest.importorskip("sklearn")
    run = passive_run(passive="digits", epochs=1)
    assert run.run.extras[HEAD]["fc"].weight.shape == (10, 16)
    assert run.fit()["passive_updates"] == 1


def test_setting_up_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    PassiveInjection(PASSIVE).setup(fake_run(model=net()))
    assert torch.equal(before, torch.get_rng_state())


def test_the_classifier_may_be_named():
    model = net()
    model.unused = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"the classifier 'unused' does not run"):
        passive_run(model=model)
    run = passive_run(model=model, classifier="fc")
    assert run.run.extras[HEAD]["fc"].weight.shape == (3, 16)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"every": 0}, "every"),
        ({"every": 2.5}, "every"),
        ({"every": True}, "every"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"shared": 3}, "shared"),
        ({"shared": None}, "shared"),
        ({"summed": 1}, "summed"),
    ],
)
def test_wrong_options_are_refused_at_once(options, named):
    with pytest.raises(UserError, match=named):
        PassiveInjection(PASSIVE, **options)


def test_a_passive_set_of_a_wrong_type_is_refused_at_once():
    with pytest.raises(UserError, match="passive must be"):
        PassiveInjection(3)


def test_a_strategy_serves_a_second_run():
    strategy = PassiveInjection(PASSIVE, EVERY)
    runs = []
    for _ in range(2):
        runs.append(trainer([strategy], epochs=EPOCHS))
        runs[-1].fit()
    assert furthest(runs[0].weights, runs[1].weights) == 0
