"""``batchkern evaluate``: the figures of the last epoch again, of any labelled images, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import commands
import image_files
import pytest
import torch
from training import single_thread, without_plots

pytest.importorskip("typer")
pytest.importorskip("msgspec")

from batchkern import load_model
from batchkern.data import load_pair, validation_split
from batchkern.rundir import METRICS, WEIGHTS

one_thread = single_thread()
TRAIN = ("--epochs", 1, "--batch-size", 16, "--no-progress", "--lr", 0.05)
NAMES = [*"abcdef"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_plots(monkeypatch)


def write(name, rows, seed, names=NAMES, size=8):
    """A parquet file of noise around a colour for each class."""
    labels = torch.randint(len(names), (rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    labels[: len(names)] = range(len(names))
    pixels = image_files.random_pixels(rows, size, size, seed=seed) // 3
    for image, label in zip(pixels, labels):
        image[..., label % 3] += 40 + 60 * (label // 3)
    return image_files.write_parquet(Path(name), pixels, labels, names=names)


def run(*words):
    status, out, err = commands.run(*words)
    assert (status, err) == (0, "")
    return out


def refused(*words):
    status, out, err = commands.run(*words)
    assert status == 2
    assert out == ""
    assert err.startswith("batchkern: error: ")
    assert err.count("\n") == 1
    return err


def last_row(directory="run"):
    return json.loads(Path(directory, METRICS).read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six classes of 8x8 images, of which a training without test data holds out a fifth."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        without_plots(patch)
        write("train.parquet", 120, 1)
        run("train", "--data", "train.parquet", "--out", "run", *TRAIN)
    return folder


@pytest.fixture
def files(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_of_the_runs_own_test_data_it_gives_the_last_epoch(files):
    out = run("evaluate", "run", "--data", "train.parquet", "--split", "held-out", "--out", "deep/figures.json")
    row, found = last_row(), json.loads(Path("deep/figures.json").read_text())
    assert found["accuracy"] == row["test_accuracy_plain"]
    assert found["loss"] == row["test_loss"]
    assert found["top5_accuracy"] == row["test_top5_accuracy"]
    assert 0.2 < found["accuracy"] < 1
    assert (found["kind"], found["run"], found["data"]) == ("batchkern evaluation", "run", "train.parquet")
    first, second, _, _, _, *classes = out.splitlines()
    assert first == f"{found['rows']} images of train.parquet"
    assert second.startswith(f"accuracy {row['test_accuracy_plain']:.2%}  top-5 accuracy ")
    for line, entry in zip(classes, found["per_class"], strict=True):
        assert line.split() == [entry["class"], str(entry["rows"]), f"{entry['accuracy']:.2%}"]
    assert [entry["class"] for entry in found["per_class"]] == NAMES
    assert sum(entry["rows"] * entry["accuracy"] for entry in found["per_class"]) / found["rows"] == pytest.approx(
        found["accuracy"], rel=1e-12
    )


@pytest.mark.parametrize("data", ["digits", "photo-patches"])
def test_of_built_in_data(data):
    run("train", "--data", data, "--image-size", 10, "--center-crop", "--augment", "flip", *TRAIN, "--out", "run")
    run("evaluate", "run", "--data", data, "--out", "figures.json")
    found, row = json.loads(Path("figures.json").read_text()), last_row()
    assert (found["accuracy"], found["loss"]) == (row["test_accuracy_plain"], row["test_loss"])


def test_what_validation_held_out_is_tested_in_python(files):
    """As docs/trained-models.md says."""
    run("train", "--data", "train.parquet", "--validation", 0.25, *TRAIN, "--out", "validated")
    train, _ = load_pair("train.parquet")
    found, row = load_model("validated").evaluate(validation_split(train, 0.25)[1]), last_row("validated")
    assert (found["accuracy"], found["loss"]) == (row["test_accuracy_plain"], row["test_loss"])


def test_images_of_another_size_are_resized_as_in_training():
    """The test set of a training with --image-size has images of other sizes than the model takes."""
    for name, seed, size in (("train", 1, 20), ("test", 2, 15)):
        write(f"{name}.parquet", 90, seed, size=size)
    found = {}
    for crop in ((), ("--center-crop",)):
        run(
            "train",
            "--data",
            "train.parquet",
            "--test",
            "test.parquet",
            "--image-size",
            12,
            *crop,
            *TRAIN,
            "--out",
            "run",
        )
        run("evaluate", "run", "--data", "test.parquet", "--out", "figures.json")
        found[crop] = json.loads(Path("figures.json").read_text())
        assert found[crop]["rows"] == 90
        assert found[crop]["loss"] == last_row()["test_loss"]
        shutil.rmtree("run")
        os.unlink("figures.json")
    assert found[()]["loss"] != found[("--center-crop",)]["loss"]


def test_what_is_refused(files):
    said = refused("evaluate", "run", "--data", "train.parquet")
    assert (
        "train.parquet: the model was trained on it, and it has no split 'test' or 'validation'; say by split" in said
    )
    assert "120 images" in run("evaluate", "run", "--data", "train.parquet", "--split", "train")
    write("other.parquet", 40, 3, names=[*"abcdfe"])
    said = refused("evaluate", "run", "--data", "other.parquet")
    assert "other.parquet: class 4 is 'f', but 'e' in the training set train.parquet" in said
    write("fewer.parquet", 40, 3, names=[*"abcde"])
    assert "class 5 is missing, but 'f'" in refused("evaluate", "run", "--data", "fewer.parquet")
    assert "class 0 is '0', but 'a' in" in refused("evaluate", "run", "--data", "digits")
    assert "nothing of it is held out, since it has a split 'test'" in refused(
        "evaluate", "run", "--data", "digits", "--split", "held-out"
    )
    assert "no split 'dev'; it has train" in refused("evaluate", "run", "--data", "train.parquet", "--split", "dev")
    assert "nowhere is no directory of a run" in refused("evaluate", "nowhere", "--data", "digits")
    os.unlink(Path("run", WEIGHTS))
    assert "has not ended" in refused("evaluate", "run", "--data", "digits")


def test_nothing_is_replaced_but_what_it_wrote(files):
    words = ("evaluate", "run", "--data", "train.parquet", "--split", "train", "--out")
    Path("mine.json").write_text('{"kind": "mine"}')
    assert "mine.json already exists; give overwrite (--overwrite)" in refused(*words, "mine.json")
    for name in ("mine.json", "run/metrics.jsonl", "run"):
        assert f"{name} is not an evaluation written by batchkern" in refused(*words, name, "--overwrite")
    assert Path("mine.json").read_text() == '{"kind": "mine"}'
    assert "mine.json is not a directory" in refused(*words, "mine.json/x.json")
    run(*words, "figures.json")
    before = Path("figures.json").read_text()
    assert "figures.json already exists; give overwrite (--overwrite)" in refused(*words, "figures.json")
    Path("figures.json").write_text(before.replace(": 120", ": 7"))
    run(*words, "figures.json", "--overwrite")
    assert Path("figures.json").read_text() == before
