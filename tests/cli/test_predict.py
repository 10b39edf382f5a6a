"""``batchkern predict``: a line for each image, and nothing where one cannot be read."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import commands
import image_files
import numpy as np
import pytest
import torch
from test_evaluate import refused, run
from training import Net, single_thread, without_plots

pytest.importorskip("typer")
pytest.importorskip("msgspec")

from PIL import Image

import batchkern
from batchkern.data import TensorImages
from batchkern.rundir import PREPROCESSING
from batchkern.trainer import Trainer

one_thread = single_thread()
CLASSES = ["red", "green, dark", "predicted"]
HEADING = ["predicted", "probability", *(f"probability({name})" for name in CLASSES)]


def pictures(rows, seed, size=8):
    """uint8 (rows, size, size, 3): noise around a colour for each class; and the labels."""
    labels = np.random.default_rng(seed).integers(0, 3, rows)
    labels[:3] = range(3)
    pixels = image_files.random_pixels(rows, size, size, seed=seed) // 2
    for image, label in zip(pixels, labels):
        image[..., label] += 90
    return pixels, labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "run"
    pixels, labels = pictures(96, 0)
    data = TensorImages(image_files.as_tensor(pixels).contiguous(), torch.from_numpy(labels), CLASSES, name="colours")
    with pytest.MonkeyPatch.context() as patch:
        without_plots(patch)
        Trainer("cnn", data, data, epochs=2, batch_size=8, out=path, progress=False).fit()
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(folder, rows=9, size=11):
    files = []
    for place, image in enumerate(pictures(rows, 5, size)[0]):
        file = Path(folder, ("", "x/", "x/y/")[place % 3], f"{place}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
        files.append(str(file))
    return sorted(files)


def table(text):
    heading, *lines = csv.reader(io.StringIO(text))
    return heading, lines


def check(lines, trained, images):
    """Against the model itself."""
    loaded = batchkern.load_model(trained)
    expected = loaded.model(loaded.preprocessing(images)).softmax(1)
    assert len(lines) == len(expected)
    assert len({line[1] for line in lines}) > 1
    for line, shares in zip(lines, expected.tolist(), strict=True):
        assert line[1] == CLASSES[shares.index(max(shares))]
        assert line[3:] == [f"{share:.6g}" for share in shares]
        assert line[2] == max(line[3:], key=float)


def test_a_folder_and_files(trained):
    files = write("images")
    Path("images", "notes.txt").write_text("no image")
    heading, lines = table(run("predict", trained, "images"))
    assert heading == ["path", *HEADING]
    assert sorted(line[0] for line in lines) == files
    check(lines, trained, [line[0] for line in lines])
    chosen = [files[4], files[0], "images/x"]
    out = run("predict", trained, *chosen, "--out", "deep/p.csv")
    assert out == f"{2 + len([f for f in files if f.startswith('images/x/')])} predictions in deep/p.csv\n"
    heading, again = table(Path("deep/p.csv").read_text())
    assert [line[0] for line in again][:2] == chosen[:2]
    assert all(line in lines for line in again)


def test_tables_without_labels_and_with(trained):
    pixels, labels = pictures(7, 5, 11)
    datasets = image_files.datasets
    cells = {"image": [image_files.encoded(image) for image in pixels]}
    datasets.Dataset.from_dict(cells, features=datasets.Features({"image": datasets.Image()})).to_parquet("a.parquet")
    image_files.write_parquet("b.parquet", pixels, [-1] * 7)
    image_files.write_parquet("c.parquet", pixels, labels.tolist(), names=["some", "other", "names"])
    heading, lines = table(run("predict", trained, "a.parquet"))
    assert heading == ["row", *HEADING]
    assert [line[0] for line in lines] == [*"0123456"]
    check(lines, trained, [Image.fromarray(image) for image in pixels])
    for name in ("b.parquet", "c.parquet"):
        assert table(run("predict", trained, name, "--split", "train"))[1] == lines
    _, patches = table(run("predict", trained, "photo-patches"))
    assert len(patches) == 104  # of its test split
    assert "no split 'test'; it has train" in refused("predict", trained, "a.parquet", "--split", "test")


def test_more_images_than_are_computed_at_a_time(trained):
    pixels, labels = pictures(700, 6)
    image_files.write_parquet("many.parquet", pixels, labels.tolist())
    _, lines = table(run("predict", trained, "many.parquet"))
    assert [line[0] for line in lines] == [*map(str, range(700))]
    right = [line[1] == CLASSES[label] for line, label in zip(lines, labels, strict=True)]
    assert sum(right) > 500
    whole = batchkern.load_model(trained).evaluate(
        TensorImages(image_files.as_tensor(pixels).contiguous(), torch.from_numpy(labels), CLASSES, name="many")
    )
    assert whole["accuracy"] == sum(right) / 700


def test_an_image_that_cannot_be_read_leaves_nothing(trained):
    files = write("images")
    whole = Path(files[5]).read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"no image"):
        Path(files[5]).write_bytes(broken)
        for out in ((), ("--out", "p.csv")):
            assert f"({files[5]}) is not a readable image: " in refused("predict", trained, "images", *out)
            assert not Path("p.csv").exists()
    os.mkfifo("images/pipe.png")
    assert "images/pipe.png' is neither a file nor a folder, but a device or a pipe" in refused(
        "predict", trained, "images"
    )
    assert "'images/pipe.png' is no file or folder" in refused("predict", trained, "images/pipe.png")
    Path("empty").mkdir()
    assert "empty: no image in this folder" in refused("predict", trained, "empty")
    assert "'none.png' is no file or folder" in refused("predict", trained, files[0], "none.png")
    assert "split is 'test', but files" in refused("predict", trained, files[0], "--split", "test")


def test_nothing_is_replaced_unasked(trained):
    write("images")
    words = ("predict", trained, "images", "--out", "p.csv")
    for mine in ("mine", "path,predicted\n", ""):
        Path("p.csv").write_text(mine)
        assert "p.csv already exists; give overwrite (--overwrite)" in refused(*words)
        assert "p.csv is not a file of predictions written by batchkern" in refused(*words, "--overwrite")
        assert Path("p.csv").read_text() == mine
    os.unlink("p.csv")
    run(*words)
    first = Path("p.csv").read_text()
    assert "p.csv already exists" in refused(*words)
    os.unlink("images/0.png")
    run(*words, "--overwrite")
    assert Path("p.csv").read_text() == "".join(
        line for line in first.splitlines(keepends=True) if "images/0.png" not in line
    )


def test_a_name_may_have_any_letters(trained):
    write("images", rows=3)
    os.rename("images/0.png", 'images/a,"b"\n.png')
    run("predict", trained, "images", "--out", "p.csv")
    assert 'images/a,"b"\n.png' in [line[0] for line in table(Path("p.csv").read_text())[1]]
    odd = os.fsdecode(b"\xff.png")
    os.rename("images/x/1.png", odd)
    assert "is not valid UTF-8" not in run("predict", trained, odd, "--out", "q.csv")
    assert table(Path("q.csv").read_text())[1][0][0] == r"\udcff.png"


def test_a_run_that_needs_a_module(trained, tmp_path, monkeypatch):
    without_plots(monkeypatch)
    pixels, labels = pictures(24, 0, 6)
    data = TensorImages(image_files.as_tensor(pixels).contiguous(), torch.from_numpy(labels), CLASSES, name="colours")
    module = Net(channels=3, classes=3)
    Trainer(module, data, data, epochs=1, batch_size=8, out="mine", progress=False).fit()
    write("images")
    assert "the model of mine was a module, Net with" in refused("predict", "mine", "images")
    os.unlink(Path("mine", PREPROCESSING))
    assert "mine has no preprocessing.json" in refused("predict", "mine", "images")


def test_no_words_are_a_usage_error(trained):
    assert commands.run("predict", trained)[0] == 2
