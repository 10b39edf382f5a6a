"""The trainer: the plain baseline against a loop in plain PyTorch, what a run writes, counts, refuses and repeats."""

import contextlib
import copy
import json
import math
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import (
    CLASSES,
    DIFFERENT,
    EXACT,
    descend,
    flat,
    furthest,
    images,
    net,
    normalised,
    sgd,
    single_thread,
    trainer,
    without_plots,
)

import batchkern
from batchkern.data import Feed, TensorImages, decode, load
from batchkern.errors import UserError
from batchkern.progress import ProgressBar
from batchkern.rundir import CHECKPOINT, CONFIG, METRICS, WEIGHTS
from batchkern.strategies import (
    HardBatches,
    PassiveInjection,
    RandomSelection,
    Stepwise,
    StochasticAugmentation,
    Strategy,
    Trimming,
    parse,
)
from batchkern.trainer import Interrupted

EPOCHS = 3  # of 6 batches: 5 of 8 rows, and one of 4
PASSIVE = images(20, seed=5, classes=3)
one_thread = single_thread()


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    without_plots(monkeypatch)


class Undecorated(Strategy):
    name = "undecorated"


def baseline_loop(run, optimizer, model, *, factor=lambda progress: 1.0, smoothing=0.0, inputs=None, mutation=""):
    """Minimise the mean cross entropy of each batch in turn; also the sum of the losses of each epoch's rows."""
    weights, sums = [], []
    plain, labels = normalised(run.feed.data), run.feed.data.labels
    rates = [group["lr"] for group in optimizer.param_groups]
    epochs = run.run.epochs
    for epoch in range(epochs):
        sums.append(0.0)
        for place, rows in enumerate(run.batches.epoch(epoch)):
            update = 6 * epoch + place
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor((update + (mutation == "rate of the next update")) / (6 * epochs))
            x = plain[rows] if inputs is None else inputs(rows, update)
            losses = F.cross_entropy(model(x), labels[rows], reduction="none", label_smoothing=smoothing)
            sums[-1] += float(losses.detach().sum())
            descend(optimizer, losses.sum() / (8 if mutation == "over the full batch size" else len(rows)))
            weights.append(flat(model))
    return weights, sums


def fresh(run):
    return copy.deepcopy(run.initial).train()


# --- the updates ----------------------------------------------------------------------------------------------------


def test_sgd():
    run = trainer(epochs=EPOCHS)
    run.fit()
    model = fresh(run)
    assert furthest(run.weights, baseline_loop(run, sgd(model), model)[0]) <= EXACT
    for mutation in ("over the full batch size",):
        model = fresh(run)
        assert furthest(run.weights, baseline_loop(run, sgd(model), model, mutation=mutation)[0]) > DIFFERENT


def test_batch_norm_and_label_smoothing():
    run = trainer(model=net(norm=True), epochs=EPOCHS, label_smoothing=0.3)
    run.fit()
    model = fresh(run)
    assert furthest(run.weights, baseline_loop(run, sgd(model), model, smoothing=0.3)[0]) <= EXACT
    assert flat(run.model.norm).abs().sum() != flat(run.initial.norm).abs().sum()


@pytest.mark.parametrize(("name", "cls"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_and_adamw(name, cls):
    run = trainer(epochs=1, optimizer=name, lr=1e-3, weight_decay=0.1, momentum=0.8)
    run.fit()
    model = fresh(run)
    optimizer = cls(model.parameters(), lr=1e-3, betas=(0.8, 0.999), weight_decay=0.1)
    assert furthest(run.weights, baseline_loop(run, optimizer, model)[0]) <= EXACT


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda p: 1.0),
        ("cosine", lambda p: 0.5 + 0.5 * math.cos(math.pi * p)),
        ("step", lambda p: 0.5 if 1 / 3 <= p < 2 / 3 else 0.25 if p >= 2 / 3 else 1.0),
        (lambda p: 1.0 - p, lambda p: 1.0 - p),
    ],
)
def test_schedules(schedule, factor):
    run = trainer(epochs=EPOCHS, schedule=schedule)
    row = run.fit()
    model = fresh(run)
    assert furthest(run.weights, baseline_loop(run, sgd(model), model, factor=factor)[0]) <= EXACT
    assert row["lr"] == pytest.approx(0.03 * factor(17 / 18))
    if schedule != "constant":
        model = fresh(run)
        late = baseline_loop(run, sgd(model), model, factor=factor, mutation="rate of the next update")[0]
        assert furthest(run.weights, late) > DIFFERENT


def test_an_optimizer_of_the_users():
    """Its groups keep their own rates, each times the schedule's factor."""

    def factory(parameters):
        # Not the trainer's affair how: here, the last layer learns faster.
        groups = [{"params": parameters[:-2]}, {"params": parameters[-2:], "lr": 0.05}]
        return torch.optim.SGD(groups, lr=0.01, nesterov=True, momentum=0.5)

    run = trainer(epochs=EPOCHS, optimizer=factory, schedule="cosine", lr=99.0)
    run.fit()
    model = fresh(run)
    weights, _ = baseline_loop(
        run, factory(list(model.parameters())), model, factor=lambda p: 0.5 + 0.5 * math.cos(math.pi * p)
    )
    assert furthest(run.weights, weights) <= EXACT


@pytest.mark.parametrize("augment", ["flip", "crop", "crop+flip"])
def test_augmented_images_are_those_of_the_update(augment):
    run = trainer(epochs=EPOCHS, augment=augment)
    run.fit()
    model = fresh(run)
    draw = type(run.feed).batch  # the arbitrary part: which image is moved where in which update
    weights, _ = baseline_loop(run, sgd(model), model, inputs=lambda rows, update: draw(run.feed, rows, update)[0])
    assert furthest(run.weights, weights) <= EXACT
    model = fresh(run)
    assert furthest(run.weights, baseline_loop(run, sgd(model), model)[0]) > DIFFERENT


def test_passive_images_are_not_augmented():
    run = trainer([PassiveInjection(PASSIVE, 1)], epochs=1, augment="crop+flip")
    steps = []
    batch = run.strategies[0].feed.batch
    run.strategies[0].feed.batch = lambda rows, step: steps.append(step) or batch(rows, step)
    run.fit()
    assert steps == [None] * 6


def test_a_model_of_the_users_is_trained_in_place():
    model = net()
    before = flat(model)
    run = trainer(model=model)
    assert run.model is model
    run.fit()
    assert not torch.equal(flat(model), before)


def test_a_model_by_name_is_drawn_from_the_seed_alone():
    data = images(20, shape=(1, 8, 8))
    torch.manual_seed(5)
    first = trainer(model="cnn", train=data, test=data)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    assert torch.equal(flat(first.model), flat(trainer(model="cnn", train=data, test=data).model))
    assert not torch.equal(flat(first.model), flat(trainer(model="cnn", train=data, test=data, seed=1).model))
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())


def channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def test_models_by_name_compute_in_channels_last_and_the_users_own_as_they_are(tmp_path):
    data = images(40, shape=(3, 6, 6))
    cases = (("cnn", {}, True), ("cnn", {"channels_last": False}, False))
    cases += ((net(channels=3), {}, False), (net(channels=3), {"channels_last": True}, True))
    weights = []
    for place, (model, options, expected) in enumerate(cases):
        run = trainer(model=model, train=data, test=data, out=tmp_path / str(place), **options)
        outputs: list[Tensor] = []
        first = next(m for m in run.model.modules() if isinstance(m, nn.Conv2d))
        first.register_forward_hook(lambda _, __, output, seen=outputs: seen.append(output))
        run.fit()
        assert outputs
        assert {channels_last(x) for x in outputs} == {expected}
        assert run.settings["channels_last"] == (expected or None)
        assert json.loads((tmp_path / str(place) / CONFIG).read_text())["settings"] == run.settings
        weights.append(flat(run.model))
    # The same sums in another order.
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="channels_last"):
        trainer(channels_last="yes")


# --- repeatable -----------------------------------------------------------------------------------------------------

EVERYTHING = [
    lambda: [],
    lambda: [Trimming(backward="compact"), PassiveInjection(PASSIVE, 4)],
    lambda: [HardBatches(0.5), StochasticAugmentation(eta=1.0)],
    lambda: [Stepwise((0.5, 1.0), (1, 2)), RandomSelection()],
]


@pytest.mark.parametrize("strategies", EVERYTHING)
def test_the_same_seed_gives_the_same_weights_and_another_one_does_not(strategies):
    runs = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)  # what was drawn before a training does not reach it
        runs.append(trainer(strategies(), net(dropout=0.2), epochs=EPOCHS, seed=seed, augment="crop+flip"))
        runs[-1].fit()
    assert furthest(runs[0].weights, runs[1].weights) == 0
    assert [row | {"seconds": 0} for row in runs[0].history] == [row | {"seconds": 0} for row in runs[1].history]
    assert furthest(runs[0].weights, runs[2].weights) > DIFFERENT


def test_evaluation_does_not_disturb_the_training():
    runs = [trainer(model=net(norm=True, dropout=0.5), test=images(rows, seed=1), epochs=EPOCHS) for rows in (8, 900)]
    evaluated = runs[1].updater.update

    def update(batch):
        evaluated(batch)
        runs[1].evaluate()
        runs[1].predict(PASSIVE)

    runs[1].updater.update = update
    for run in runs:
        run.fit()
    assert furthest(runs[0].weights, runs[1].weights) == 0


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_in_the_mode_it_was_in(training):
    run = trainer(model=net(norm=True))
    run.model.train(training)
    run.evaluate()
    run.predict(PASSIVE)
    assert run.model.training is training
    assert run.model.norm.training is training


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    """The same images, streamed."""
    datasets = pytest.importorskip("datasets")
    pil = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(data):
        cells = [pil.fromarray(image.numpy()) for image in data.images[:, 0]]
        label = datasets.ClassLabel(names=list(data.classes))
        features = datasets.Features({"image": datasets.Image(), "label": label})
        table = datasets.Dataset.from_dict({"image": cells, "label": data.labels.tolist()}, features=features)
        table.to_parquet(tmp_path / f"{data.name}.parquet")
        found = load(str(tmp_path / f"{data.name}.parquet"), memory_limit=0)
        assert not isinstance(found, TensorImages)
        return found

    return write


def test_streamed_images_train_to_the_same_weights_as_those_in_memory(streamed):
    data = images(44)
    runs = [trainer([HardBatches(0.5)], train=d, epochs=EPOCHS, augment="crop+flip") for d in (data, streamed(data))]
    for run in runs:
        run.fit()
    assert furthest(runs[0].weights, runs[1].weights) == 0


# --- decoding ahead -------------------------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch):
    """Of each batch of streamed images, whether they were being decoded when the batch before it was asked for; small
    images are decoded ahead as well."""
    found, asked, read, reading, result = [], Counter(), Feed._read, Feed._reading, decode.Reading.result

    def counted(self, *args):
        images = read(self, *args)
        asked[id(self)] += 1
        return images

    def begun(self, *args):
        made = reading(self, *args)
        made.feed, made.before = id(self), asked[id(self)]
        return made

    def noted(self):
        if hasattr(self, "feed"):
            found.append(self.before < asked[self.feed])
        return result(self)

    monkeypatch.setattr(Feed, "_read", counted)
    monkeypatch.setattr(Feed, "_reading", begun)
    monkeypatch.setattr(decode.Reading, "result", noted)
    monkeypatch.setattr(decode, "_LARGE", 0)
    return found


@pytest.mark.parametrize(
    ("strategies", "ahead"),
    [
        (lambda passive: [], 17),  # all of 18 but the first
        (lambda passive: [Trimming(0.5, 0.5, backward="compact")], 17),
        (lambda passive: [RandomSelection(backward="compact", start=0.5, end=0.5)], 0),  # of rows of its own
        (lambda passive: [HardBatches(0.5)], 5 + 4 * 2),  # but the first of each round, which is not chosen yet
        (lambda passive: [Stepwise((0.5, 1.0), (1, 2))], 3 + 3 + 3 - 1),
        (lambda passive: [PassiveInjection(passive, 4)], 17 + 3),
        (lambda passive: [PassiveInjection(passive, 4, summed=True)], 17 + 3),
    ],
)
def test_what_is_decoded_ahead_is_the_next_batch(strategies, ahead, streamed, taken):
    data, ends = images(44), []
    for train, passive in ((data, PASSIVE), (streamed(data), streamed(PASSIVE))):
        run = trainer(strategies(passive), train=train, epochs=EPOCHS, augment="crop+flip")
        run.fit()
        ends.append((run, [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]))
        assert not run.feed._ahead
        assert run.batches.state_dict() == ends[0][0].batches.state_dict()
    assert furthest(ends[0][0].weights, ends[1][0].weights) == 0
    assert ends[0][1] == ends[1][1]
    assert taken.count(True) == ahead


@pytest.mark.parametrize("update", [5, 6, 7])
def test_a_training_that_ends_between_a_hint_and_its_batch_goes_on_the_same(update, streamed, taken, tmp_path):
    """Before, at and after the end of an epoch of 6 updates, with the next batch decoded and not taken."""
    data = images(44)
    expected = trainer(train=data, epochs=EPOCHS, augment="crop+flip")
    expected.fit()
    train = streamed(data)
    settings = {"train": train, "epochs": EPOCHS, "augment": "crop+flip", "out": tmp_path / "run"}
    first = trainer(checkpoint_every=1, **settings)
    gather = first.updater._accumulate

    def killed(objective, *rows):
        if first.counts.updates == update:
            assert first.feed._ahead
            raise KeyboardInterrupt
        return gather(objective, *rows)

    first.updater._accumulate = killed
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    assert not first.feed._ahead
    second = trainer(resume=True, **settings)
    second.fit()
    assert furthest(second.weights, expected.weights[update:]) == 0
    assert taken.count(True) == update + 17 - update


def test_evaluation_decodes_ahead(streamed, taken, monkeypatch):
    monkeypatch.setattr("batchkern.trainer.EVALUATION_BATCH", 8)
    data = images(44)
    run = trainer(train=data, test=data)
    ours = run.predict(streamed(data))
    assert torch.equal(ours, run.predict(data))
    assert len(ours.unique()) > 1
    assert taken == [False] + [True] * 5


# --- what is measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", [None, Trimming, lambda start, end: RandomSelection("rows", start, end)])
def test_the_loss_in_the_metrics_is_that_of_every_row(select):
    run = trainer([select(0.5, 0.5)] if select else [], epochs=EPOCHS)
    run.fit()
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    before = [run.initial, *(weights_in(run, w) for w in run.weights[:-1])]
    for epoch, row in enumerate(run.history):
        losses, correct = [], []
        for place, rows in enumerate(run.batches.epoch(epoch)):
            with torch.no_grad():
                logits = before[6 * epoch + place](inputs[rows])
            losses.append(F.cross_entropy(logits, labels[rows], reduction="none"))
            correct.append(logits.argmax(1) == labels[rows])
        assert row["train_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
        assert row["train_accuracy"] == pytest.approx(float(torch.cat(correct).double().mean()))
        if select is None:
            assert row["train_objective"] == pytest.approx(row["train_loss"], rel=1e-5)
        if select is Trimming:
            kept = [x.topk(max(round(0.5 * len(x)), 1)).values.mean() * len(x) for x in losses]
            assert row["train_objective"] == pytest.approx(float(sum(kept)) / 44, rel=1e-5)
            assert row["train_objective"] > row["train_loss"]


def weights_in(run, vector):
    model = copy.deepcopy(run.initial)
    nn.utils.vector_to_parameters(vector.float(), model.parameters())
    return model


def test_the_objective_counts_the_penalty_and_the_loss_does_not():
    run = trainer([StochasticAugmentation(0.0, eta=5.0, sigma=1.0, tau=2.0)], epochs=1, lr=1e-9)
    row = run.fit()
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    assert row["train_loss"] == pytest.approx(F.cross_entropy(run.initial(inputs), labels).item(), rel=1e-4)
    assert row["train_objective"] > row["train_loss"] + 0.01


def test_top5_accuracy_is_that_of_sklearn():
    metrics = pytest.importorskip("sklearn.metrics")
    data = images(700, seed=3, classes=9)
    run = trainer(model=net(classes=9), train=images(60, classes=9), test=data, epochs=1)
    row = run.fit()
    with torch.no_grad():
        scores = copy.deepcopy(run.model).eval()(normalised(data, run.feed.data))
    expected = metrics.top_k_accuracy_score(data.labels, scores, k=5, labels=range(9))
    assert row["test_top5_accuracy"] == pytest.approx(expected)
    assert row["test_accuracy"] < expected < 1


def test_the_test_figures():
    run = trainer(test=images(600, seed=3), epochs=1)  # more than one batch of evaluation
    row = run.fit()
    model = copy.deepcopy(run.model).eval()
    data = images(600, seed=3)
    with torch.no_grad():
        logits = model(normalised(data, run.feed.data))
    assert row["test_loss"] == pytest.approx(float(F.cross_entropy(logits, data.labels)), rel=1e-5)
    assert row["test_accuracy"] == row["test_accuracy_plain"]
    assert row["test_accuracy"] == pytest.approx(float((logits.argmax(1) == data.labels).double().mean()))
    assert run.evaluate() == {key: row[key] for key in ("test_loss", "test_accuracy", "test_accuracy_plain")}
    predicted = run.predict(data)
    assert predicted.dtype == torch.int64
    assert torch.equal(predicted, logits.argmax(1))


@pytest.mark.parametrize(
    ("strategies", "updates", "seen", "forward", "backward", "kept"),
    [
        (lambda: [], 18, 132, 132, 132, 132),
        (lambda: [Trimming(0.5, 0.5)], 18, 132, 132, 132, 66),
        (lambda: [Trimming(0.5, 0.5, backward="compact")], 18, 132, 132 + 66, 66, 66),
        (lambda: [RandomSelection("rows", 0.5, 0.5)], 18, 132, 132, 132, 66),
        (lambda: [StochasticAugmentation(0.0)], 18, 132, 132, 132, 132),
        (lambda: [StochasticAugmentation(0.0, two_step=True)], 18, 132, 264, 264, 132),
        (lambda: [StochasticAugmentation(math.pi / 2, two_step=True)], 18, 132, 132, 132, 132),
        (lambda: [PassiveInjection(PASSIVE, 2)], 18, 132, 132 + 60, 132 + 60, 132),
        (lambda: [Stepwise((0.5, 1.0), (1, 1))], 3 + 12, 22 + 88, 110, 110, 110),
    ],
)
def test_counts(strategies, updates, seen, forward, backward, kept):
    row = trainer(strategies(), epochs=EPOCHS).fit()
    names = ("updates", "samples_seen", "samples_forward", "samples_backward", "samples_kept")
    assert [row[name] for name in names] == [updates, seen, forward, backward, kept]
    assert row["seconds"] > 0


def test_the_bar_never_shows_sums_that_begin_anew(monkeypatch):
    shown = []
    monkeypatch.setattr(ProgressBar, "due", lambda self: True)
    monkeypatch.setattr(ProgressBar, "show", lambda self, progress, **figures: shown.append((progress, figures)))
    run = trainer(epochs=2)
    run.fit()
    assert [round(12 * progress) for progress, _ in shown] == [
        0,
        1,
        2,
        3,
        4,
        6,
        7,
        8,
        9,
        10,
    ]  # of updates 5 and 11 an epoch ends
    assert all(figures["loss"] > 0 for _, figures in shown)


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_files_of_a_run(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = net(norm=True)
    strategies = [Trimming(), PassiveInjection(PASSIVE, 4, batch_size=5), StochasticAugmentation(eta=0.5)]
    run = trainer(strategies, model, epochs=EPOCHS, out=tmp_path / "run", seed=9, schedule="cosine")
    run.fit()
    path = tmp_path / "run"
    assert {f.name for f in path.iterdir()} >= {CONFIG, METRICS, CHECKPOINT, WEIGHTS}
    assert not list(path.glob("*.part"))

    config = json.loads((path / CONFIG).read_text())
    assert config["environment"]["batchkern"] == batchkern.__version__
    assert config["environment"]["torch"] == torch.__version__
    settings = config["settings"]
    assert settings["strategies"] == [s.describe() for s in strategies_as_json(strategies)]
    assert settings["strategies"][1]["passive"] == PASSIVE.name
    expected = {"epochs": 3, "batch_size": 8, "optimizer": "sgd", "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-3}
    expected |= {"schedule": "cosine", "amp": "none", "augment": "none", "label_smoothing": 0.0, "seed": 9}
    assert {key: settings[key] for key in expected} == expected
    assert settings["train"]["name"] == "noise-44-0"
    assert settings["train"]["rows"] == 44
    assert settings["test"]["rows"] == 20
    assert settings["model"] == f"Net with {sum(p.numel() for p in model.parameters())} parameters"

    rows = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
    assert rows == run.history
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert rows[-1].keys() >= {
        *("updates", "samples_seen", "samples_forward", "samples_backward", "samples_kept", "seconds", "lr"),
        *("train_loss", "train_objective", "train_accuracy", "test_loss", "test_accuracy", "test_accuracy_plain"),
        *("passive_updates", "augmented_updates", "virtual_kl"),
    }

    weights = safetensors.load_file(path / WEIGHTS)
    assert weights.keys() == model.state_dict().keys() == net(norm=True).state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())

    state = torch.load(path / CHECKPOINT, weights_only=True)
    assert state["epochs_done"] == 3
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state["model"].items())


def strategies_as_json(strategies):
    for strategy in strategies:
        described = json.loads(json.dumps(strategy.describe()))
        strategy.describe = lambda described=described: described
    return strategies


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(epochs=1, checkpoint_every=1).fit()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("every", [None, 1, 4, 5, 6, 100])
def test_checkpoints_are_saved_as_often_as_asked(tmp_path, every):
    run = trainer(epochs=EPOCHS, out=tmp_path / "run", checkpoint_every=every)
    saved = []
    save = run.directory.save_checkpoint
    run.directory.save_checkpoint = lambda state: saved.append(run.counts.updates) or save(state)
    run.fit()
    assert saved == sorted({6, 12, 18} | set(range(every or 6, 19, every or 6)))


def test_a_directory_in_use_is_refused_before_training(tmp_path):
    trainer(epochs=1, out=tmp_path).fit()
    with pytest.raises(UserError, match="already holds a run"):
        trainer(epochs=1, out=tmp_path)
    trainer(epochs=2, out=tmp_path, overwrite=True).fit()
    assert len((tmp_path / METRICS).read_text().splitlines()) == 2
    with pytest.raises(UserError, match="resume=True needs the run's directory as out"):
        trainer(epochs=2, resume=True)


# --- what goes wrong ------------------------------------------------------------------------------------------------


class Poisoned(nn.Module):
    """A model that gives NaN after so many forward passes in training, of which the trainer makes one beforehand."""

    def __init__(self, passes):
        super().__init__()
        self.net, self.passes = net(), passes

    def forward(self, x):
        if self.training:
            self.passes -= 1
        return self.net(x) * (math.nan if self.training and self.passes < 0 else 1.0)


@pytest.mark.parametrize("strategies", [lambda: [], lambda: [Trimming(0.5, 0.5)]])
def test_a_loss_that_is_not_finite_ends_the_training_with_a_sentence(tmp_path, strategies):
    run = trainer(strategies(), Poisoned(10), epochs=EPOCHS, out=tmp_path, checkpoint_every=4)
    with pytest.raises(UserError, match=r"not finite at update 10; the last finite checkpoint is kept in .*point.pt"):
        run.fit()
    assert len(run.weights) == 9  # the update is not made
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["counts"]["updates"] == 8
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert len(run.history) == 1
    with pytest.raises(UserError, match=r"not finite at update 2; a lower learning rate may help"):
        trainer(strategies(), Poisoned(2)).fit()


def test_ctrl_c_finishes_the_update_saves_and_can_be_resumed(tmp_path):
    options = {"epochs": EPOCHS, "augment": "flip"}
    whole = trainer(model=net(dropout=0.3), **options)
    whole.fit()
    run = trainer(model=net(dropout=0.3), out=tmp_path, **options)
    update, handler = run.updater.update, signal.getsignal(signal.SIGINT)

    def interrupted(batch):
        if run.counts.updates == 7:
            os.kill(os.getpid(), signal.SIGINT)
        update(batch)

    run.updater.update = interrupted
    with pytest.raises(Interrupted, match=f"after update 8; checkpoint written to {tmp_path}; resume it"):
        run.fit()
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert len(run.weights) == 8
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = trainer(model=net(seed=1, dropout=0.3), out=tmp_path, resume=True, **options)
    resumed.fit()
    assert furthest(run.weights + resumed.weights, whole.weights) == 0

    run = trainer()
    run.updater.update = lambda batch: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted, match="nothing is saved, since the run has no directory"):
        run.fit()


def test_a_second_ctrl_c_stops_at_once():
    run = trainer()

    def twice(batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    run.updater.update = twice
    with pytest.raises(KeyboardInterrupt) as stopped:
        run.fit()
    assert not isinstance(stopped.value, Interrupted)


class Odd(nn.Module):
    def forward(self, x):
        return (x.flatten(1)[:, :CLASSES],)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: net(classes=7), r"logits of shape \(batch, 4\), got \(2, 7\)"),
        (lambda: net(channels=3), r"cannot take images of shape \(1, 6, 6\)"),
        (Odd, "got tuple"),
        (lambda: "cnm", "unknown model 'cnm'"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused_before_training(model, reason):
    with pytest.raises(UserError, match=reason):
        trainer(model=model())


def test_looking_whether_the_model_fits_leaves_it_as_it_was():
    model = net(norm=True)
    before = flat(model)
    trainer(model=model)
    assert torch.equal(before, flat(model))
    assert model.training


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": 2.5}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 45}, "batch_size is 45, but noise-44-0 has 44 samples"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"optimizer": "lamb"}, "optimizer must be one of sgd, adam, adamw"),
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"momentum": 1.5}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"schedule": "linear"}, "schedule must be one of constant, cosine, step"),
        ({"amp": "fp8"}, "amp must be one of none, bf16, fp16"),
        ({"augment": "mixup"}, "augment"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"device": "tpu"}, "device"),
        ({"strategies": [StochasticAugmentation()], "classifier": "head"}, "classifier 'head' is not in the model"),
        ({"test": images(20, shape=(1, 7, 7))}, "shape"),
        ({"test": images(20, classes=3)}, "classes"),
        ({"test": [1]}, "test must be labelled images, .*got .1."),
        ({"train": "digits"}, "train must be labelled images, .*got 'digits'"),
        ({"epochs": True}, "epochs must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"lr": "0.1"}, r"lr must be in \(0, .*got '0.1'"),
        ({"weight_decay": 1e300}, "weight_decay must be in"),
        ({"optimizer": lambda parameters: None}, "what optimizer returns must be a torch.optim.Optimizer, got None"),
        ({"optimizer": [1]}, "optimizer must be one of"),
        ({"schedule": {}}, "schedule must be one of constant, cosine, step, .* or a function"),
        ({"schedule": lambda progress: None}, "schedule must return a factor on the learning rate, got None at 0"),
        ({"amp": []}, "amp must be one of"),
        ({"augment": np.ones(2)}, "augment must be one of"),
        ({"device": 1.5}, "device must be cpu, cuda or cuda:N, got 1.5"),
        ({"device": []}, "device must be cpu, cuda or cuda:N"),
        ({"classifier": 3}, "classifier must be the name of a module, got 3"),
        ({"classifier": "conv1"}, "classifier 'conv1' is a Conv2d, not a Linear"),
        ({"strategies": "trimming"}, "strategies must be a list of strategies, .*got 'trimming'"),
        ({"strategies": [Trimming]}, "strategies must be objects such as Trimming"),
        (
            {"strategies": [Undecorated()]},
            "strategies must be dataclasses, .* @dataclass above class Undecorated",
        ),
        ({"out": 3}, "out must be a path, got 3"),
        ({"overwrite": "no"}, "overwrite must be True or False, got 'no'"),
        ({"model": 3}, "model must be a module or the name of one, got 3"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES).requires_grad_(False))},
            "the model has no weights to train",
        ),
        ({"model": nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES))}, "model has weights without values"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES, device="meta"))}, "weights without values"),
        ({"model": net().double()}, "the model cannot take images of shape"),
    ],
)
def test_wrong_arguments_are_refused_before_training(options, named):
    with pytest.raises(UserError, match=named):
        trainer(**options)


def test_numpys_numbers_are_pythons(tmp_path):
    plain = {"seed": 3, "epochs": 1, "batch_size": 8, "checkpoint_every": 4, "lr": 0.25, "weight_decay": 0.0}
    numpys = {name: np.float32(x) if isinstance(x, float) else np.int64(x) for name, x in plain.items()}
    first, second = trainer(**plain), trainer(**numpys, out=tmp_path)
    first.fit()
    second.fit()
    assert furthest(first.weights, second.weights) == 0
    trainer(**plain, out=tmp_path, resume=True)


class Extra(nn.Module):
    """A model with something in its state that is no dense tensor."""

    def __init__(self, thing):
        super().__init__()
        self.net, self.thing = net(), thing
        if isinstance(thing, torch.Tensor):
            self.register_buffer("buffer", thing)

    def forward(self, x):
        return self.net(x)

    def get_extra_state(self):
        return self.thing

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("thing", "named"),
    [(torch.eye(3).to_sparse(), r"'buffer' \(torch.sparse_coo"), ({"a": 1}, r"'_extra_state' \(dict\)")],
)
def test_a_state_that_cannot_be_saved_is_told_before_the_training(tmp_path, thing, named):
    with pytest.raises(UserError, match=f"the model's state holds {named}.*can hold only dense tensors"):
        trainer(model=Extra(thing), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    trainer(model=Extra(thing))


@pytest.mark.parametrize(
    ("basis", "strategies"),
    [
        ("normalized", "random"),
        ("hadamard", "trimming(backward=compact)+hard-batches(delta=0.5)"),
        ("orthogonal", "random(select=batches,delta=0.5)"),
    ],
)
def test_torchs_default_type_changes_nothing(basis, strategies):
    data = images(44), images(20, seed=1)

    def trained():
        others = [StochasticAugmentation(0.0, basis=basis), PassiveInjection(PASSIVE, 4)]
        run = trainer([*parse(strategies), *others], "cnn", *data, epochs=2)
        run.fit()
        return run

    torch.set_default_dtype(torch.float64)
    try:
        other = trained()
    finally:
        torch.set_default_dtype(torch.float32)
    plain = trained()
    assert furthest(other.weights, plain.weights) == 0
    assert [row | {"seconds": 0} for row in other.history] == [row | {"seconds": 0} for row in plain.history]


def test_a_picture_that_fails_ends_no_training(tmp_path, monkeypatch):
    def fail(directory):
        raise ZeroDivisionError("of the picture")

    monkeypatch.setattr(sys.modules["batchkern.plots"], "plot_run", fail)
    with pytest.warns(UserWarning, match=r"curves.png is not drawn: ZeroDivisionError: of the picture"):
        row = trainer(epochs=1, out=tmp_path).fit()
    assert row["epoch"] == 0
    assert (tmp_path / WEIGHTS).exists()


@pytest.mark.parametrize("module", ["matplotlib.figure", "safetensors.torch", "msgspec"])
def test_a_library_that_is_missing_is_told_before_the_training(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"needs the library '{module.partition('.')[0]}'"):
        trainer(out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_trainings_do_not_write_to_one_directory(tmp_path):
    refused = []

    @dataclass
    class Second(Strategy):
        name = "second"

        def observe(self, step, losses):
            for options in ({"overwrite": True}, {"resume": True}):
                with pytest.raises(UserError, match="is in use by another training or comparison"):
                    trainer(out=tmp_path, **options)
                refused.append(options)

    first = trainer([Second()], epochs=1, out=tmp_path)
    first.fit()
    assert len(refused) == 2 * first.counts.updates
    overtaken = trainer(epochs=1, out=tmp_path, overwrite=True)
    trainer(epochs=1, out=tmp_path, overwrite=True).fit()
    with pytest.raises(UserError, match="was written by another training since this one was created"):
        overtaken.fit()
    assert overtaken.counts.updates == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop("optimizer"), "missing required field `optimizer`"),
        (lambda s: s.update(epochs_done=0, counts=3), "Expected `object`, got `int` - at `.*counts"),
        (lambda s: s["counts"].update(updates=-6), "`int` >= 0"),
        (lambda s: s["batches"].update(taken=10**9), "taken is 1000000000, which must be a whole number from 0 to 12"),
        (lambda s: s["batches"].clear(), "'taken'"),
        (lambda s: s.update(sums=torch.zeros(3)), r"sums are of shape \(3,\)"),
        (lambda s: s.update(rng=torch.zeros(3)), "RNG|dtype|size|Byte"),
        (lambda s: s.update(strategies=[]), "it is of 0 strategies"),
        (lambda s: s["samples"].update(last_loss=torch.zeros(7)), "last_loss does not belong to the 44 samples"),
        (lambda s: s["model"].pop("fc.weight"), "Missing key"),
        (lambda s: s["model"].update({"fc.weight": torch.zeros(2)}), "size mismatch"),
        (lambda s: s["optimizer"].update(param_groups=[]), "argument"),
        (lambda s: s["optimizer"]["param_groups"][0].pop("momentum"), "momentum of the optimizer is None, not of type"),
        (lambda s: s["optimizer"]["param_groups"][0].update(lr=10**400), "lr of the optimizer is 1000"),
        (lambda s: s["strategies"][0]["replay"].update(place=99), "place is 99"),
        (lambda s: s["strategies"][0]["ledger"].update(losses=torch.zeros(2)), "size mismatch for losses"),
    ],
)
def test_a_whole_checkpoint_that_does_not_fit_is_a_sentence(tmp_path, change, reason):
    first = trainer([HardBatches(0.5)], out=tmp_path, epochs=2)
    first.fit()
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    change(state)
    first.directory.save_checkpoint(state)
    with pytest.raises(UserError, match=f"checkpoint.pt does not fit this training: .*({reason})"):
        trainer([HardBatches(0.5)], out=tmp_path, epochs=2, resume=True)


# --- batch norm ------------------------------------------------------------------------------------------------------


class Narrow(nn.Module):
    """Batch norm over one value of each row, which one row alone has no deviation of."""

    def __init__(self):
        super().__init__()
        self.hidden, self.norm, self.fc = nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.norm(self.hidden(x.flatten(1))))


@pytest.mark.parametrize(
    ("strategies", "sizes"),
    [
        ([], {8: 4, 9: 1}),
        ([Trimming(0.2, 0.05, backward="compact")], {8: 4, 9: 1}),
        ([RandomSelection("rows", start=0.1, end=0.1, backward="compact")], {8: 4, 9: 1}),
        ([HardBatches(0.4)], {8: 4, 9: 1}),
        ([Stepwise(fractions=(0.4, 1.0), batch_multiples=(1, 1))], {8: 6, 9: 1}),
        ([PassiveInjection(images(9, seed=5), every=1)], {8: 4, 9: 1}),
    ],
)
@pytest.mark.filterwarnings("ignore:Trimming")
def test_a_single_row_joins_the_batch_before_where_batch_norm_needs_two(strategies, sizes):
    epochs = 2 if isinstance(next(iter(strategies), None), Stepwise) else 1
    run = trainer(strategies, Narrow(), images(41), epochs=epochs)
    before = run.model.norm.num_batches_tracked.clone()
    run.fit()
    assert before == 0  # looking at what it needs leaves the model as it was
    assert Counter(len(batch) for batch in run.fed if len(batch) > 4) >= Counter(sizes)
    assert min(len(batch) for batch in run.fed) > 1
    row = run.history[-1]
    assert row["samples_seen"] == sum(size * count for size, count in sizes.items())


def test_a_last_batch_of_one_row_stays_where_the_model_can_do_with_it():
    run = trainer([], net(norm=True), images(41), epochs=1)
    run.fit()
    assert [len(batch) for batch in run.fed] == [8] * 5 + [1]
    assert run.run.least_rows == 1


@pytest.mark.parametrize(
    ("strategies", "sizes"),
    [
        ([], [8] * 10),
        ([HardBatches(0.4)], [8] * 10),
        ([Stepwise(fractions=(0.45, 1.0), batch_multiples=(1, 2))], [8] * 2 + [16] * 2),  # of 20 images, and of 44
    ],
)
def test_the_last_smaller_batch_of_an_epoch_is_left_out(strategies, sizes):
    run = trainer(strategies, net(), images(44), epochs=2, drop_last=True)
    row = run.fit()
    assert [len(batch) for batch in run.fed] == sizes
    assert row["updates"] == len(sizes)


@pytest.mark.parametrize(
    ("strategies", "options", "sentence"),
    [
        ([], {"batch_size": 1}, r"batch_size is 1, but the model \(perhaps its batch norm\) needs 2 rows"),
        ([PassiveInjection(images(20), batch_size=1)], {}, "passive batches have 1 rows, but .* needs 2"),
    ],
)
def test_batches_of_one_row_are_refused_where_batch_norm_needs_two(strategies, options, sentence):
    with pytest.raises(UserError, match=sentence):
        trainer(strategies, Narrow(), **options)


def test_predicting_images_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"inputs of shape \(1, 7, 7\); the model was trained on \(1, 6, 6\)"):
        trainer().predict(images(8, shape=(1, 7, 7)))


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategies", EVERYTHING)
def test_bf16_trains_and_keeps_its_weights_in_float32(strategies):
    data = images(120)
    runs = [trainer(strategies(), net(), data, epochs=4, amp=amp, lr=0.02) for amp in ("bf16", "none")]
    rows = [run.fit() for run in runs]
    assert all(p.dtype == torch.float32 for p in runs[0].model.parameters())
    assert furthest(runs[0].weights, runs[1].weights) > DIFFERENT
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], abs=0.3)
    assert rows[0]["train_loss"] < runs[0].history[0]["train_loss"]


def test_fp16_scales_its_loss():
    run = trainer(epochs=6, amp="fp16", train=images(120))
    run.fit()
    assert run.updater.scaler.is_enabled()
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"] - 0.2
    assert torch.isfinite(run.weights[-1]).all()  # an update that overflowed is left out, and the scale lowered


def test_the_classifier_decides_where_virtual_samples_and_the_passive_head_are():
    strategies = [StochasticAugmentation(0.0), PassiveInjection(PASSIVE, 1)]
    model = net()
    model.unused = torch.nn.Linear(2, 2)
    run = trainer(strategies, model, classifier="fc")
    assert strategies[0].modules == [run.model.fc]
    assert list(run.run.extras["passive_head"]) == ["hidden", "fc"]
    assert run.settings["classifier"] == "fc"
    run.fit()


def test_fit_returns_the_last_row_and_does_nothing_more_when_asked_again():
    run = trainer([HardBatches(0.5)], epochs=EPOCHS)
    row = run.fit()
    assert row is run.history[-1]
    before = flat(run.model)
    assert run.fit() == row
    assert torch.equal(before, flat(run.model))
    assert len(run.history) == EPOCHS


def test_training_outside_the_main_thread():
    import threading

    run, rows = trainer(epochs=1), []
    thread = threading.Thread(target=lambda: rows.append(run.fit()))
    thread.start()
    thread.join()
    assert len(rows) == 1


def test_a_strategy_of_the_users_own_sees_every_seam():

    calls = []

    @dataclass
    class Spy(Strategy):
        name = "spy"
        weight: float = 2.0

        def setup(self, run):
            calls.append("setup")

        def observe(self, step, losses):
            calls.append(("observe", step.update, len(losses)))

        def diagnostics(self, row):
            return {"spied": float(len(calls))}

        def finish(self, run):
            calls.append("finish")

    run = trainer([Spy()], epochs=1)
    row = run.fit()
    assert calls == ["setup", *(("observe", u, 8 if u < 5 else 4) for u in range(6)), "finish"]
    assert row["spied"] == 7
    assert run.settings["strategies"] == [{"name": "spy", "weight": 2.0}]
    plain = trainer(epochs=1)
    plain.fit()
    assert furthest(run.weights, plain.weights) == 0


def test_no_gradients_of_the_users_are_trained_on():
    """A model that comes with gradients, or frozen layers, is trained as it is."""
    model = net()
    model.conv1.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 1e3)
    frozen = flat(model.conv1)
    run = trainer(model=model, epochs=1)
    run.fit()
    reference = fresh(run)
    assert furthest(run.weights, baseline_loop(run, sgd(reference), reference)[0]) <= EXACT
    assert torch.equal(frozen, flat(model.conv1))
    with contextlib.suppress(AttributeError):
        del model.conv1.weight.grad
