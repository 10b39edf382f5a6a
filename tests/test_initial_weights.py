"""Trainings that begin with the weights of a file, of an earlier run, or of timm."""

from __future__ import annotations

import json
import warnings

import commands
import pytest
import torch
from training import CLASSES, SHAPE, Net, images, single_thread

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from batchkern.compare import Comparison
from batchkern.errors import UserError
from batchkern.initial_weights import describe_weights, load_weights
from batchkern.models import build
from batchkern.strategies import PassiveInjection, Stepwise
from batchkern.trainer import Trainer

one_thread = single_thread()


def network(seed: int = 0, classes: int = CLASSES) -> Net:
    torch.manual_seed(seed)
    return Net(norm=True, classes=classes)


def trainer(model, weights=None, *, classes=CLASSES, **options):
    options = {"epochs": 2, "batch_size": 16, "progress": False} | options
    return Trainer(model, images(64, 0, classes=classes), images(32, 1, classes=classes), weights=weights, **options)


def same(model, tensors):
    own = model.state_dict()
    return own.keys() == tensors.keys() and all(torch.equal(own[name], value) for name, value in tensors.items())


@pytest.fixture
def file(tmp_path):
    """The weights of a network that has seen some images, so that its batch norm has statistics."""
    model = network(1)
    model(torch.randn(8, *SHAPE))
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_a_file_becomes_the_models_weights(file):
    model = network(2)
    assert not same(model, load_file(file))
    load_weights(model, file)
    assert same(model, load_file(file))


def test_a_training_goes_on_from_a_run(tmp_path):
    """The second training's first update begins with the weights that the first one's run has written."""
    first = trainer("cnn", out=tmp_path / "first")
    first.fit()
    second = trainer("cnn", tmp_path / "first", seed=7)
    assert same(second.model, first.model.state_dict())
    second.fit()
    assert not same(second.model, first.model.state_dict())


def test_half_precision_becomes_single(file, tmp_path):
    tensors = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in load_file(file).items()
    }
    save_file(tensors, tmp_path / "half.safetensors")
    model = network(2)
    load_weights(model, tmp_path / "half.safetensors")
    own = model.state_dict()
    assert own["conv1.weight"].dtype == torch.float32
    assert torch.equal(own["conv1.weight"], tensors["conv1.weight"].float())


def test_a_classifier_of_other_classes_begins_at_random(file):
    model, before = network(2, classes=6), network(2, classes=6).state_dict()
    with pytest.warns(UserWarning, match=r"has 4 classes; this one has 6, and starts from random weights"):
        load_weights(model, file)
    found, own = load_file(file), model.state_dict()
    left = {name for name in own if torch.equal(own[name], before[name]) and not torch.equal(own[name], found[name])}
    assert left == {"fc.weight", "fc.bias"}
    assert all(torch.equal(own[name], found[name]) for name in own.keys() - left)


def test_strategies_see_the_weights(file):
    """A step that starts anew starts from them, and the passive head copies no other."""
    model = trainer(network(2), file, strategies=[Stepwise((0.5, 1.0), (1, 1), share_weights=False)])
    initial = model.strategies[0].initial
    assert all(torch.equal(initial[name], value) for name, value in load_file(file).items())
    passive = trainer(network(2), file, strategies=[PassiveInjection(images(32, 3, classes=2))])
    assert same(passive.model, load_file(file))


def test_a_run_is_resumed_with_the_same_file_alone(file, tmp_path):
    trainer(network(2), file, out=tmp_path / "run", epochs=1).fit()
    config = json.loads((tmp_path / "run" / "config.json").read_bytes())["settings"]["weights"]
    assert config == describe_weights(file)
    again = tmp_path / "elsewhere.safetensors"
    again.write_bytes(file.read_bytes())
    trainer(network(2), again, out=tmp_path / "run", epochs=1, resume=True)  # its content is what counts
    save_file(network(3).state_dict(), file)
    with pytest.raises(UserError, match="cannot be resumed: weights was"):
        trainer(network(2), file, out=tmp_path / "run", epochs=1, resume=True)


def spoilt(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("conv1.bias"), r"lacks conv1.bias, which the model has \(1 names are missing, 0 unknown\)"),
        (lambda t: t.update(more=torch.ones(2)), r"has more, which the model has not \(0 names .* 1 unknown\)"),
        (lambda t: t.update({"conv1.weight": torch.ones(4, 1, 5, 5)}), r"conv1.weight .* \(4, 1, 5, 5\), in the model"),
        (
            lambda t: t.update({"conv1.bias": torch.ones(4).int()}),
            r"conv1.bias in .* is torch.int32, in the model torch",
        ),
        (lambda t: t["conv1.bias"].fill_(float("nan")), r"conv1.bias in .* has values that are not finite"),
    ],
)
def test_weights_of_another_network_are_refused(file, change, sentence):
    spoilt(file, change)
    model = network(2)
    with pytest.raises(UserError, match=r"^weights: .*" + sentence):
        load_weights(model, file)
    assert same(model, network(2).state_dict())


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    torch.save(network().state_dict(), tmp_path / "torch.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    for name in ("torch.pt", "cut.safetensors"):
        with pytest.raises(UserError, match=rf"^weights: .*{name} is no file of safetensors .* run code when"):
            trainer(network(), tmp_path / name)
    with pytest.raises(UserError, match=r"weights: .*none cannot be read: No such file"):
        trainer(network(), tmp_path / "none")
    with pytest.raises(
        UserError, match=r"weights: the directory .* has no model.safetensors, as a run has that has en"
    ):
        trainer(network(), tmp_path)
    with pytest.raises(UserError, match=r"weights must be a path, or the word pretrained, got 7"):
        trainer(network(), 7)


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}, {}])
def test_weights_are_not_written_over(tmp_path, options):
    """A run that begins with its own weights would lose them, and could not go on."""
    trainer("cnn", out=tmp_path / "run", epochs=1).fit()
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    for weights in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        with pytest.raises(UserError, match=r"^weights are .*, in .*run, whose files are written: give another output"):
            trainer("cnn", weights, out=tmp_path / "run", **options)
    with pytest.raises(UserError, match=r"^weights are .*, whose files are written"):
        Comparison("digits", "cnn", tmp_path, training={"weights": tmp_path / "run"}, arms=("baseline",))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


# --- of timm ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub, offline, that has weights of timm's smallest residual network."""
    pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--timm--test_resnet.r160_in1k", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    torch.manual_seed(5)
    saved = build("test_resnet", shape=(3, 32, 32), classes=1000).state_dict()
    save_file(saved, snapshot / "model.safetensors")
    return saved


def test_pretrained_weights_of_timm(hub):
    made = trainer_of_timm("pretrained", seed=1)
    own = made.model.state_dict()
    shared = [name for name in own if not name.startswith("fc.")]
    assert all(torch.equal(own[name], hub[name]) for name in shared)
    assert own["fc.weight"].shape[0] == CLASSES
    other = trainer_of_timm("pretrained", seed=2).model.state_dict()
    assert not torch.equal(own["fc.weight"], other["fc.weight"])  # as random as the seed makes it
    assert made.settings["weights"] == "pretrained"


def trainer_of_timm(weights, **options):
    data = images(32, 0, (3, 32, 32))
    return Trainer("test_resnet", data, data, weights=weights, epochs=1, batch_size=16, progress=False, **options)


def test_pretrained_weights_that_cannot_be_had(hub, tmp_path):
    with pytest.raises(UserError, match=r"^there are no pretrained weights for 'cnn': only for models of timm"):
        trainer("cnn", "pretrained")
    with pytest.raises(UserError, match=r"^weights are pretrained, but model is a module"):
        trainer(network(), "pretrained")
    with pytest.raises(UserError, match=r"^timm has no pretrained weights for 'resnet18_no_such|^unknown model"):
        build("resnet18_no_such", shape=(3, 32, 32), classes=10, pretrained=True)
    with pytest.raises(UserError, match=r"^timm has no pretrained weights for 'resnet200'"):
        build("resnet200", shape=(3, 32, 32), classes=10, pretrained=True)
    with pytest.raises(UserError, match=r"^the pretrained weights of 'test_efficientnet' cannot be loaded: "):
        build("test_efficientnet", shape=(3, 32, 32), classes=10, pretrained=True)


# --- from the command line -------------------------------------------------------------------------------------------


def test_command_line(tmp_path, monkeypatch):
    pytest.importorskip("typer")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    common = ["--data", "digits", "--epochs", "1", "--device", "cpu"]
    status, _, err = commands.run("train", *common, "--out", "first")
    assert status == 0, err
    status, _, err = commands.run("train", *common, "--out", "second", "--weights", "first", "--seed", "3")
    assert status == 0, err
    first, second = (json.loads((tmp_path / name / "metrics.jsonl").read_bytes()) for name in ("first", "second"))
    assert second["test_accuracy"] > first["test_accuracy"]
    arms = ["--arms", "trimming", "--seeds", "1", "--no-controls", "--budget", "epochs", "--jobs", "1"]
    status, _, err = commands.run("compare", *common, *arms, "--weights", "first", "--out", "compared")
    assert status == 0, err
    settings = json.loads((tmp_path / "compared" / "results.json").read_bytes())["settings"]
    assert settings["weights"] == describe_weights("first")
    for command in ("train", "compare"):
        status, _, err = commands.run(command, *common, "--weights", "first", "--pretrained", "--out", "third")
        assert (status, err) == (
            2,
            "batchkern: error: --weights and --pretrained exclude each other; give one of them\n",
        )
    status, _, err = commands.run("train", *common, "--weights", "pretrained", "--out", "third")
    assert status == 2
    assert "weights: pretrained cannot be read: No such file or directory" in err


def test_no_warning_where_all_fits(file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(network(2), file)
