"""The example of detection: the boxes it draws, the weights it takes, what it counts, and that it learns."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training import single_thread

pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")
pytest.importorskip("timm")

from safetensors.torch import load_file, save_file

from batchkern.errors import UserError
from batchkern.models import build

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "detection.py"
one_thread = single_thread()


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("detection", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["detection"] = module
    spec.loader.exec_module(module)
    return module


example = load_script()
FEW = {"box_batch_size_per_image": 32, "rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 50}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of images, and the JSON of their boxes."""
    return example.draw(tmp_path_factory.mktemp("drawn"), "train", 6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a training of timm's ResNet-18 leaves."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    model = build("resnet18", shape=(3, 32, 32), classes=10)
    model(torch.randn(8, 3, 32, 32))  # batch norm has statistics
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def test_boxes_are_those_of_the_shapes(drawn):
    """The bright pixels of an image lie within its boxes and touch all four sides of a box that no other overlaps."""
    data = example.Boxes(*drawn)
    assert len(data) == 6
    alone = 0
    for image, target in data:
        bright = image.amax(0) > 0.4  # noise is below 90 of 255
        covered = torch.zeros_like(bright)
        for left, top, right, bottom in target["boxes"].int().tolist():
            covered[top:bottom, left:right] = True
        assert not (bright & ~covered).any()
        if len(target["boxes"]) == 1:
            alone += 1
            rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
            assert target["boxes"][0].tolist() == [
                float(columns[0]),
                float(rows[0]),
                float(columns[-1]) + 1,
                float(rows[-1]) + 1,
            ]
        assert set(target["labels"].tolist()) <= {1, 2, 3}
    assert alone


def test_a_mirrored_box_holds_the_same_pixels(drawn):
    image, target = example.Boxes(*drawn)[0]
    other, moved = example.mirrored(image, target)
    for before, after in zip(target["boxes"].int().tolist(), moved["boxes"].int().tolist(), strict=True):
        own = image[:, before[1] : before[3], before[0] : before[2]]
        assert torch.equal(own.flip(-1), other[:, after[1] : after[3], after[0] : after[2]])
    assert torch.equal(moved["labels"], target["labels"])


def test_the_backbone_has_the_weights_of_the_run(run):
    """And gives, through torchvision's layers, what timm's network gives."""
    model = example.detector("resnet18", run, 3, size=64, trained_layers=3).eval()
    tensors = load_file(run / "model.safetensors")
    own = model.backbone.body.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in own.items())
    source = build("resnet18", shape=(3, 32, 32), classes=10)
    source.load_state_dict(tensors)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        last = model.backbone.body(images)["3"]
        assert torch.allclose(last, source.eval().forward_features(images), atol=1e-4)


def test_weights_of_another_network_are_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"does not have the weights of a resnet50: .* is missing, or of another shape"):
        example.detector("resnet50", run, 3, size=64, trained_layers=3)
    with pytest.raises(UserError, match="is no file of weights, as a run has that has ended"):
        example.detector("resnet18", tmp_path, 3, size=64, trained_layers=3)


def test_average_precision(drawn):
    """Of the truth itself; of every box moved by a fourth of its width, which overlaps by 0.6; of half of the boxes."""
    data = example.Boxes(*drawn)
    truth = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in data.coco.loadAnns(data.coco.getAnnIds())
    ]
    assert example.average_precision(data.coco, truth) == pytest.approx((100, 100))
    moved = [a | {"bbox": [a["bbox"][0] + a["bbox"][2] / 4, *a["bbox"][1:]]} for a in truth]
    assert example.average_precision(data.coco, moved) == pytest.approx((30, 100))  # of ten overlaps three are reached
    assert example.average_precision(data.coco, []) == (0, 0)
    wrong = [a | {"category_id": 10 + a["category_id"] % 30} for a in truth]
    assert max(example.average_precision(data.coco, wrong)) < 20


@pytest.mark.slow
def test_it_learns(drawn, run):
    torch.manual_seed(0)
    model = example.detector("resnet18", run, 3, size=64, trained_layers=5, **FEW)
    data = example.Boxes(*drawn)

    def loss():
        torch.manual_seed(1)
        pairs = [data[place] for place in range(3)]
        losses = model.train()([image for image, _ in pairs], [target for _, target in pairs])
        return sum(float(part.detach()) for part in losses.values())

    before = loss()
    options = argparse.Namespace(batch=3, epochs=4, lr=0.01, workers=0)
    example.train(model, data, options, seed=0)
    assert loss() < 0.8 * before


@pytest.mark.slow
def test_from_the_command_line(run, tmp_path, monkeypatch, capsys):
    draw, build_detector = example.draw, example.detector
    monkeypatch.setattr(example, "draw", lambda folder, name, count: draw(folder, name, 4))
    monkeypatch.setattr(example, "detector", lambda *args, **options: build_detector(*args, **options, **FEW))
    words = ["--backbone", f"plain={run}", "--backbone", f"same={run}", "--model", "resnet18", "--size", "64"]
    words += ["--epochs", "1", "--batch", "2", "--seeds", "2", "--workers", "0"]
    words += ["--drawn", str(tmp_path / "drawn"), "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["detection.py", *words])
    assert example.main() == 0
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [(row["backbone"], row["seed"]) for row in rows] == [(n, s) for s in (0, 1) for n in ("plain", "same")]
    # The same weights, seed by seed: the same detector.
    assert [row["ap"] for row in rows[::2]] == [row["ap"] for row in rows[1::2]]
    assert "same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is no file of boxes in COCO's format: JSONDecodeError"),
        ("{}", "is no file of boxes in COCO's format: KeyError: 'categories'|has 0 images and 0 categories"),
        (None, "cannot be read|is no file of boxes in COCO's format: IsADirectoryError"),
        ("moved", "has no 0.png, which .*moved.json names"),
    ],
)
def test_boxes_that_are_none(drawn, tmp_path, content, sentence):
    file = tmp_path / "moved.json"
    if content is None:
        file.mkdir()
    else:
        file.write_text(drawn[1].read_text() if content == "moved" else content)
    with pytest.raises(UserError, match=sentence):
        example.Boxes(tmp_path if content == "moved" else drawn[0], file)


def test_nothing_is_drawn_for_backbones_that_are_none(tmp_path, monkeypatch, capsys):
    words = ["--backbone", f"a={tmp_path}", "--model", "resnet18", "--drawn", str(tmp_path / "drawn")]
    monkeypatch.setattr(sys, "argv", ["detection.py", *words])
    assert example.main() == 2
    assert "is no file of weights" in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--drawn", "x"], "the following arguments are required: --backbone"),
        (["--backbone", "a=b"], "--train and --test, both, or --drawn"),
        (["--backbone", "a", "--drawn", "x"], "--backbone must be NAME=RUN"),
        (["--backbone", "a=b", "--drawn", "x", "--trained-layers", "6"], "--trained-layers must be at most 5, got 6"),
        (["--backbone", "a=b", "--drawn", "x", "--size", "8"], "--size must be at least 32, got 8"),
        (["--backbone", "a=b", "--drawn", "x", "--model", "vgg"], "--model must be resnet18, .* got 'vgg'"),
    ],
)
def test_wrong_arguments(words, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["detection.py", *words])
    with pytest.raises(SystemExit) as ended:
        example.main()
    assert ended.value.code == 2
    assert re.search(sentence, capsys.readouterr().err)
