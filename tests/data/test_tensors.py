"""Pairs of tensors, and trainings on them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from training import EXACT, descend, flat, furthest, images, sgd, single_thread, trainer

from batchkern.data import TensorImages, from_tensors, validation_split, with_label_noise
from batchkern.errors import UserError
from batchkern.strategies import (
    RHO,
    BatchAugmentation,
    CutMix,
    Cutout,
    HardBatches,
    ImportanceSampling,
    InfoBatch,
    Mixup,
    PassiveInjection,
    RandomSelection,
    SelectiveBackprop,
    SmallLoss,
    Stepwise,
    StochasticAugmentation,
    Trimming,
)

one_thread = single_thread()
FEATURES, CLASSES = 5, 3


def table(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three clusters, of very different scales."""
    numbers = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=numbers)
    labels[:CLASSES] = torch.arange(CLASSES)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(9))
    scales = torch.tensor([1.0, 30.0, 0.1, 500.0, 2.0])
    return (centres[labels] + 0.5 * torch.randn(rows, FEATURES, generator=numbers)) * scales + 3 * scales, labels


def mlp(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def on(train, test=None, strategies=(), model=None, **options):
    return trainer(strategies, model or mlp(), train, table(20, 1) if test is None else test, **options)


def as_given() -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = table(46)
    return (inputs - inputs.mean(0)) / inputs.std(0), labels


def test_a_pair_of_tensors_trains_as_a_plain_loop_does():
    inputs, labels = as_given()
    run = on((inputs, labels))
    model = copy.deepcopy(run.initial)
    optimizer, weights = sgd(model), []
    run.fit()
    for epoch in range(2):
        for rows in run.batches.epoch(epoch):
            descend(optimizer, F.cross_entropy(model(inputs[rows]), labels[rows]))
            weights.append(flat(model))
    assert furthest(run.weights, weights) < EXACT
    test, target = table(20, 1)
    assert run.history[-1]["test_accuracy"] == pytest.approx(float((model(test).argmax(1) == target).float().mean()))
    assert run.history[-1]["test_loss"] == pytest.approx(float(F.cross_entropy(model(test), target).detach()))


def test_a_tensor_dataset_arrays_and_doubles_are_the_same():
    inputs, labels = as_given()
    expected = on((inputs, labels))
    expected.fit()
    for data in (
        TensorDataset(inputs, labels),
        (inputs.numpy(), labels.numpy().astype(np.uint8)),
        [inputs.double(), labels.int()],
        from_tensors(inputs, labels),
    ):
        run = on(data)
        run.fit()
        assert furthest(run.weights, expected.weights) == 0


def test_standardised_features_have_the_statistics_of_the_training_set():
    inputs, labels = table(46)
    inputs[:, 2] = 0.25
    train = from_tensors(inputs, labels, standardize=True)
    test = from_tensors(*table(20, 1), standardize=True)
    run = on(train, test)
    fed = run.feed.batch(torch.arange(46), None)[0]
    assert fed[:, [0, 1, 3, 4]].mean(0).abs().max() < 1e-5
    torch.testing.assert_close(fed[:, [0, 1, 3, 4]].std(0, correction=0), torch.ones(4))
    assert torch.equal(fed[:, 2], torch.zeros(46))
    mean, std = inputs.double().mean(0), inputs.double().std(0, correction=0)
    expected = ((test.inputs.double() - mean) / std)[:, [0, 1, 3, 4]].float()
    torch.testing.assert_close(run.test_feed.batch(torch.arange(20), None)[0][:, [0, 1, 3, 4]], expected)


PASSIVE = from_tensors(*table(20, 5))
ARMS = {
    "trimming": lambda: [Trimming(0.9, 0.3)],
    "compact": lambda: [Trimming(0.9, 0.3, backward="compact")],
    "hard batches": lambda: [HardBatches(0.5)],
    "stepwise": lambda: [Stepwise((0.5, 1.0), (1, 2))],
    "augmentation": lambda: [StochasticAugmentation(eta=1.0, sigma=0.5, tau=0.6)],
    "passive": lambda: [PassiveInjection(PASSIVE, 3, shared="all but the classifier")],
    "random": lambda: [RandomSelection()],
    "mixup": lambda: [Mixup(1.0), BatchAugmentation(2)],
    "infobatch": lambda: [InfoBatch()],
    "rho": lambda: [RHO(0.5, reference="mlp", reference_epochs=2)],
    "small loss": lambda: [SmallLoss(0.1, 2)],
    "selective backprop": lambda: [SelectiveBackprop()],
    "importance": lambda: [ImportanceSampling(2, 0.5)],
}


@pytest.mark.filterwarnings("ignore:BatchAugmentation")
@pytest.mark.parametrize("arm", ARMS)
def test_every_strategy_that_applies_trains_on_a_table_and_resumes(arm, tmp_path):
    inputs, labels = table(46)
    data = from_tensors(inputs, labels, standardize=True)
    options = {"epochs": 6, "lr": 0.1, "test": from_tensors(*table(40, 1), standardize=True)}
    whole = on(data, strategies=ARMS[arm](), **options)
    last = whole.fit()
    assert last["test_accuracy"] > 0.8
    first = on(data, strategies=ARMS[arm](), **options, out=tmp_path / "run", checkpoint_every=1)
    update, calls = first.updater.update, iter(range(9))

    def killed(batch):
        next(calls)
        update(batch)

    first.updater.update = killed
    with pytest.raises(StopIteration):
        first.fit()
    second = on(data, strategies=ARMS[arm](), **options, out=tmp_path / "run", resume=True)
    second.fit()
    assert torch.equal(second.weights[-1], whole.weights[-1])


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (Cutout(), r"cutout needs images \(C, H, W\), but inputs are torch.float32 of shape \(5,\)"),
        (CutMix(), r"cutmix needs images \(C, H, W\), but inputs are torch.float32 of shape \(5,\)"),
        (
            PassiveInjection(images(20)),
            r"passive inputs are of shape \(1, 6, 6\), but those of training of shape \(5,\)",
        ),
    ],
)
def test_what_a_strategy_cannot_do_with_a_table_is_refused_when_built(strategy, sentence):
    with pytest.raises(UserError, match=sentence):
        on(table(46), strategies=[strategy])


# --- other inputs ----------------------------------------------------------------------------------------------------


def test_tokens_stay_whole_numbers():
    tokens = torch.randint(11, (46, 7), generator=torch.Generator().manual_seed(0))
    labels = (tokens.sum(1) % 3).to(torch.int64)
    model = nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(28, 3))
    run = trainer(model=model, train=(tokens, labels), test=(tokens[:20], labels[:20]), epochs=3)
    before = copy.deepcopy(run.model)
    assert run.fit()["train_loss"] < float(F.cross_entropy(before(tokens), labels))
    with pytest.raises(UserError, match=r"mixup needs inputs of floats, but inputs are torch.int64 of shape \(7,\)"):
        trainer([Mixup()], model, (tokens, labels), (tokens, labels))


def test_uint8_images_are_images():
    data = images(44)
    pair = from_tensors(data.images, data.labels)
    assert isinstance(pair, TensorImages)
    assert pair.classes == data.classes
    four = from_tensors(data.images.expand(-1, 4, -1, -1), data.labels)
    assert four.standardize
    assert torch.equal(four.inputs[3], data.images[3].expand(4, -1, -1).float())


@pytest.mark.parametrize("augment", ["flip", "crop+flip"])
def test_float_images_are_augmented_as_uint8_ones_are(augment):
    data = images(44, shape=(3, 16, 16))
    floats = from_tensors(data.images.float(), data.labels)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    runs = [
        trainer(model=copy.deepcopy(model), train=d, test=d, augment=augment, epochs=1, seed=3) for d in (data, floats)
    ]
    fed = [run.feed.batch(torch.arange(10), 4)[0] for run in runs]
    mean, std = (x.view(-1, 1, 1) for x in data.statistics())
    torch.testing.assert_close((fed[1] / 255 - mean) / std, fed[0])
    assert not torch.equal(fed[1], floats.inputs[:10])


@pytest.mark.parametrize(
    ("made", "augment", "sentence"),
    [
        (lambda: table(20), "flip", r"augment is flip, but inputs are torch.float32 of shape \(5,\), no images"),
        (
            lambda: (torch.rand(20, 3, 8, 8), table(20)[1]),
            "resized-crop",
            "augment is resized-crop, which is for uint8",
        ),
    ],
)
def test_augmentation_that_is_for_other_inputs_is_refused(made, augment, sentence):
    with pytest.raises(UserError, match=sentence):
        trainer(model="mlp", train=made(), test=made(), augment=augment)


# --- masks -----------------------------------------------------------------------------------------------------------


class Segments(nn.Module):
    """Logits for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 3, 1)

    def forward(self, x):
        return self.conv2(self.conv1(x).relu())


def masks(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of three levels a pixel has, under noise; some do not count, and of row 2 none does."""
    numbers = torch.Generator().manual_seed(seed)
    levels = torch.randint(3, (rows, 6, 5), generator=numbers)
    inputs = levels[:, None] + 0.4 * torch.randn(rows, 1, 6, 5, generator=numbers)
    levels[torch.rand(rows, 6, 5, generator=numbers) < 0.3 * torch.rand(rows, 1, 1, generator=numbers)] = -100
    levels[2] = -100
    return inputs, levels


def segments(strategies=(), **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Segments()
    return trainer(strategies, model, masks(44), masks(20, 1), **options)


@pytest.mark.parametrize("arm", ["baseline", "trimming", "compact"])
def test_masks_train_as_a_plain_loop_does(arm):
    """Rows are kept by the mean loss of their places; all places that count of kept rows count alike."""
    keep = 1.0 if arm == "baseline" else 0.5
    strategies = {
        "baseline": [],
        "trimming": [Trimming(keep, keep)],
        "compact": [Trimming(keep, keep, backward="compact")],
    }[arm]
    inputs, levels = masks(44)
    run = segments(strategies, label_smoothing=0.1)
    model = copy.deepcopy(run.initial)
    optimizer, weights, seen = sgd(model), [], []
    last = run.fit()
    for epoch in range(2):
        for rows in run.batches.epoch(epoch):
            losses = F.cross_entropy(model(inputs[rows]), levels[rows], reduction="none", label_smoothing=0.1)
            counted = (levels[rows] != -100).flatten(1).sum(1)
            means = losses.flatten(1).sum(1) / counted.clamp(min=1)
            kept = means.argsort(descending=True)[: max(1, round(keep * len(rows)))]
            descend(optimizer, losses[kept].sum() / counted[kept].sum())
            weights.append(flat(model))
            seen += means.tolist() if epoch else []
    assert furthest(run.weights, weights) < EXACT
    assert last["train_loss"] == pytest.approx(sum(seen) / 44, rel=1e-5)
    test, target = masks(20, 1)
    counts = target != -100
    assert last["test_accuracy"] == pytest.approx(float((model(test).argmax(1) == target)[counts].float().mean()))
    assert last["test_loss"] == pytest.approx(float(F.cross_entropy(model(test), target).detach()), rel=1e-5)
    assert run.predict(masks(20, 1)).shape == (20, 6, 5)


@pytest.mark.parametrize(
    "strategy",
    [
        HardBatches(0.5),
        Stepwise((0.5, 1.0), (1, 2)),
        RandomSelection(),
        Cutout(2),
        InfoBatch(),
        SmallLoss(0.2, 2),
        SelectiveBackprop(0.5),
        RHO(0.5, reference_epochs=2),
    ],
    ids=lambda strategy: strategy.name,
)
def test_strategies_for_masks_train(strategy):
    run = segments([strategy], epochs=6, lr=0.3)
    assert run.fit()["test_accuracy"] > 0.5


@pytest.mark.parametrize(
    "strategy", [Mixup(), CutMix(), StochasticAugmentation(), PassiveInjection(images(20)), ImportanceSampling()]
)
def test_strategies_that_need_one_label_a_row_refuse_masks(strategy):
    with pytest.raises(UserError, match=rf"{strategy.name} needs one label a row, but the labels are masks"):
        segments([strategy])


def test_masks_are_refused_where_one_label_is_needed():
    data = from_tensors(*masks(44))
    with pytest.raises(UserError, match="tensors: its labels are masks, and noise needs one label for each row"):
        with_label_noise(data, 0.2, 0)
    with pytest.raises(UserError, match="its labels are masks, and validation needs one label"):
        validation_split(data, 0.2)
    with pytest.raises(UserError, match="augment is flip, but labels are masks"):
        segments(augment="flip")


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_parts_and_noise_of_a_table():
    data = from_tensors(*table(60), standardize=True)
    rest, held = validation_split(data, 0.25)
    assert (len(rest), len(held), held.standardize, held.name) == (45, 15, True, "tensors (validation)")
    noisy = with_label_noise(data, 0.2, 0)
    assert int((noisy.labels != data.labels).sum()) == 12
    assert torch.equal(noisy.clean_labels, data.labels)


X, Y = torch.rand(6, 2), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("inputs", "labels", "options", "sentence"),
    [
        (X[:, 0], Y, {}, r"inputs must be of shape \(N, ...\) with at least one number, got \(6,\)"),
        (
            X,
            Y[:5],
            {},
            r"labels must be whole numbers of shape \(6,\), or masks of them, got torch.int64 of shape \(5,\)",
        ),
        (X, Y.float(), {}, "labels must be whole numbers .*got torch.float32"),
        (X, torch.tensor([0, 1, 2, 0, -1, 2]), {}, r"the label \[4\] is -1; it must be in 0..2"),
        (X, Y, {"classes": ["a", "b"]}, r"the label \[2\] is 2; it must be in 0..1"),
        (X, 0 * Y, {}, "the highest label is 0; at least two classes"),
        (X, Y * 10**6, {}, "there is a label 2000000, and 6 labels"),
        (X, Y, {"classes": ["a", "a", "b"]}, "classes must have different names"),
        (X.index_fill(0, torch.tensor(3), torch.nan), Y, {}, "row 3 of inputs has a value that is not finite"),
        (X.int(), Y, {"standardize": True}, "standardize is for floats; inputs are torch.int32"),
        (X.to_sparse(), Y, {}, "inputs must be a dense tensor or an array of numbers"),
        (np.array(["a"] * 6), Y, {}, "inputs must be of numbers, got an array of <U1"),
        (X.tolist(), Y, {}, "inputs must be a dense tensor or an array of numbers, got list"),
        (
            torch.rand(6, 1, 2, 2),
            torch.full((6, 2, 2), 7),
            {"classes": ["a", "b"]},
            r"\[0, 0, 0\] is 7; .*0..1, or -100",
        ),
    ],
)
def test_tensors_that_are_no_data_are_refused(inputs, labels, options, sentence):
    with pytest.raises(UserError, match=sentence):
        from_tensors(inputs, labels, **options)


def test_images_and_other_inputs_are_not_mixed():
    floats = (torch.rand(44, 1, 6, 6), images(44).labels)
    with pytest.raises(UserError, match="test has uint8 images, but the training set has other inputs"):
        trainer(train=floats)
    with pytest.raises(UserError, match="data has other inputs, but the training set has uint8 images"):
        trainer().predict(floats)


def test_test_data_of_another_shape_of_labels_are_refused():
    inputs, labels = table(20, 1)
    with pytest.raises(UserError, match=r"test has labels of shape \(N, 1\), but those of the training set are \(N,\)"):
        on(table(46), (inputs, labels[:, None]))
    with pytest.raises(UserError, match=r"data has labels of shape \(N, 1\), but those of the training set are \(N,\)"):
        on(table(46)).predict((inputs, labels[:, None]))


def test_batches_without_a_place_that_counts_change_nothing():
    """Rows of masks that count nowhere, alone in a batch, or chosen at random among others."""
    inputs, levels = masks(44)
    levels[:30] = -100
    run = trainer([RandomSelection(start=0.2, end=0.2)], Segments(), (inputs, levels), masks(20, 1), batch_size=2)
    run.fit()
    assert all(weights.isfinite().all() for weights in run.weights)
    assert furthest(run.weights[-1:], run.weights[:1]) > 1e-3


def test_a_test_set_has_the_classes_of_training():
    inputs, labels = table(20, 1)
    with pytest.raises(UserError, match=r"test: the label \[\d+\] is 2; it must be in 0..1"):
        on((table(46)[0], table(46)[1] % 2), (inputs, labels))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (nn.Linear(4, 3), r"the model cannot take inputs of shape \(5,\): mat1 and mat2"),
        (nn.Linear(5, 4), r"must give logits of shape \(batch, 3\), got \(2, 4\)"),
        (
            "cnn",
            r"shape must be \(C, H, W\) .* for the model 'cnn', not \(5,\); for rows of any other shape there is mlp",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_a_sentence(model, sentence):
    with pytest.raises(UserError, match=sentence):
        on(table(46), model=model)


def test_the_model_for_tables_by_name():
    run = on(
        from_tensors(*table(46), standardize=True), from_tensors(*table(40, 1), standardize=True), model="mlp", epochs=4
    )
    assert run.fit()["test_accuracy"] > 0.9
