"""What turns images into what a trained model takes: as training did, bit for bit, and read from a file with care."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import image_files
import pytest
import torch
from training import images, single_thread

pytest.importorskip("msgspec")
pytest.importorskip("safetensors")

from PIL import Image

from batchkern.data import TensorImages, find_images, load, load_pair, match_shape
from batchkern.errors import UserError
from batchkern.preprocessing import ImagePreprocessing, encoded, read
from batchkern.trainer import Trainer

one_thread = single_thread()
PREPROCESSING = ImagePreprocessing(
    (3, 8, 8), (0.1, 1 / 3, 0.5), (0.2, 0.25, 1 / 7), "squeeze", ("cat", "dog, \n\ud800", "Änte"), "cnn", None
)


def folder(root, channels=3, sizes=((20, 14), (9, 31), (8, 8), (12, 12), (16, 16))):
    """Two classes of images of many sizes, PNG."""
    for place in range(40):
        height, width = sizes[place % len(sizes)]
        pixels = image_files.random_pixels(1, height, width, channels, seed=place)[0]
        file = root / "ab"[place % 2] / f"{place:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return root


def preprocessing_of(train):
    return ImagePreprocessing.of(train, train.statistics(), model="cnn", classifier=None)


# --- as in training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("center_crop", [False, True])
def test_files_and_images_become_what_the_trainer_evaluates(tmp_path, center_crop, channels):
    train, _ = load_pair(folder(tmp_path / "train", channels), image_size=12, center_crop=center_crop)
    test = match_shape(load(folder(tmp_path / "test", channels), image_size=12, center_crop=center_crop), train.shape)
    trainer = Trainer("cnn", train, test, epochs=1, batch_size=8, progress=False)
    expected = trainer.test_feed.batch(torch.arange(len(test)), None)[0]
    files = find_images([tmp_path / "test"])
    assert len(files) == len(test) == 40
    assert torch.equal(trainer.preprocessing(files), expected)
    opened = [Image.open(file) for file in files]
    assert torch.equal(trainer.preprocessing(opened), expected)
    assert expected.std(dim=0).min() > 0.1, "images differ"
    other = replace(trainer.preprocessing, resize="squeeze" if center_crop else "center-crop")
    assert not torch.equal(other(files), expected)


def test_tensors_become_what_the_trainer_evaluates():
    train, test = images(40), images(20, seed=1)
    trainer = Trainer("cnn", train, test, epochs=1, batch_size=8, progress=False)
    expected = trainer.test_feed.batch(torch.arange(20), None)[0]
    assert torch.equal(trainer.preprocessing(test.images), expected)
    crop = replace(trainer.preprocessing, resize="center-crop")
    assert torch.equal(crop(test.images), expected), "what has the model's size is ready"


@pytest.mark.parametrize("center_crop", [False, True])
def test_tensors_of_another_size_become_what_data_in_memory_become(center_crop):
    train, test = load_pair("digits", image_size=6, center_crop=center_crop)
    assert preprocessing_of(train).resize == ("center-crop" if center_crop else "squeeze")
    feed = preprocessing_of(train).feed(test, "cpu")
    _, whole = load_pair("digits")
    made = preprocessing_of(train)(whole.images)
    assert torch.equal(made, feed.batch(torch.arange(len(test)), None)[0])


def test_colour_becomes_grey_and_grey_becomes_colour():
    grey, colour = images(20), images(20, shape=(3, 6, 6))
    for own, other in ((grey, colour), (colour, grey)):
        made = preprocessing_of(own)(other.images)
        feed = preprocessing_of(own).feed(match_shape(other, own.shape), "cpu")
        assert torch.equal(made, feed.batch(torch.arange(20), None)[0])


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    pixels = image_files.random_pixels(1, 12, 6)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by a right angle
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "data" / label / "photo.png", exif=exif)
    data = load(tmp_path / "data")
    assert data.shape == (3, 6, 12)
    file = tmp_path / "data" / "a" / "photo.png"
    expected = preprocessing_of(data).feed(data, "cpu").batch(torch.tensor([0]), None)[0]
    assert torch.equal(preprocessing_of(data)([file]), expected)
    assert torch.equal(preprocessing_of(data)([Image.open(file)]), expected)


def test_how_images_were_cut_out_is_known_of_parts_and_of_relabelled_data(tmp_path):
    train = load(folder(tmp_path), image_size=8, center_crop=True)
    for data in (train, train.select(torch.arange(5)), train.relabelled(train.labels, clean=None)):
        assert preprocessing_of(data).resize == "center-crop"
    assert preprocessing_of(match_shape(train, (3, 8, 10))).resize == "squeeze"
    digits = load("digits", image_size=8, center_crop=True)
    assert digits.select(torch.arange(9)).center_crop
    assert not load("digits", image_size=9).center_crop


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("photo.png", "images must be a uint8 tensor .* or a list of paths and images of PIL, not 'photo.png'"),
        ([3.5], r"images\[0\] must be a path or an image of PIL, not 3.5"),
        (torch.zeros(2, 3, 8, 8), "images must be uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "images must be uint8"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "at least one is needed"),
        ([], "at least one is needed"),
        (["missing.png"], r"images: row 0 \(missing.png\) is not a readable image: FileNotFoundError"),
        (["pipe"], r"images: row 0 \(pipe\) is not a readable image: OSError.*not a regular file"),
        (["text.png"], r"images: row 0 \(text.png\) is not a readable image: its format is unknown"),
    ],
)
def test_what_is_no_image(tmp_path, monkeypatch, given, sentence):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=sentence):
        PREPROCESSING(given)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path):
    file = tmp_path / "preprocessing.json"
    for written in (PREPROCESSING, replace(PREPROCESSING, model=None, classifier="head.fc", resize="center-crop")):
        file.write_bytes(encoded(written))
        assert read(file) == written
    train = images(40, shape=(3, 6, 6))
    file.write_bytes(encoded(preprocessing_of(train)))
    mean, std = train.statistics()
    assert torch.equal(torch.tensor(read(file).mean), mean)
    assert torch.equal(torch.tensor(read(file).std), std)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 2}, "is of format 2 and kind 'images'; batchkern .* reads format 1 and images"),
        (
            {"kind": "sounds"},
            "is of format 1 and kind 'sounds'; batchkern .* reads format 1 and images, tensors, table",
        ),
        ({"format": "1"}, r"is damaged: Expected `int`, got `str` - at `\$.format`"),
        ({"shape": [3, 8]}, r"is damaged: Expected `array` of length 3, got 2 - at `\$.shape`"),
        ({"shape": [3, 0, 8]}, "is damaged: shape must be"),
        ({"mean": [0.1]}, "is damaged: mean must be 3 finite numbers"),
        ({"mean": [0.1, float("nan"), 0.1]}, "is damaged: mean must be 3 finite numbers"),
        ({"mean": [0.1, 10**400, 0.1]}, "is damaged: "),
        ({"std": [0.1, 1e300, 0.1]}, "is damaged: std must be 3 finite numbers"),
        ({"std": [0.1, 0.0, 0.1]}, "is damaged: std must be positive"),
        ({"std": None}, "is damaged: Expected `array`, got `null`"),
        ({"resize": "stretch"}, "is damaged: Invalid enum value 'stretch'"),
        ({"resize": "center-crop", "shape": [3, 8, 9]}, "is damaged: resize must be squeeze"),
        ({"classes": ["a"]}, "is damaged: classes must be two different names at least"),
        ({"classes": ["a", "b", "a"]}, "is damaged: classes must be two different names at least"),
        ({"classes": ["a", 3]}, r"is damaged: Expected `str`, got `int` - at `\$.classes\[1\]`"),
        ({"model": 7}, r"is damaged: Expected `str \| null`"),
    ],
)
def test_a_file_that_was_changed(tmp_path, change, sentence):
    file = tmp_path / "preprocessing.json"
    file.write_text(json.dumps(json.loads(encoded(PREPROCESSING)) | change))
    with pytest.raises(UserError, match=f"preprocessing.json {sentence}"):
        read(file)


@pytest.mark.parametrize("name", json.loads(encoded(PREPROCESSING)))
def test_all_of_it_is_needed(tmp_path, name):
    content = json.loads(encoded(PREPROCESSING))
    del content[name]
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"p.json is damaged: Object missing required field `{name}`"):
        read(tmp_path / "p.json")


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"p.json cannot be read: No such file"):
        read(tmp_path / "p.json")
    for content in (b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "p.json").write_bytes(content)
        with pytest.raises(UserError, match=r"p.json is damaged: "):
            read(tmp_path / "p.json")


def test_unlabelled_images_are_what_the_trainer_predicts():
    train, test = images(40), images(20, seed=1)
    trainer = Trainer("cnn", train, test, epochs=1, batch_size=8, progress=False)
    trainer.fit()
    expected = trainer.predict(test)
    assert len(expected.unique()) > 1
    assert torch.equal(trainer.predict(trainer.preprocessing.data(test.images)), expected)
    doubled = TensorImages(test.images.repeat_interleave(2, 2), test.labels, test.classes, name="taller")
    assert trainer.predict(trainer.preprocessing.data(doubled.images)).shape == (20,)
