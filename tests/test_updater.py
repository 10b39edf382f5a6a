"""What changes an update: accumulated gradients, their norm, the average of the weights, compiled passes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from training import EXACT, furthest, images, net, normalised, single_thread, trainer

from batchkern.averaging import WeightAverage
from batchkern.compare.arms import forecast
from batchkern.errors import UserError
from batchkern.strategies import (
    RHO,
    STRATEGIES,
    BatchAugmentation,
    HardBatches,
    ImportanceSampling,
    InfoBatch,
    PassiveInjection,
    RandomSelection,
    SelectiveBackprop,
    SmallLoss,
    Stepwise,
    StochasticAugmentation,
    Trimming,
)

PASSIVE = images(20, seed=5, classes=3)
STRONG = {"eta": 1.0, "sigma": 0.5, "tau": 0.6}
one_thread = single_thread()


def test_accumulation_clipping_warm_up_and_the_average_are_those_of_a_plain_loop():
    """44 rows in batches of 8 and one of 4, three of which make an update, two of an epoch."""
    run = trainer(
        epochs=3,
        batch_size=8,
        gradient_accumulation_steps=3,
        max_grad_norm=0.9,
        ema_decay=0.8,
        warmup_epochs=1.5,
        lr=0.05,
        schedule="cosine",
    )
    data = normalised(run.feed.data)
    model = copy.deepcopy(run.initial)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    weights, norms, number = [], [], 0
    run.fit()
    for epoch in range(3):
        batches = run.batches.epoch(epoch)
        for window, last in ((batches[:3], 2), (batches[3:], 5)):
            rows = torch.cat(window)
            progress = (6 * epoch + last) / 18
            warm = 8 / 44 / 1.5
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            factor = min(1.0, warm + (1 - warm) * progress / 0.5) * cosine
            optimizer.param_groups[0]["lr"] = 0.05 * factor
            optimizer.zero_grad()
            F.cross_entropy(model(data[rows]), run.feed.data.labels[rows]).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.9)))
            optimizer.step()
            number += 1
            decay = min(0.8, (1 + number) / (10 + number))
            for name, value in model.state_dict().items():
                average[name] = decay * average[name] + (1 - decay) * value
            weights.append(torch.cat([value.flatten().double() for value in model.state_dict().values()]))
    assert min(norms) < 0.9 < max(norms)
    assert furthest(run.weights, weights) < EXACT
    assert run.counts.updates == 6
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=0, atol=EXACT)
    logits = run.model(normalised(run.test_feed.data, run.feed.data))
    assert run.history[-1]["test_loss"] == pytest.approx(
        float(F.cross_entropy(logits, run.test_feed.data.labels).detach())
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_within_an_epoch_accumulated_batches_are_one_large_one(optimizer):
    settings = {"optimizer": optimizer, "lr": 1e-3, "train": images(48)}
    run = trainer(gradient_accumulation_steps=2, batch_size=4, **settings)
    large = trainer(batch_size=8, **settings)
    run.fit()
    large.fit()
    assert furthest(run.weights, large.weights) < EXACT


def test_the_average_of_batch_norms_statistics_is_evaluated_and_the_weights_train_on():
    plain = trainer(model=net(norm=True), epochs=3)
    run = trainer(model=net(norm=True), epochs=3, ema_decay=0.9)
    plain.fit()
    run.fit()
    assert furthest(run.weights, plain.weights) == 0
    assert (run.model.norm.running_mean - plain.model.norm.running_mean).abs().max() > 1e-3
    assert run.model.norm.num_batches_tracked == 18
    assert run.history[-1]["test_loss"] != plain.history[-1]["test_loss"]
    assert run.evaluate()["test_loss"] == run.history[-1]["test_loss"]


@pytest.mark.parametrize("saved_after", [0, 1, 5])
def test_an_average_that_is_loaded_goes_on_as_if_it_had_never_been_saved(saved_after):
    """Its decay is still rising, as that of 0.99 is for 890 updates."""
    drawn = torch.randn(12, 3, 2, dtype=torch.float64)
    model = torch.nn.Linear(2, 3, bias=False, dtype=torch.float64)
    expected, average = model.weight.detach().clone(), WeightAverage(model, 0.99)
    for number, weight in enumerate(drawn):
        if number == saved_after:
            state, model = copy.deepcopy(average.state_dict()), torch.nn.Linear(2, 3, bias=False, dtype=torch.float64)
            average = WeightAverage(model, 0.99)
            average.load_state_dict(state)
        model.weight.data.copy_(weight)
        average.update()
        decay = (1 + number + 1) / (10 + number + 1)
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.average["weight"], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"updates": -1}, "updates is -1, which must be a whole number"),
        ({"updates": 2.0}, "updates is 2.0"),
        ({"average": {}}, "does not belong to the weights"),
    ],
)
def test_an_average_of_something_else_is_not_loaded(change, reason):
    average = WeightAverage(net(), 0.9)
    with pytest.raises(ValueError, match=reason):
        average.load_state_dict(average.state_dict() | change)


ARMS = {
    "baseline": lambda: [],
    "trimming": lambda: [Trimming(0.9, 0.3)],
    "compact": lambda: [Trimming(0.9, 0.3, backward="compact")],
    "hard batches": lambda: [HardBatches(0.5)],
    "stepwise": lambda: [Stepwise((0.5, 1.0), (1, 2), share_weights=False)],
    "augmentation": lambda: [StochasticAugmentation(**STRONG, layers=("conv2", "fc"))],
    "passive": lambda: [PassiveInjection(PASSIVE, 4)],
    "summed": lambda: [PassiveInjection(PASSIVE, 4, summed=True)],
    "random": lambda: [RandomSelection("batches", delta=0.5), BatchAugmentation(2)],
    "rho": lambda: [RHO(0.5, reference_epochs=1)],
    "small loss": lambda: [SmallLoss(0.5, 1)],
}
ESTIMATED = {
    "infobatch": lambda: [InfoBatch(0.6, 1.0)],
    "selective backprop": lambda: [SelectiveBackprop(0.5, 30)],
    "importance": lambda: [ImportanceSampling(2, 0.3)],
}
"""Arms whose losses decide how many samples they pass."""
TRANSFORM = {"cutout", "mixup", "cutmix", "srip"}
"""What changes inputs or adds a term, whatever an update is made of."""


def test_every_strategy_accumulates():
    accumulated = {strategy.name for make in (ARMS | ESTIMATED).values() for strategy in make()}
    assert accumulated | TRANSFORM == set(STRATEGIES), "ARMS, or ESTIMATED, needs one with it"


@pytest.mark.filterwarnings("ignore:BatchAugmentation")
@pytest.mark.parametrize("arm", ESTIMATED)
def test_arms_that_score_first_accumulate(arm):
    run = trainer(ESTIMATED[arm](), train=images(48), gradient_accumulation_steps=3, epochs=3)
    plain = trainer(ESTIMATED[arm](), train=images(48), epochs=3)
    run.fit()
    plain.fit()
    assert len(run.weights) == run.counts.updates < plain.counts.updates
    assert run.updater.window.batches == 0


@pytest.mark.filterwarnings("ignore:BatchAugmentation")
@pytest.mark.parametrize("arm", ARMS)
def test_every_strategy_accumulates_and_is_forecast(arm):
    made = [trainer(ARMS[arm](), train=images(48), gradient_accumulation_steps=3, augment="flip") for _ in range(2)]
    made[0].fit()
    counts, forecasted = made[0].counts, forecast(made[1])
    for name in ("updates", "samples_forward", "samples_backward"):
        assert getattr(counts, name) == getattr(forecasted, name)
    assert counts.updates < made[0].updater.active
    # Weights move once for each update, and once for each passive batch.
    passive = made[0].history[-1].get("passive_updates", 0) if arm == "passive" else 0
    assert len(made[0].weights) == counts.updates + passive


def test_gradients_that_wait_make_an_update_before_a_passive_batch():
    """Of 6 batches an epoch, with a passive one behind every fourth."""
    run = trainer([PassiveInjection(PASSIVE, 4)], gradient_accumulation_steps=3, epochs=2)
    steps = []
    step = run.updater._step
    run.updater._step = lambda: (steps.append(run.updater.window.batches), step())
    run.fit()
    assert steps == [3, 1, 0, 2, 2, 0, 3, 1, 0][: len(steps)]
    assert sum(steps) == 12


def test_two_updates_of_a_batch_are_not_accumulated():
    with pytest.raises(UserError, match="two_step makes two updates of a batch, but gradient_accumulation_steps is 2"):
        trainer([StochasticAugmentation(two_step=True)], gradient_accumulation_steps=2)


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """The shapes of images for which a graph was made."""
    made = []

    def backend(graph, inputs):
        made.append(tuple(next(x.shape for x in inputs if x.dim() == 4 and x.shape[1:] == (1, 6, 6))))
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(backend, name="counting")
    yield made
    torch._dynamo.backends.registry._BACKENDS.pop("counting", None)
    torch._dynamo.backends.registry._COMPILER_FNS.pop("counting", None)


@pytest.mark.parametrize("arm", ["baseline", "compact", "stepwise", "augmentation", "passive"])
def test_compiled_passes_train_to_the_same_weights(arm, graphs):
    plain, run = (trainer(ARMS[arm](), net(norm=True), epochs=2, compile=c) for c in (None, "counting"))
    plain.fit()
    run.fit()
    assert furthest(run.weights, plain.weights) == 0
    assert all(map(torch.equal, run.heads, plain.heads))
    assert run.model.state_dict().keys() == plain.model.state_dict().keys()
    assert {shape[0] for shape in graphs} >= {8, 20}  # whole batches, and the test images
    assert not {7, 2} & {shape[0] for shape in graphs}  # rows that are chosen of 8


def test_more_shapes_than_torch_would_compile_are_all_compiled(graphs):
    run = trainer(
        [Stepwise((0.2, 0.4, 0.6, 0.8, 1.0), (1, 2, 3, 4, 1))], train=images(137), epochs=5, compile="counting"
    )
    run.fit()
    assert len(set(graphs)) == 11


def test_a_model_that_cannot_be_compiled_is_a_sentence():
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    torch._dynamo.register_backend(backend, name="failing")
    with pytest.raises(UserError, match="the model cannot be compiled by failing: .*no compiler here"):
        trainer(compile="failing").fit()


def test_a_compiled_model_is_refused():
    with pytest.raises(UserError, match="model is already compiled: give the module itself"):
        trainer(model=torch.compile(net(), backend="eager"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"compile": "nothing"}, "compile must be a backend of torch.compile, such as .*inductor.*, got 'nothing'"),
        ({"max_grad_norm": 0}, "max_grad_norm must be above 0, got 0"),
        ({"ema_decay": 1}, "ema_decay must be below 1"),
        ({"ema_decay": -0.5}, r"ema_decay must be in \(0, 1\], got -0.5"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number of at least 1, got 0"),
        ({"warmup_epochs": 3}, r"warmup_epochs must be in \[0, 2\], got 3"),
        ({"warmup_epochs": 1, "strategies": [Stepwise((0.5, 1.0), (1, 1))]}, "stepwise sets the learning rate itself"),
    ],
)
def test_wrong_knobs_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        trainer(**options)
