"""Models that come out of a run: their weights, their inputs, the names of their classes."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
import warm
from training import images, net, single_thread, without_plots
from training import trainer as made

pytest.importorskip("msgspec")
pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

import batchkern
from batchkern.errors import UserError
from batchkern.rundir import CONFIG, PREPROCESSING, WEIGHTS, RunDirectory
from batchkern.strategies import PassiveInjection, StochasticAugmentation
from batchkern.trainer import Trainer

one_thread = single_thread()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_plots(monkeypatch)


def trained(out, model="cnn", strategies=(), **options):
    """A trainer that has trained into ``out``, and its test data."""
    test = images(600, seed=1)  # more than are evaluated at a time
    trainer = made(strategies, model, images(64), test, out=out, lr=0.05, **options)
    trainer.fit()
    return trainer, test


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "run"
    Trainer("cnn", images(64), images(20, seed=1), epochs=1, batch_size=8, out=path, progress=False).fit()
    return path


@pytest.fixture
def run(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "run")


def same(model, tensors):
    own = model.state_dict()
    return own.keys() == tensors.keys() and all(torch.equal(own[name], value) for name, value in tensors.items())


def test_a_run_becomes_a_model_that_does_as_well(tmp_path):
    voting = StochasticAugmentation(gaussian=9, sigma=3.0, tau=9.0, vote_layer="fc")
    trainer, test = trained(tmp_path / "run", "resnet8", [voting], epochs=3)
    loaded = batchkern.load_model(tmp_path / "run")
    assert same(loaded.model, trainer.model.state_dict())
    assert not loaded.model.training
    assert loaded.classes == tuple(test.classes)
    assert loaded.preprocessing == trainer.preprocessing
    row, found = trainer.history[-1], loaded.evaluate(test)
    assert (found["accuracy"], found["loss"]) == (row["test_accuracy_plain"], row["test_loss"])
    assert row["test_accuracy"] != row["test_accuracy_plain"], "the vote is no part of the model"
    assert "top5_accuracy" not in found  # of four classes


def test_in_mixed_precision_too(tmp_path):
    trainer, test = trained(tmp_path / "run", amp="bf16", strategies=[PassiveInjection(images(32, 3), every=2)])
    loaded = batchkern.load_model(tmp_path / "run")
    row, found = trainer.history[-1], loaded.evaluate(test)
    assert (found["accuracy"], found["loss"]) == (row["test_accuracy_plain"], row["test_loss"])
    logits = loaded.model(loaded.preprocessing(test.images))
    assert torch.nn.functional.cross_entropy(logits, test.labels).item() != row["test_loss"], "in single precision"


def test_accuracy_of_each_class_and_of_the_first_five(run, tmp_path):
    train, test = images(80, classes=7), images(50, seed=1, classes=7)
    missing = test.select((test.labels != 3).nonzero().flatten())
    trainer = made((), "cnn", train, missing, out=tmp_path / "seven", epochs=1)
    row, loaded = trainer.fit(), batchkern.load_model(tmp_path / "seven")
    found = loaded.evaluate(missing)
    assert found["top5_accuracy"] == row["test_top5_accuracy"] > found["accuracy"]
    predicted = loaded.model(loaded.preprocessing(missing.images)).argmax(1)
    for label, entry in enumerate(found["per_class"]):
        right = (predicted == missing.labels)[missing.labels == label].tolist()
        assert entry == {
            "class": str(label), "rows": len(right), "accuracy": sum(right) / len(right) if right else None
        }  # fmt: skip
    assert found["per_class"][3]["accuracy"] is None
    for data, says in ((test.reshaped((1, 8, 8)), "shape"), (images(20), "has other classes than the model")):
        with pytest.raises(UserError, match=says):
            loaded.evaluate(data)


def test_a_module_of_the_users(tmp_path):
    trainer, test = trained(tmp_path / "run", net(norm=True), classifier="fc")
    with pytest.raises(UserError, match=r"was a module, Net with \d+ parameters: give one of the same layers"):
        batchkern.load_model(tmp_path / "run")
    mine = net(5, norm=True).requires_grad_(False)
    loaded = batchkern.load_model(tmp_path / "run", model=mine)
    assert loaded.model is mine
    assert not mine.training
    assert same(mine, trainer.model.state_dict())
    assert loaded.preprocessing.model is None
    assert loaded.preprocessing.classifier == "fc"
    assert loaded.evaluate(test)["accuracy"] == trainer.history[-1]["test_accuracy_plain"]
    for other, says in (
        (net(), "has norm.[a-z_]*, which the model has not"),
        (net(classes=6, norm=True), "fc.(weight|bias) in"),
    ):
        with pytest.raises(UserError, match=says):
            batchkern.load_model(tmp_path / "run", model=other)
    with pytest.raises(UserError, match="model must be a module, got 'cnn'"):
        batchkern.load_model(tmp_path / "run", model="cnn")


def test_loading_draws_no_numbers_of_the_callers(run):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    batchkern.load_model(run)
    assert torch.equal(torch.rand(4), expected)


def test_plain_pytorch_needs_two_lines(tmp_path):
    """As docs/trained-models.md has them."""
    trainer, test = trained(tmp_path / "run", net(norm=True))
    pixels, labels = test.images, test.labels
    torch.save((pixels, labels), tmp_path / "test.pt")
    (tmp_path / "script.py").write_text(
        "import json, sys, torch, safetensors.torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        nn = torch.nn\n"
        "        self.conv1, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)\n"
        "        self.conv2, self.hidden = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(54, 16)\n"
        "        self.fc = nn.Linear(16, 4)\n"
        "    def forward(self, x):\n"
        "        x = torch.nn.functional.max_pool2d(self.norm(self.conv1(x)).relu(), 2)\n"
        "        return self.fc(self.hidden(self.conv2(x).relu().flatten(1)).relu())\n"
        "model, run = Net().eval(), json.load(open('run/preprocessing.json'))\n"
        "model.load_state_dict(safetensors.torch.load_file('run/model.safetensors'))\n"
        "mean, std = (torch.tensor(run[name]).view(-1, 1, 1) for name in ('mean', 'std'))\n"
        "pixels, labels = torch.load('test.pt')\n"
        "predicted = model((pixels / 255 - mean) / std).argmax(1)\n"
        "assert 'batchkern' not in sys.modules\n"
        "print(float((predicted == labels).double().mean()), run['classes'])\n"
    )
    done = warm.run("script.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = trainer.history[-1]
    assert done.stdout == f"{row['test_accuracy_plain']} {list(test.classes)}\n"


# --- what is no such run ----------------------------------------------------------------------------------------------


def refuses(path, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        batchkern.load_model(path)
    assert "\n" not in str(refused.value)


def test_what_holds_no_model(run, tmp_path):
    refuses(tmp_path / "nowhere", "nowhere is no directory of a run: config.json is missing or unreadable")
    refuses(run / WEIGHTS, "is no directory of a run")
    refuses(3, "run must be the directory of a run, got 3")
    os.rename(run / WEIGHTS, run / "elsewhere")
    refuses(run, r"has not ended, since it has no model.safetensors; resume it \(--resume\) to its end")
    (run / CONFIG).write_text('{"architectures": ["BertModel"]}')
    refuses(run, "is no directory of a run")


def test_a_run_of_before_is_told_what_to_do_which_is_true(run):
    weights, preprocessing = ((run / name).read_bytes() for name in (WEIGHTS, PREPROCESSING))
    (run / PREPROCESSING).unlink()
    refuses(run, r"has no preprocessing.json, .* the same training with resume \(--resume\) writes it, and trains no")
    same_run = {"epochs": 1, "batch_size": 8, "out": run, "progress": False, "resume": True}
    again = Trainer("cnn", images(64), images(20, seed=1), **same_run)
    updates = again.counts.updates
    again.fit()
    assert again.counts.updates == updates == 8
    assert (run / PREPROCESSING).read_bytes() == preprocessing
    assert (run / WEIGHTS).read_bytes() == weights
    batchkern.load_model(run)


def test_a_run_with_weights_has_all_that_they_need(tmp_path, monkeypatch):
    def full(directory, name, tensors):
        raise UserError(f"{name} cannot be written")

    monkeypatch.setattr(RunDirectory, "save_tensors", full)
    with pytest.raises(UserError, match=r"model.safetensors cannot be written"):
        trained(tmp_path / "run")
    assert (tmp_path / "run" / PREPROCESSING).exists()
    refuses(tmp_path / "run", "has not ended")


def test_files_that_were_damaged(run):
    whole = (run / PREPROCESSING).read_text()
    (run / PREPROCESSING).write_text(whole[:-9])
    refuses(run, "preprocessing.json is damaged: ")
    for change, sentence in (
        (
            {"classes": ["a", "b"]},
            r"is of inputs \[1, 6, 6\] in 2 classes, and the run, by its config.json, of .* in 4",
        ),
        ({"shape": [1, 2**40, 6]}, r"is of inputs \[1, 1099511627776, 6\] in 4 classes, and the run"),
        ({"model": "cmm"}, "unknown model 'cmm'"),
        ({"model": "resnet8"}, "it must be of the same network"),
        ({"classifier": "head"}, "classifier 'head' is not in the model"),
    ):
        (run / PREPROCESSING).write_text(json.dumps(json.loads(whole) | change))
        refuses(run, sentence)
    (run / PREPROCESSING).write_text(whole)
    batchkern.load_model(run)
    tensors = load_file(run / WEIGHTS)
    tensors["conv1.bias"][1] = float("nan")
    save_file(tensors, run / WEIGHTS)
    refuses(run, "weights: conv1.bias in .* has values that are not finite")
    (run / WEIGHTS).write_bytes((run / WEIGHTS).read_bytes()[:-1])
    refuses(run, "weights: .* is no file of safetensors")
    (run / CONFIG).write_text((run / CONFIG).read_text().replace('"amp": "none"', '"amp": "bf8"'))
    refuses(run, "is no directory of a run")


def test_operations_do_not_wait_for_it(tmp_path):
    script = "import batchkern, sys; early = {'batchkern.trained', 'batchkern.data'} & {*sys.modules}\n"
    script += "from batchkern import load_model; print(early, load_model.__module__); batchkern.load_models"
    done = warm.run("-c", script, cwd=tmp_path)
    assert done.stdout == "set() batchkern.trained\n"
    assert "AttributeError: module 'batchkern' has no attribute 'load_models'" in done.stderr
