"""Loading, streaming and feeding labelled images.

All files are written by the tests: random pixels, stored as PNG, so that what comes back can be compared byte
by byte with what was written.
"""

import io
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
from image_files import as_tensor, encoded, random_pixels, write_folder, write_parquet

from batchkern.data import (
    AUGMENTATIONS,
    Feed,
    StreamedImages,
    TensorImages,
    load,
    load_pair,
    match_shape,
    subset,
    validation_split,
    with_label_noise,
)
from batchkern.data import images as images_module
from batchkern.data.sources import held_out
from batchkern.errors import UserError

datasets = pytest.importorskip("datasets")
PIL_Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")

# The CPU always; a GPU too where there is one, because augmentation must draw the same there.
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


# ---------------------------------------------------------------------------------------------------------
# Sources: what was written comes back.


@pytest.mark.parametrize("memory_limit", [1 << 30, 100], ids=["memory", "streamed"])
@pytest.mark.parametrize("channels", [1, 3])
def test_parquet_returns_the_pixels_and_labels_written(tmp_path, channels, memory_limit):
    pixels = random_pixels(30, 6, 9, channels)
    labels = [i % 3 for i in range(30)]
    path = write_parquet(tmp_path / "a.parquet", pixels, labels, names=["cat", "dog", "emu"])
    data = load(path, memory_limit=memory_limit)
    assert isinstance(data, StreamedImages if memory_limit == 100 else TensorImages)
    assert (data.name, data.classes, data.shape) == (path, ("cat", "dog", "emu"), (channels, 6, 9))
    assert len(data) == 30
    assert data.labels.tolist() == labels
    assert data.labels.dtype == torch.int64
    indices = torch.tensor([29, 3, 3, 0, 17])
    rows = data.rows(indices)
    assert rows.dtype == torch.uint8
    assert torch.equal(rows, as_tensor(pixels)[indices])
    assert data.rows(torch.tensor([], dtype=torch.int64)).shape == (0, channels, 6, 9)


@pytest.mark.parametrize("memory_limit", [1 << 30, 100], ids=["memory", "streamed"])
def test_large_images_are_decoded_in_threads_and_stay_in_order(tmp_path, memory_limit):
    pixels = random_pixels(21, 140, 130)
    path = write_parquet(tmp_path / "a.parquet", pixels, [i % 2 for i in range(21)])
    data = load(path, memory_limit=memory_limit)
    if memory_limit == 100:
        assert data.cells.threaded
    order = torch.arange(21).flip(0)
    assert torch.equal(data.rows(order), as_tensor(pixels)[order])


def test_integer_labels_become_numbered_classes(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", random_pixels(5), [0, 2, 2, 1, 0])
    assert load(path).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("column", "extra"),
    [
        ("labels", {"id": ("int64", 5)}),
        ("fine_label", {"coarse_label": ("class", 5)}),
        ("species", {}),
        ("species", {"note": ("string", "x")}),
    ],
)
def test_label_column_is_found(tmp_path, column, extra):
    kinds = {"class": datasets.ClassLabel(names=list("abcdef")), "int64": datasets.Value("int64")}
    columns = {key: (kinds.get(kind, datasets.Value("string")), [value] * 4) for key, (kind, value) in extra.items()}
    path = write_parquet(tmp_path / "a.parquet", random_pixels(4), [1, 0, 1, 2], column=column, extra=columns)
    assert load(path).labels.tolist() == [1, 0, 1, 2]


def test_one_colour_image_makes_all_rgb(tmp_path, monkeypatch):
    # Two rows are asked for their mode beforehand; the colour image, row 4, is none of them.
    monkeypatch.setattr(images_module, "SAMPLE", 2)
    grey = random_pixels(6, channels=1)
    colour = random_pixels(1, seed=1)[0]
    path = write_parquet(tmp_path / "a.parquet", [*grey[:4], colour, grey[4]], [0, 1] * 3)
    expected = as_tensor(grey).expand(-1, 3, -1, -1)
    data = load(path)
    assert data.shape == (3, 8, 8)
    assert torch.equal(data.images[[0, 1, 2, 3, 5]], expected[:5])
    assert torch.equal(data.images[4], as_tensor(colour[None])[0])
    # Streamed, the sample decides.
    assert load(path, memory_limit=1).shape == (1, 8, 8)
    monkeypatch.setattr(images_module, "SAMPLE", 6)
    streamed = load(path, memory_limit=1)
    assert torch.equal(streamed.rows(torch.arange(6)), data.images)


def test_modes_other_than_l_and_rgb(tmp_path):
    grey = random_pixels(1, channels=1)[0]
    bits = PIL_Image.fromarray(grey).convert("1")
    sixteen = np.random.default_rng(3).integers(0, 65536, (8, 8)).astype(np.uint16)
    buffer = io.BytesIO()
    bits.save(buffer, "PNG")
    cells = [encoded(grey), {"bytes": buffer.getvalue(), "path": None}, encoded(sixteen)]
    data = load(write_parquet(tmp_path / "grey.parquet", cells, [0, 1, 1]))
    assert data.shape == (1, 8, 8)
    assert torch.equal(data.images[1, 0], torch.from_numpy(np.array(bits.convert("L"))))
    assert torch.equal(data.images[2, 0], torch.from_numpy((sixteen >> 8).astype(np.uint8)))

    rgba = random_pixels(2, channels=4)
    data = load(write_parquet(tmp_path / "rgba.parquet", rgba, [0, 1]))
    assert torch.equal(data.images, as_tensor(rgba)[:, :3])


def test_image_size_resizes_with_antialiasing(tmp_path):
    # Of mixed sizes, which is allowed then. Stripes of one pixel must become grey, not alias to black.
    stripes = np.zeros((32, 32), dtype=np.uint8)
    stripes[:, ::2] = 255
    tall = random_pixels(1, 40, 20, 1)[0]
    path = write_parquet(tmp_path / "a.parquet", [stripes, tall], [0, 1])
    for limit in (1 << 30, 1):
        rows = load(path, image_size=8, memory_limit=limit).rows(torch.arange(2))
        assert rows.shape == (2, 1, 8, 8)
        assert (rows[0].float() - 127.5).abs().max() < 16
        expected = np.array(PIL_Image.fromarray(tall).resize((8, 8), PIL_Image.Resampling.BILINEAR))
        assert torch.equal(rows[1, 0], torch.from_numpy(expected))


@pytest.mark.parametrize("names", [["bus", "test", "truck"], ["bus", "train", "truck"]])
def test_folder_with_one_sub_folder_per_class(tmp_path, names):
    # The names are among those that datasets by itself would take for splits, the folder's is a glob pattern,
    # and the metadata file would make it drop the labels.
    pixels = random_pixels(12)
    labels = [0, 1, 2] * 4
    root = write_folder(tmp_path / "x[1]", pixels, labels, names)
    (tmp_path / "x[1]" / "metadata.csv").write_text("file_name,label\nbus/0000.png,7\n")
    data = load(root)
    assert data.classes == tuple(names)
    order = sorted(range(12), key=lambda i: (labels[i], i))
    assert data.labels.tolist() == [labels[i] for i in order]
    assert torch.equal(data.images, as_tensor(pixels)[order])


@pytest.mark.parametrize("test_folder", ["test", "val"])
def test_folder_with_splits(tmp_path, test_folder):
    pixels = random_pixels(8)
    write_folder(tmp_path / "train", pixels[:5], [0, 1, 2, 1, 0], "abc")
    write_folder(tmp_path / test_folder, pixels[5:], [0, 2, 2], "abc")
    train, test = load_pair(str(tmp_path))
    # The test folder lacks class b, yet c keeps its number.
    assert train.classes == test.classes == ("a", "b", "c")
    assert test.labels.tolist() == [0, 2, 2]
    assert torch.equal(test.images, as_tensor(pixels[5:]))
    assert torch.equal(train.images, as_tensor(pixels[[0, 4, 1, 3, 2]]))


def test_folder_is_walked_as_torchvision_does(tmp_path):
    pixels = random_pixels(7)
    places = ["a/0.png", "a/x/1.PNG", "a/x/y/2.png", "b/3.png", "b/test/4.png"]
    for image, place in zip(pixels, places):
        (tmp_path / "images" / place).parent.mkdir(parents=True, exist_ok=True)
        PIL_Image.fromarray(image).save(tmp_path / "images" / place, "PNG")
    write_folder(tmp_path / "elsewhere", pixels[5:], [0, 0], "c")
    (tmp_path / "images" / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (tmp_path / "images" / "a" / "x" / "round").symlink_to(tmp_path / "images" / "a")
    # None of these is an image, nor a class.
    (tmp_path / "images" / "metadata.jsonl").write_text('{"file_name": "a/0.png", "label": 7}')
    (tmp_path / "images" / ".cache").mkdir()
    (tmp_path / "images" / "b" / ".hidden.png").write_bytes(b"")
    (tmp_path / "images" / "b" / "more.zip").write_bytes(b"PK")
    (tmp_path / "images" / "b" / "metadata.csv").write_text("file_name,label\n3.png,7\n")
    data = load(str(tmp_path / "images"))
    assert data.classes == ("a", "b", "c")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert torch.equal(data.images, as_tensor(pixels))


def test_folder_of_a_training_split_alone(tmp_path):
    pixels = random_pixels(20)
    write_folder(tmp_path / "train", pixels, [0, 1] * 10, "ab")
    train, test = load_pair(str(tmp_path))
    assert train.classes == ("a", "b")
    assert len(train.labels) + len(test.labels) == 20


def test_digits_are_lossless_and_split_once_for_all():
    from sklearn.datasets import load_digits

    train, test = load("digits"), load("digits", split="test")
    assert (len(train), len(test), train.shape) == (1438, 359, (1, 8, 8))
    everything = torch.cat([train.images, test.images])[:, 0]
    restored = {bytes((image // 15).flatten().tolist()) for image in everything}
    assert restored == {bytes(image.astype(np.uint8).ravel().tolist()) for image in load_digits().images}
    assert everything.max() == 240
    # A fifth of each class, rounded.
    counts = np.bincount(load_digits().target)
    assert test.labels.bincount().tolist() == [round(0.2 * count) for count in counts]
    pair = load_pair("digits")
    assert torch.equal(pair[1].images, test.images)
    assert torch.equal(pair[0].labels, train.labels)


def test_held_out_counts_labels_and_not_up_to_them():
    small = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    for one, other in zip(held_out(small), held_out(small * 10**15), strict=True):
        assert torch.equal(one, other)


def test_held_out_is_pinned_and_blind_to_seeds():
    labels = torch.arange(40) % 2
    torch.manual_seed(1)
    kept, out = held_out(labels)
    torch.manual_seed(2)
    assert torch.equal(held_out(labels)[1], out)
    # Results of runs hang on this split, so it must not change with a version of this package or of torch.
    assert out.tolist() == [4, 5, 11, 14, 16, 21, 26, 39]
    assert sorted(kept.tolist() + out.tolist()) == list(range(40))
    assert held_out(torch.tensor([0, 1, 1, 2, 2, 2]))[1].numel() == 1


def test_photo_patches_tile_the_photographs():
    from sklearn.datasets import load_sample_images

    train, test = load_pair("photo-patches")
    assert (train.classes, train.shape) == (("china", "flower"), (3, 32, 32))
    assert (len(train), len(test)) == (416, 104)
    flower = torch.from_numpy(load_sample_images().images[1].copy()).permute(2, 0, 1)
    wanted = flower[:, 64:96, 96:128]
    found = [(data.images == wanted).flatten(1).all(1) & (data.labels == 1) for data in (train, test)]
    assert sum(int(hit.sum()) for hit in found) == 1


def test_statistics_of_memory_and_stream(tmp_path, monkeypatch):
    pixels = random_pixels(30, channels=3)
    pixels[..., 1] = 77
    pixels[..., 2] //= 4
    path = write_parquet(tmp_path / "a.parquet", pixels, [i % 2 for i in range(30)])
    monkeypatch.setattr(images_module, "CHUNK", 1000)  # several chunks
    for limit in (1 << 30, 1):
        mean, std = load(path, memory_limit=limit).statistics()
        scaled = pixels.astype(np.float64) / 255
        assert mean.dtype == std.dtype == torch.float32
        np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)), rtol=1e-6)
        expected = scaled.std((0, 1, 2))
        assert expected[1] < 1e-9
        expected[1] = 1 / 255
        np.testing.assert_allclose(std, expected, rtol=1e-6)
    monkeypatch.setattr(images_module, "SAMPLE", 3)
    mean, _ = load(path, memory_limit=1).statistics()
    np.testing.assert_allclose(mean, scaled[[0, 10, 20]].mean((0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize("memory_limit", [1 << 30, 1], ids=["memory", "streamed"])
def test_match_shape(tmp_path, memory_limit):
    pixels = random_pixels(4, 12, 12)
    data = load(write_parquet(tmp_path / "a.parquet", pixels, [0, 1, 0, 1]), memory_limit=memory_limit)
    every = torch.arange(4)
    assert match_shape(data, (3, 12, 12)) is data
    grey = match_shape(data, (1, 12, 12))
    luminance = as_tensor(pixels).double().mul(torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    assert (grey.rows(every)[:, 0].double() - luminance).abs().max() <= 1
    assert grey.shape == (1, 12, 12)
    path = write_parquet(tmp_path / "grey.parquet", random_pixels(4, channels=1), [0, 1, 0, 1])
    grey = load(path, memory_limit=memory_limit)
    assert torch.equal(match_shape(grey, (3, 8, 8)).rows(every), grey.rows(every).expand(-1, 3, -1, -1))
    small = match_shape(data, (3, 8, 5))
    assert torch.equal(small.labels, data.labels)
    for row, image in enumerate(pixels):
        expected = np.array(PIL_Image.fromarray(image).resize((5, 8), PIL_Image.Resampling.BILINEAR))
        error = small.rows(every)[row].int() - torch.from_numpy(expected).permute(2, 0, 1).int()
        assert error.abs().max() <= 1
    with pytest.raises(UserError, match="C = 1 or 3"):
        match_shape(data, (2, 8, 8))


# ---------------------------------------------------------------------------------------------------------
# Pairs


def test_pair_without_test_holds_out_a_fifth_of_each_class(tmp_path):
    pixels = random_pixels(50)
    labels = [i % 2 for i in range(50)]
    path = write_parquet(tmp_path / "a.parquet", pixels, labels)
    for limit in (1 << 30, 1):
        train, test = load_pair(path, memory_limit=limit)
        kept, out = held_out(torch.tensor(labels))
        assert test.labels.bincount().tolist() == [5, 5]
        assert torch.equal(test.rows(torch.arange(10)), as_tensor(pixels)[out])
        assert torch.equal(train.rows(torch.arange(40)), as_tensor(pixels)[kept])


def test_pair_of_two_files(tmp_path):
    a = write_parquet(tmp_path / "a.parquet", random_pixels(6), [0, 1, 2] * 2, names=["x", "y", "z"])
    b = write_parquet(tmp_path / "b.parquet", random_pixels(4, channels=1, seed=1), [1, 1, 0, 0])
    train, test = load_pair(a, b)
    assert test.classes == ("x", "y", "z")
    assert test.labels.tolist() == [1, 1, 0, 0]
    # The test set happens to be grey; the model takes three channels.
    assert test.shape == train.shape == (3, 8, 8)
    # A test set may be of one class, and have fewer images than there are classes.
    c = write_parquet(tmp_path / "c.parquet", random_pixels(2), [2, 2])
    assert load_pair(a, c)[1].labels.tolist() == [2, 2]


def test_pair_refuses_other_classes(tmp_path):
    pixels = random_pixels(4)
    a = write_parquet(tmp_path / "a.parquet", pixels, [0, 1, 0, 1], names=["x", "y"])
    b = write_parquet(tmp_path / "b.parquet", pixels, [0, 1, 0, 1], names=["y", "x"])
    c = write_parquet(tmp_path / "c.parquet", pixels, [0, 1, 0, 1], names=["x", "y", "z"])
    d = write_parquet(tmp_path / "d.parquet", pixels, [0, 1, 5, 1], label_type=datasets.Value("int8"))
    small = write_parquet(tmp_path / "s.parquet", random_pixels(4, 6, 6), [0, 1, 0, 1], names=["x", "y"])
    with pytest.raises(UserError, match=r"b\.parquet: class 0 is 'y', but 'x' .*: x, y$"):
        load_pair(a, b)
    with pytest.raises(UserError, match=r"c\.parquet: class 2 is 'z', but missing"):
        load_pair(a, c)
    with pytest.raises(UserError, match=r"d\.parquet: row 2 has the label 5 in 'label'; .*allows 0\.\.1$"):
        load_pair(a, d)
    with pytest.raises(UserError, match=r"s\.parquet: test images are 6x6, training images 8x8; .*image_size"):
        load_pair(a, small)
    assert load_pair(a, small, image_size=6)[0].shape == (3, 6, 6)


def hub(monkeypatch, answer):
    """Stands for the hub: the rest of load_dataset is datasets' own business."""
    monkeypatch.setattr("batchkern.data.sources._silence_of_hub", lambda name: "")
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def hub_split(pixels, labels, names="ab"):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"img": [encoded(p) for p in pixels], "label": labels}, features=features)


def test_hub_names(monkeypatch):
    pixels = random_pixels(8)
    labels = [0, 1] * 4
    answer = {"train": hub_split(pixels, labels), "validation": hub_split(pixels[:3], [1, 0, 0])}
    asked = hub(monkeypatch, answer)
    train, test = load_pair("somebody/things:small")
    assert asked == [("somebody/things", "small")]
    assert torch.equal(train.images, as_tensor(pixels))
    assert test.labels.tolist() == [1, 0, 0]
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        load("things", split="test")
    # A test split whose labels are secret gives way to the validation split; a partly labelled one does not.
    answer["test"] = hub_split(pixels[:3], [-1, -1, -1])
    assert load_pair("things")[1].labels.tolist() == [1, 0, 0]
    answer["test"] = hub_split(pixels[:3], [-1, 0, 1])
    with pytest.raises(UserError, match="1 of 3 rows have no label"):
        load_pair("things")
    answer["test"] = hub_split([], [])
    with pytest.raises(UserError, match="the split 'test' has no rows"):
        load_pair("things")


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach the hub"), datasets.exceptions.DatasetNotFoundError("no such")]
)
def test_hub_failures_are_user_errors(monkeypatch, error):
    hub(monkeypatch, error)
    with pytest.raises(UserError, match=rf"'some/name' is no local file or folder, and .*hub: .*{error}"):
        load("some/name")


# ---------------------------------------------------------------------------------------------------------
# What is refused at loading


def test_missing_and_broken_files(tmp_path, capfd):
    good = write_parquet(tmp_path / "good.parquet", random_pixels(40), [0, 1] * 20)
    with open(good, "rb") as file:
        content = bytearray(file.read())
    (tmp_path / "text.parquet").write_text("not this")
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)  # its footer is whole
    (tmp_path / "holes.parquet").write_bytes(content)
    for missing in ("nothing.parquet", "no/such/folder", "./folder", "/folder"):
        with pytest.raises(UserError, match="is no file or folder"):
            load(missing)
    capfd.readouterr()
    for name in ("text", "cut", "holes"):
        with pytest.raises(UserError, match=rf"{name}\.parquet: not a readable parquet file: "):
            load(str(tmp_path / f"{name}.parquet"))
    assert capfd.readouterr() == ("", ""), "the sentence of the error is all that is said"


def test_loading_is_silent_and_leaves_settings_alone(tmp_path, capfd):
    path = write_parquet(tmp_path / "a.parquet", random_pixels(4), [0, 1, 0, 1])
    capfd.readouterr()
    load(path)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_missing_columns_are_listed(tmp_path):
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(path)
    with pytest.raises(UserError, match=r"a\.parquet: no image column .*: text \(string\), label \(int64\)$"):
        load(path)
    extra = {"width": (datasets.Value("int32"), [8, 8])}
    path = write_parquet(tmp_path / "b.parquet", random_pixels(2), [0, 1], column="height", extra=extra)
    with pytest.raises(UserError, match=r"no label column .*: image \(Image\), height \(int64\), width \(int32\)$"):
        load(path)
    flag = datasets.Value("bool")
    path = write_parquet(tmp_path / "c.parquet", random_pixels(2), [True, False], label_type=flag)
    with pytest.raises(UserError, match=r"no label column .*label \(bool\)$"):
        load(path)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([], None, "the file has no rows"),
        ([0, 1, None, 0], None, r"1 of 4 rows have no label in 'label' \(null or -1\), the first is row 2"),
        ([0, -1, -1, 0], ["a", "b"], "2 of 4 rows have no label .*, the first is row 1"),
        ([0, 1, -2, 0], None, "row 2 has the label -2 in 'label'; allowed are 0, 1, 2,"),
        ([0, 1, 5000, 0], None, r"row 2 has the label 5000 in 'label'; .* must be 0\.\.3"),
        ([1, 1, 1, 1], ["a", "b"], "all 4 images are of one class, 'b'; at least two are needed"),
    ],
)
def test_unusable_labels(tmp_path, labels, names, message):
    path = write_parquet(tmp_path / "a.parquet", random_pixels(len(labels)), labels, names=names)
    with pytest.raises(UserError, match=rf"a\.parquet: {message}"):
        load(path)


def test_label_above_the_class_names(tmp_path):
    # Only another writer than datasets can make such a file.
    import pyarrow.parquet as pq

    path = write_parquet(tmp_path / "a.parquet", random_pixels(3), [0, 1, 0], names=["a", "b"])
    table = pq.read_table(path)
    index = table.schema.get_field_index("label")
    pq.write_table(table.set_column(index, table.schema.field(index), [[0, 1, 7]]), path)
    with pytest.raises(UserError, match=r"a\.parquet.*7.*") as caught:
        load(path)
    assert "0..1" in str(caught.value)


def test_unreadable_images_name_row_and_file(tmp_path):
    pixels = random_pixels(4, 64, 64)
    half = encoded(pixels[2])
    half = {"bytes": half["bytes"][: len(half["bytes"]) // 2], "path": "half.png"}
    for name, cell in (("junk", {"bytes": b"junk", "path": None}), ("half", half), ("none", None)):
        path = write_parquet(tmp_path / f"{name}.parquet", [pixels[0], pixels[1], cell, pixels[3]], [0, 1, 0, 1])
        with pytest.raises(UserError, match=rf"{name}\.parquet: row 2 .*is not a readable image") as caught:
            load(path)
        assert ("half.png" in str(caught.value)) == (name == "half")
        streamed = load(path, memory_limit=1)
        assert torch.equal(streamed.rows(torch.tensor([3])), as_tensor(pixels[3:]))
        with pytest.raises(UserError, match="row 2 "):
            streamed.rows(torch.tensor([3, 2]))
    root = write_folder(tmp_path / "folder", pixels, [0, 0, 1, 1], "ab")
    (tmp_path / "folder" / "b" / "0002.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"folder: row 2 \(.*b/0002\.png\) is not a readable image"):
        load(root)


def test_held_out_rows_are_counted_as_in_the_file(tmp_path):
    labels = [i % 2 for i in range(40)]
    bad = int(held_out(torch.tensor(labels))[1][3])
    cells = [encoded(image) for image in random_pixels(40)]
    cells[bad] = {"bytes": b"junk", "path": None}
    path = write_parquet(tmp_path / "a.parquet", cells, labels)
    with pytest.raises(UserError, match=f"row {bad} is not a readable image"):
        load_pair(path)


def test_mixed_sizes_need_image_size(tmp_path):
    images = [*random_pixels(3), random_pixels(1, 10, 12)[0]]
    path = write_parquet(tmp_path / "a.parquet", images, [0, 1, 0, 1])
    with pytest.raises(UserError, match=r"mixed sizes: row 3 is 10x12, but row 0 is 8x8; .*--image-size"):
        load(path)
    streamed = load(path, memory_limit=1)
    with pytest.raises(UserError, match="row 3 is 10x12"):
        streamed.rows(torch.tensor([0, 3]))
    assert load(path, image_size=9).shape == (3, 9, 9)


def test_unusable_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    PIL_Image.fromarray(random_pixels(1)[0]).save(tmp_path / "flat" / "a.png")
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "a.txt").write_text("x")
    for name in ("empty", "flat", "texts"):
        with pytest.raises(UserError, match=f"{name}: no images in one sub-folder per class"):
            load(str(tmp_path / name))
    write_folder(tmp_path / "half" / "train", random_pixels(2), [0, 1], "ab")
    (tmp_path / "half" / "test").mkdir()
    with pytest.raises(UserError, match=r"half/test: no images in one sub-folder per class"):
        load_pair(str(tmp_path / "half"))
    write_folder(tmp_path / "half" / "test", random_pixels(3), [0, 1, 2], ["b", "cats", "dogs"])
    with pytest.raises(UserError, match=r"half/test: its sub-folder 'cats' is no class of .*half/train: a, b$"):
        load_pair(str(tmp_path / "half"))
    (tmp_path / "half" / "train" / "none").mkdir()
    with pytest.raises(UserError, match=r"half/train: the sub-folder 'none' has no image"):
        load_pair(str(tmp_path / "half"))
    for name in ("train", "val", "validation"):
        write_folder(tmp_path / "three" / name, random_pixels(2), [0, 1], "ab")
    with pytest.raises(UserError, match="three: of its sub-folders .* two are names of the same split"):
        load(str(tmp_path / "three"))


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "folder", random_pixels(4), [0, 0, 1, 1], "ab")
    scandir = os.scandir

    def refusing(path):  # to root nothing is forbidden
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="folder: the folder '.*folder/b' cannot be read: Permission denied"):
        load(root)


@pytest.mark.parametrize("where", ["image.png", "pipe", "https://example.org/image.png"])
def test_a_parquet_file_opens_no_other(tmp_path, where):
    os.mkfifo(tmp_path / "pipe")
    PIL_Image.fromarray(random_pixels(1)[0]).save(tmp_path / "image.png")
    path = where if ":" in where else str(tmp_path / where)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    cells = [*map(encoded, random_pixels(2)), {"bytes": None, "path": path}, None]
    dataset = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 0, 1]}, features=features)
    metadata = features.arrow_schema.metadata
    # Its own to_parquet would read the file.
    pyarrow.parquet.write_table(dataset.data.table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"row 2 has no bytes in its column 'image', but the path '.*{where}'"):
        load(str(tmp_path / "a.parquet"))


def test_another_file_of_the_same_name_and_time_is_not_the_old_one(tmp_path):
    pixels = random_pixels(6)
    for rows in (pixels[:3], pixels[3:]):
        path = write_parquet(tmp_path / "a.parquet", rows, [0, 1, 0])
        os.utime(path, (1e9, 1e9))
        assert torch.equal(load(path).images, as_tensor(rows))


@pytest.mark.parametrize("name", ["imagefolder", "json", "csv", "webdataset", "folder:default"])
def test_names_that_would_read_the_current_folder(tmp_path, monkeypatch, name):
    write_folder(tmp_path / "folder", random_pixels(4), [0, 0, 1, 1], "ab")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is a file reader of|'folder' is a local file or folder, which has no"):
        load(name)


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="image_size must be 4 to 16384 pixels, not 3"):
        load("digits", image_size=3)
    with pytest.raises(UserError, match="image_size must be 4 to 16384"):
        load_pair("digits", image_size=0)
    with pytest.raises(UserError, match="digits: no split 'valid'; it has train, test"):
        load("digits", split="valid")
    pair = write_parquet(tmp_path / "a.parquet", random_pixels(2), [0, 1])
    with pytest.raises(UserError, match="no class has three images"):
        load_pair(pair)
    images, labels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0])
    for bad in (images.float(), images[0], images.expand(-1, 2, -1, -1)):
        with pytest.raises(UserError, match="images must be uint8"):
            TensorImages(bad, labels, "ab", name="x")
    for bad in (labels.int(), labels[:2]):
        with pytest.raises(UserError, match="labels must be int64"):
            TensorImages(images, bad, "ab", name="x")
    with pytest.raises(UserError, match=r"labels\[1\] is 2; it must be in 0\.\.1"):
        TensorImages(images, labels * 2, "ab", name="x")


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"'sklearn'.*pip install 'batchkern\[train\]'"):
        load("digits")


def test_home_that_cannot_be_written(tmp_path):
    """In a process of its own: datasets takes its cache folder from HOME when it is imported."""
    path = write_parquet(tmp_path / "a.parquet", random_pixels(4), [0, 1, 0, 1])
    root = write_folder(tmp_path / "folder", random_pixels(4), [0, 1, 0, 1], "ab")
    (tmp_path / "file").write_text("a file is no folder, not even for root")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    code = (
        "import sys; import batchkern.data as d\n"
        "assert not {'datasets', 'sklearn', 'PIL', 'timm'} & set(sys.modules), 'imported too early'\n"
        f"assert len(d.load({path!r})) == len(d.load({root!r})) == 4"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**kept, "HOME": str(tmp_path / "file" / "home"), "TMPDIR": str(scratch)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(scratch.glob("batchkern-*")), "the folder in place of the cache is removed"


# --- data sets made from others --------------------------------------------------------------------------------------


def labelled(counts, seed=0):
    """As many images of each class, shuffled; each has its number in its pixels."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    return TensorImages(pixels.contiguous(), labels, [str(c) for c in range(len(counts))], name="labelled")


@pytest.mark.parametrize("rows", [3, 4, 20, 50, 111])
def test_a_subset_keeps_the_share_of_each_class(rows):
    data = labelled([100, 10, 1])
    part = subset(data, rows)
    assert len(part) == rows
    counts = part.labels.bincount(minlength=3).tolist()
    assert min(counts) >= 1
    assert abs(counts[0] - rows * 100 / 111) <= 2
    assert abs(counts[1] - rows * 10 / 111) <= 1
    numbers = part.images[:, 0, 0, 0].long()
    assert (numbers.diff() > 0).all()  # as they stood, none twice
    assert torch.equal(data.labels[numbers], part.labels)
    torch.manual_seed(99)
    assert torch.equal(subset(data, rows).images, part.images)


def test_subsets_are_nested():
    data = labelled([30, 30])
    small, large = (set(subset(data, rows).images[:, 0, 0, 0].tolist()) for rows in (10, 30))
    assert small < large
    assert small != set(range(10))


def test_a_validation_set_is_held_out_of_the_training_set():
    data = labelled([40, 20, 4])
    rest, held = validation_split(data, 0.25)
    found = [part.images[:, 0, 0, 0].tolist() for part in (rest, held)]
    assert sorted(found[0] + found[1]) == sorted(data.images[:, 0, 0, 0].tolist())
    assert held.labels.bincount().tolist() == [10, 5, 1]
    assert (rest.name, held.name) == (data.name, f"{data.name} (validation)")
    again = validation_split(data, 0.25)[1]
    assert torch.equal(held.images, again.images)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 0.03, 0.97, True, "0.5", float("nan")])
def test_a_validation_set_that_is_none(fraction):
    with pytest.raises(
        UserError, match=r"validation (must be in \(0, 1\), got|is 0\.\d+, \d+ of its 64 rows; at least 3)"
    ):
        validation_split(labelled([40, 20, 4]), fraction)


@pytest.mark.parametrize("rows", [1, 61, 0, -3, 2.5, True])
def test_a_subset_that_is_none(rows):
    with pytest.raises(UserError, match=r"labelled: a part of it must have 2 \(its classes\) to 60 rows, got"):
        subset(labelled([30, 30]), rows)


def test_a_subset_of_streamed_images(tmp_path):
    pixels, labels = random_pixels(12), [0, 1] * 6
    path = write_parquet(tmp_path / "it.parquet", list(pixels), labels)
    whole, streamed = load(str(path)), load(str(path), memory_limit=0)
    assert torch.equal(subset(streamed, 6).rows(torch.arange(6)), subset(whole, 6).images)
    assert torch.equal(subset(streamed, 6).labels, subset(whole, 6).labels)


def test_label_noise_is_of_the_size_asked_for_and_no_label_of_its_own():
    data = labelled([400, 300, 300])
    noisy = with_label_noise(data, 0.3, seed=5)
    wrong = noisy.labels != data.labels
    assert int(wrong.sum()) == 300
    assert torch.equal(noisy.clean_labels, data.labels)
    assert noisy.images is data.images
    assert data.clean_labels is None
    # Every other class alike: of a binomial half of some 120, five deviations are 27.
    for own in range(3):
        others = noisy.labels[wrong & (data.labels == own)].bincount(minlength=3)
        assert int(others[own]) == 0
        first, second = (int(others[c]) for c in range(3) if c != own)
        assert abs(first - second) <= 2 * 27
    assert torch.equal(with_label_noise(data, 0.3, seed=5).labels, noisy.labels)
    assert not torch.equal(with_label_noise(data, 0.3, seed=6).labels, noisy.labels)
    assert torch.equal(subset(noisy, 100).clean_labels != subset(noisy, 100).labels, wrong[chosen_rows(noisy, 100)])


def chosen_rows(data, rows):
    return subset(data.relabelled(data.labels, clean=torch.arange(len(data))), rows).clean_labels


@pytest.mark.parametrize("fraction", [-0.1, 1.0, "0.1"])
def test_label_noise_that_is_none(fraction):
    with pytest.raises(UserError, match=r"noise must be in \[0, 1\), got"):
        with_label_noise(labelled([5, 5]), fraction, seed=0)


def test_known_noisy_labels(tmp_path):
    pixels, labels, clean = random_pixels(10), [0, 1] * 5, [0, 1] * 3 + [1, 0] * 2
    extra = {"right": (datasets.Value("int64"), clean)}
    path = str(write_parquet(tmp_path / "it.parquet", list(pixels), labels, extra=extra))
    train, test = load_pair(path, path, clean_labels="right")
    assert (train.labels.tolist(), train.clean_labels.tolist(), test.clean_labels) == (labels, clean, None)
    held, _ = load_pair(path, clean_labels="right")
    assert held.clean_labels.tolist() == [clean[i] for i in match_rows(held, train)]
    with pytest.raises(UserError, match="no column 'wrong' of clean labels among its columns: .*right"):
        load_pair(path, clean_labels="wrong")
    with pytest.raises(UserError, match="digits: it has no columns"):
        load_pair("digits", clean_labels="right")
    with pytest.raises(UserError, match="already has clean labels beside noisy ones"):
        with_label_noise(train, 0.1, seed=0)


def match_rows(part, whole):
    return [next(i for i in range(len(whole)) if torch.equal(whole.images[i], image)) for image in part.images]


# ---------------------------------------------------------------------------------------------------------
# Feed


def feed_of(pixels, augment="none", *, device="cpu", seed=0, mean=(0.3, 0.5, 0.2), std=(0.2, 0.1, 0.3)):
    images = as_tensor(pixels).contiguous()
    channels = images.shape[1]
    data = TensorImages(images, torch.arange(len(images)) % 2, "ab", name="random")
    statistics = {"mean": torch.tensor(mean[:channels]), "std": torch.tensor(std[:channels])}
    return Feed(data, **statistics, device=device, augment=augment, seed=seed)


def pixels_of(images):
    """Undoes the normalisation of `feed_of`: float32 (b, C, H, W) -> integers, exactly."""
    mean = torch.tensor([0.3, 0.5, 0.2]).view(-1, 1, 1)
    std = torch.tensor([0.2, 0.1, 0.3]).view(-1, 1, 1)
    values = (images.cpu() * std + mean) * 255
    assert (values - values.round()).abs().max() < 1e-2
    return values.round().to(torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("streamed", [False, True])
def test_batch_is_normalised(tmp_path, device, streamed):
    pixels = random_pixels(10)
    path = write_parquet(tmp_path / "a.parquet", pixels, [0, 1] * 5)
    data = load(path, memory_limit=1 if streamed else 1 << 30)
    mean, std = data.statistics()
    indices = torch.tensor([7, 7, 2])
    images, labels = Feed(data, mean=mean, std=std, device=device).batch(indices.to(device), None)
    expected = (as_tensor(pixels)[indices].double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert (images.dtype, images.device.type, labels.device.type) == (torch.float32, device, device)
    torch.testing.assert_close(images.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    assert labels.tolist() == [1, 1, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 40), (5, 8)])
@pytest.mark.parametrize("augment", [kind for kind in AUGMENTATIONS if "resized" not in kind])
def test_augmented_rows_are_windows_of_the_padded_image(augment, height, width, device):
    count = 96
    pixels = random_pixels(count, height, width)
    source = as_tensor(pixels)
    out = pixels_of(feed_of(pixels, augment, device=device).batch(torch.arange(count), step=3)[0])
    pad_y, pad_x = (max(1, height // 8), max(1, width // 8)) if "crop" in augment else (0, 0)
    padded = torch.nn.functional.pad(source, (pad_x, pad_x, pad_y, pad_y))
    draws = []
    for row in range(count):
        matches = [
            (y, x, flipped)
            for y in range(2 * pad_y + 1)
            for x in range(2 * pad_x + 1)
            for window in [padded[row, :, y : y + height, x : x + width]]
            for flipped in (False, True)
            if torch.equal(out[row], window.flip(2) if flipped else window)
        ]
        assert len(matches) == 1, f"row {row} is no window of its image"
        draws += matches
    ys, xs, flips = (set(values) for values in zip(*draws))
    # Every offset can occur, none but these; among 96 draws of at most 11 each one does with near certainty.
    assert ys == set(range(2 * pad_y + 1))
    assert xs == set(range(2 * pad_x + 1))
    assert flips == ({False, True} if "flip" in augment else {False})
    if "flip" in augment:
        assert 25 < sum(flipped for _, _, flipped in draws) < 71


@pytest.mark.parametrize("device", DEVICES)
def test_augmentation_is_a_function_of_seed_and_step(device):
    pixels = random_pixels(64, 16, 16)
    indices = torch.arange(64)

    def draw(seed, step):
        torch.rand(3)  # the global generator has no part in it
        return feed_of(pixels, "crop+flip", seed=seed, device=device).batch(indices, step)[0].cpu()

    first = draw(0, 10)
    assert torch.equal(first, draw(0, 10))
    assert not torch.equal(first, draw(0, 11))
    assert not torch.equal(first, draw(1, 10))
    assert not torch.equal(draw(1, 0), draw(0, 1))
    if device == "cuda":
        cpu = feed_of(pixels, "crop+flip").batch(indices, 10)[0]
        assert torch.equal(pixels_of(first), pixels_of(cpu))
    # Without a step, as in evaluation, nothing is drawn.
    plain = feed_of(pixels, "crop+flip", device=device).batch(indices, None)[0]
    assert torch.equal(pixels_of(plain), as_tensor(pixels))


def test_streamed_and_memory_batches_are_equal(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", random_pixels(20), [0, 1] * 10)
    batches = []
    for limit in (1, 1 << 30):
        data = load(path, memory_limit=limit)
        mean, std = data.statistics()
        feed = Feed(data, mean=mean, std=std, device="cpu", augment="crop+flip", seed=5)
        batches.append(feed.batch(torch.tensor([3, 19, 3, 0]), 7))
    assert torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(batches[0][1], batches[1][1])


def test_feed_refuses_bad_arguments():
    pixels = random_pixels(2)
    with pytest.raises(
        UserError, match=r"augment must be one of none, .*crop\+flip, resized-crop, resized-crop\+flip, not 'mixup'"
    ):
        feed_of(pixels, "mixup")
    with pytest.raises(UserError, match=r"std must be of shape \(3,\), one per channel, not \(1,\)"):
        feed_of(pixels, std=(0.1,))
