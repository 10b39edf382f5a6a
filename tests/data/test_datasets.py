"""Map-style datasets, read by workers or not, and trainings on them."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from training import furthest, images, net, normalised, single_thread, trainer

from batchkern import load_model
from batchkern.data import DatasetData, from_dataset, from_tensors
from batchkern.errors import UserError
from batchkern.strategies import (
    BatchAugmentation,
    HardBatches,
    Mixup,
    PassiveInjection,
    Stepwise,
    StochasticAugmentation,
    Trimming,
)

one_thread = single_thread()
DATA = images(44)
PIXELS = normalised(DATA)


class Rows(Dataset):
    """The images of ``DATA``; with ``noise`` each time others, from the generators of torch, NumPy and Python."""

    def __init__(self, rows: int = 44, noise: float = 0.0) -> None:
        self.rows, self.noise = rows, noise

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int):
        image = PIXELS[row]
        if self.noise:
            numbers = np.random.randn() + random.gauss(0, 1)  # noqa: NPY002
            image = image + self.noise * (torch.randn(image.shape) + numbers)
        return image, int(DATA.labels[row])


class Named(Rows):
    """As some of torchvision's, with the names of its classes."""

    classes = ["a", "b", "c", "d"]  # noqa: RUF012


TEST = Rows(20)


def test_a_dataset_is_the_same_as_its_tensors():
    expected = trainer(train=(PIXELS, DATA.labels), test=(PIXELS[:20], DATA.labels[:20]))
    run = trainer(train=Rows(), test=TEST)
    assert expected.fit()["test_loss"] == run.fit()["test_loss"]
    assert furthest(run.weights, expected.weights) == 0
    assert run.run.shape == (1, 6, 6)
    assert run.classes == ("0", "1", "2", "3")  # as many as the model has
    assert torch.equal(run.predict(TEST), run.predict((PIXELS[:20], DATA.labels[:20])))


STRATEGIES = {
    "trimming": lambda: [Trimming(0.9, 0.4, backward="compact")],
    "hard batches": lambda: [HardBatches(0.5)],
    "stepwise": lambda: [Stepwise((0.5, 1.0), (1, 2))],
    "augmentation": lambda: [StochasticAugmentation(eta=1.0, sigma=0.5, tau=0.6)],
    "passive": lambda: [PassiveInjection(from_dataset(Named(30, noise=0.2)), 4)],
    "mixup": lambda: [Mixup(1.0), BatchAugmentation(2)],
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_random_rows_are_the_same_with_workers_and_in_a_run_that_is_killed(name, tmp_path):
    """Dropout draws from torch's generator in between."""

    def make(workers, **options):
        model = net(dropout=0.3)
        return trainer(STRATEGIES[name](), model, Rows(noise=0.3), TEST, workers=workers, **options)

    whole = make(0)
    whole.fit()
    assert furthest(trained(trainer(STRATEGIES[name](), net(dropout=0.3), Rows(), TEST)).weights, whole.weights) > 1e-3
    first = make(2, out=tmp_path / "run", checkpoint_every=1)
    update = first.updater.update

    def killed(batch):
        if first.updater.active == (4 if name == "stepwise" else 7):
            raise KeyboardInterrupt
        update(batch)

    first.updater.update = killed
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = make(2, out=tmp_path / "run", resume=True)
    second.fit()
    assert furthest(second.weights, whole.weights[-len(second.weights) :]) == 0
    assert len(first.weights) + len(second.weights) >= len(whole.weights)
    assert second.history[-1]["test_loss"] == whole.history[-1]["test_loss"]


def trained(run):
    run.fit()
    return run


def test_workers_end_with_a_training_that_is_killed_and_leave_its_directory(tmp_path):
    """By SIGKILL: the next process goes on in the same directory, as soon as they are gone."""

    def train():
        run = trainer(train=Rows(noise=0.3), test=TEST, workers=2, out=tmp_path / "run", checkpoint_every=1)
        run.feed.batch(torch.arange(8), 0)
        (tmp_path / "workers").write_text(" ".join(map(str, run.feed._pool._processes)))
        update = run.updater.update

        def killed(batch):
            if run.updater.active == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            update(batch)

        run.updater.update = killed
        run.fit()

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    workers = [int(word) for word in (tmp_path / "workers").read_text().split()]
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(workers) == 2
    assert time.monotonic() < deadline
    run = trainer(train=Rows(noise=0.3), test=TEST, out=tmp_path / "run", resume=True)
    assert run.updater.active == 3


def test_a_row_is_another_one_in_each_update_and_place():
    feed = trainer(train=Rows(noise=0.3), test=TEST).feed
    rows = torch.tensor([5, 5, 3])
    first, second = (feed.batch(rows, step)[0] for step in (3, 4))
    assert torch.equal(first, feed.batch(rows, 3)[0])
    assert torch.equal(first[1:2], feed.batch(rows, 3, torch.tensor([1]))[0])
    for one, other in ((first[0], first[1]), (first[0], second[0]), (first[2], second[2])):
        assert (one - other).abs().max() > 0.1


def test_what_was_read_ahead_is_not_read_again():
    feed = trainer(train=Rows(noise=0.3), test=TEST, workers=1).feed
    sent, submit = [], feed._submit
    feed._submit = lambda request: sent.append(request) or submit(request)
    for step in range(4):
        for later in (step, step + 1):
            feed.prepare(torch.arange(8) + 4 * later, later)
        feed.batch(torch.arange(8) + 4 * step, step)
    feed.forget()
    assert len(sent) == 5  # each batch once, and the one after the last


def test_global_generators_are_left_alone():
    run = trainer(train=Rows(noise=0.3), test=TEST)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    run.feed.batch(torch.arange(8), 3)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_workers_read_ahead_as_many_batches_as_there_are_workers():
    run = trainer(train=Rows(), test=TEST, workers=3, epochs=1)
    waiting = []
    batch = run.feed.batch

    def fed(indices, step, positions=None):
        if step is not None:
            waiting.append(len(run.feed._ahead))
        return batch(indices, step, positions)

    run.feed.batch = fed
    run.fit()
    assert waiting == [4, 4, 4, 3, 2, 1]  # this batch and the next, of 6
    assert run.feed._pool is None


# --- inputs of several tensors ---------------------------------------------------------------------------------------


class Sentences(Dataset):
    """Rows of different lengths, to be filled up."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, row: int):
        numbers = torch.Generator().manual_seed(row)
        words = torch.randint(1, 9, (3 + row % 4,), generator=numbers)
        return {"words": words, "label": int(words.sum()) % 2}


def filled(rows):
    words = nn.utils.rnn.pad_sequence([row["words"] for row in rows], batch_first=True)
    return {"words": words, "mask": words > 0}, torch.tensor([row["label"] for row in rows])


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.Embedding(9, 6), nn.Linear(6, 2)

    def forward(self, x):
        assert x["words"].shape == x["mask"].shape
        return self.fc((self.words(x["words"]) * x["mask"][:, :, None]).sum(1))


@pytest.mark.parametrize("strategies", [[], [HardBatches(0.5)]])
def test_inputs_of_several_tensors_and_a_collate_function(strategies):
    data = from_dataset(Sentences(), collate_fn=filled)
    run = trainer(strategies, Bag(), data, data, epochs=20, lr=0.1, workers=1)
    last = run.fit()
    assert last["train_loss"] < 0.8 * run.history[0]["train_loss"]
    assert run.run.shape is None


def test_rows_of_several_tensors_are_chosen():
    data = from_dataset(Sentences(), collate_fn=filled)
    narrowed = trainer([Trimming(0.9, 0.4, backward="compact")], Bag(), data, data)
    masked = trainer([Trimming(0.9, 0.4)], narrowed.initial, data, data)
    assert furthest(trained(narrowed).weights, trained(masked).weights) < 1e-5


def test_strategies_that_need_one_tensor_refuse_several():
    data = from_dataset(Sentences(), collate_fn=filled, classes=["even", "odd"])
    with pytest.raises(UserError, match="mixup needs inputs of floats, but inputs are more than one tensor"):
        trainer([Mixup()], Bag(), data, data)
    with pytest.raises(UserError, match="passive needs inputs of floats, but inputs are more than one tensor"):
        trainer([PassiveInjection(data)], Bag(), data, data)
    with pytest.raises(UserError, match="model is the name 'cnn', for which shape and classes must be known"):
        trainer(model="cnn", train=data, test=data)
    with pytest.raises(UserError, match="augment is flip, but Sentences is a dataset, whose transforms are its own"):
        trainer(model=Bag(), train=data, test=data, augment="flip")


# --- classes and parts -----------------------------------------------------------------------------------------------


def test_classes_are_the_datasets_or_those_of_the_training_set():
    run = trainer(train=Named(), test=Named(20), model="cnn")
    assert run.classes == ("a", "b", "c", "d")
    assert trainer(train=Named(), test=TEST).classes == ("a", "b", "c", "d")
    with pytest.raises(UserError, match="test data have 4 classes that are not the 4 of training"):
        trainer(train=from_dataset(Rows(), classes=list("wxyz")), test=Named(20))
    with pytest.raises(UserError, match="passive: Rows must have classes, for its head"):
        trainer([PassiveInjection(from_dataset(Rows()))], train=Rows(), test=TEST)


def test_rows_can_be_selected():
    part = from_dataset(Named(noise=0.1)).select(torch.tensor([5, 3]))
    assert isinstance(part, DatasetData)
    assert part.fetch([0, 1], [0, 0])[1].tolist() == DATA.labels[[5, 3]].tolist()


def test_rows_that_are_taken_as_they_are_are_no_test_of_standardised_ones():
    standardised = from_tensors(PIXELS, DATA.labels, standardize=True)
    with pytest.raises(UserError, match="test is the dataset Rows, whose rows are taken as they are"):
        trainer(train=standardised, test=TEST)
    with pytest.raises(UserError, match="data is the dataset Rows, whose rows are taken as they are"):
        trainer(train=standardised, test=(PIXELS, DATA.labels)).predict(TEST)


@pytest.mark.parametrize("label", [5, -1, -100])
def test_a_label_out_of_range_is_a_sentence_without_names_of_classes(label):
    with pytest.raises(UserError, match=rf"Broken: the label \[\d+\] is {label}; it must be in 0..3"):
        trainer(train=Broken(lambda row: (PIXELS[row], label)), test=TEST).fit()


@pytest.mark.parametrize(
    "collate", [None, lambda rows: ({"x": torch.stack([r[0] for r in rows])}, torch.tensor([r[1] for r in rows]))]
)
def test_what_was_trained_on_a_dataset_is_loaded_again(collate, tmp_path):
    data = from_dataset(Rows(), collate_fn=collate)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x["x"] if isinstance(x, dict) else x)

    run = trainer(model=Named(), train=data, test=data, out=tmp_path / "run")
    last = run.fit()
    found = load_model(tmp_path / "run", model=Named()).evaluate(data)
    assert found["accuracy"] == last["test_accuracy_plain"]
    assert found["loss"] == pytest.approx(last["test_loss"])


# --- what is wrong ---------------------------------------------------------------------------------------------------


class Broken(Rows):
    """Fails on a row beyond the first."""

    def __init__(self, how) -> None:
        super().__init__()
        self.how = how

    def __getitem__(self, row: int):
        return self.how(row) if row == 17 else super().__getitem__(row)


def fail(row):
    raise OSError(f"no file {row}")


def die(row):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (fail, "Broken: row 17 cannot be read: OSError: no file 17"),
        (lambda row: (PIXELS[row], 9), r"Broken: the label \[\d+\] is 9; it must be in 0..3"),
        (lambda row: (PIXELS[row][:, :4], 0), "Broken: collate_fn fails on rows .*: RuntimeError: stack expects each"),
    ],
)
def test_a_row_that_fails_is_a_sentence(how, sentence, workers):
    data = from_dataset(Broken(how), classes=list("abcd"))
    with pytest.raises(UserError, match=sentence):
        trainer(train=data, test=from_dataset(TEST, classes=list("abcd")), workers=workers).fit()


def test_a_worker_that_dies_is_a_sentence():
    run = trainer(train=Broken(die), test=TEST, workers=2)
    with pytest.raises(UserError, match="Broken: a worker process ended .* try workers=0"):
        run.fit()


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("dataset", "collate", "sentence"),
    [
        (Endless(), None, "dataset must be map-style, .*got Endless"),
        (Rows(0), None, "Rows: the dataset has no rows"),
        (Sentences(), None, r"must make a pair \(inputs, labels\) from a list of rows, got a dict with words, label"),
        (
            Rows(),
            lambda rows: (PIXELS[:3], torch.zeros(1).long()),
            r"a batch of 1 rows has a tensor of shape \(3, 1, 6, 6\)",
        ),
        (Rows(), lambda rows: (PIXELS[:1], torch.zeros(1)), "labels of a batch must be a tensor of whole numbers"),
        (Rows(), lambda rows: (PIXELS[:1], [1]), "labels of a batch must be a tensor .*got list"),
        (Rows(), lambda rows: 1 / 0, "Rows: collate_fn fails on rows 0: ZeroDivisionError"),
    ],
)
def test_what_is_no_dataset_is_refused(dataset, collate, sentence):
    with pytest.raises(UserError, match=sentence):
        from_dataset(dataset, collate_fn=collate)


@pytest.mark.parametrize("workers", [-1, 1.5])
def test_workers_that_are_no_count_are_refused(workers):
    with pytest.raises(UserError, match="workers must be a whole number of at least 0"):
        trainer(workers=workers)
