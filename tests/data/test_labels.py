"""Which labels a table gives, and which it is refused for."""

from __future__ import annotations

import datetime
import decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import datasets, encoded, random_pixels, write_parquet

from batchkern.data import load, load_pair
from batchkern.data.labels import UnlabelledError
from batchkern.data.sources import held_out, read_table
from batchkern.errors import UserError

Value = datasets.Value
INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


def classes(names: str) -> Any:
    return datasets.ClassLabel(names=list(names))


IMAGE = datasets.Features({"image": datasets.Image()}).arrow_schema.field("image").type


def table_of(labels: Any, kind: Any) -> pa.Table:
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    images = pa.array([encoded(pixels) for pixels in random_pixels(len(labels))], type=IMAGE)
    return pa.table([images, labels], ["image", "label"]).replace_schema_metadata(features.arrow_schema.metadata)


def labels_of(folder: Path, labels: list[Any], kind: str) -> list[int]:
    table = table_of(pa.array(labels, type=getattr(pa, kind)()), Value(kind))
    pq.write_table(table, folder / "a.parquet")
    data = load(folder / "a.parquet")
    assert data.labels.dtype == torch.int64
    return data.labels.tolist()


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_every_width(tmp_path: Path, kind: str) -> None:
    assert labels_of(tmp_path, [0, 2, 1, 1], kind) == [0, 2, 1, 1]
    with pytest.raises(UserError, match=r"1 of 4 rows have no label in 'label' \(null or -1\), the first is row 2; "):
        labels_of(tmp_path, [0, 1, None, 1], kind)
    with pytest.raises(UnlabelledError, match="4 of 4 rows have no label in 'label'"):
        labels_of(tmp_path, [None] * 4, kind)


@pytest.mark.parametrize(
    ("labels", "kind", "said"),
    [
        ([0, 1, 2**63, 1], "uint64", "row 2 has the label 9223372036854775808 in 'label'; allowed are 0, 1, 2,"),
        ([0, None, 2**64 - 1, 1], "uint64", "row 2 has the label 18446744073709551615 in 'label'; allowed are 0,"),
        ([0, 1, 2**63 - 1, 1], "uint64", r"row 2 has the label 9223372036854775807 in 'label'; .* must be 0\.\.3"),
        ([0, None, 2**62 + 1, 1], "int64", "1 of 4 rows have no label in 'label'"),  # through floats it were 2**62
        ([0, 1, 255, 1], "uint8", r"row 2 has the label 255 in 'label'; .* must be 0\.\.3"),
        ([0, 1, -128, 1], "int8", "row 2 has the label -128 in 'label'; allowed are 0, 1, 2,"),
    ],
)
def test_integers_out_of_range(tmp_path: Path, labels: list[Any], kind: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"a\.parquet: {said}"):
        labels_of(tmp_path, labels, kind)


@pytest.mark.parametrize("value", [pa.int64(), pa.uint8(), pa.int32()])
@pytest.mark.parametrize("index", [pa.int8(), pa.uint8(), pa.int32()])
def test_labels_with_a_dictionary(tmp_path: Path, index: Any, value: Any) -> None:
    labels = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 1], index), pa.array([0, 2, 1], value))
    pq.write_table(table_of(labels, Value(str(value))), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet").labels.tolist() == [0, 2, 1, 2]
    labels = pa.DictionaryArray.from_arrays(pa.array([0, None, 2, 1], index), pa.array([0, 2, 1], value))
    pq.write_table(table_of(labels, Value(str(value))), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="1 of 4 rows have no label in 'label' .*, the first is row 1"):
        load(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    "labels",
    [
        pa.chunked_array([[0, 1], [], [2, 1]], type=pa.int64()),
        pa.chunked_array([[], [0, 1], [], [2, 1], []], type=pa.uint8()),
        pa.chunked_array([pa.array([0, 1]).dictionary_encode(), pa.array([2, 1]).dictionary_encode()]),
    ],
)
def test_labels_in_chunks(labels: Any) -> None:
    dataset = datasets.Dataset(table_of(labels, Value("int64")))
    assert read_table("it", "train", dataset).labels.tolist() == [0, 1, 2, 1]


ID = ("id", Value("int64"), [0, 1, 2, 3])
KIND = ("kind", classes("ab"), [1, 0, 1, 0])


@pytest.mark.parametrize(
    ("label", "labels", "others", "expected"),
    [
        (Value("uint8"), [0, 1] * 2, [ID], [0, 1] * 2),
        (Value("string"), list("abab"), [KIND], [1, 0] * 2),
        (Value("string"), list("abab"), [KIND, ID], [1, 0] * 2),
        # The number of a row is no class of it.
        (Value("string"), list("baba"), [ID], [1, 0] * 2),
        (Value("bool"), [True, False] * 2, [ID], r"label \(bool\), id \(int64\)$"),
        (Value("float32"), [0.0, 1.0] * 2, [], r"label \(float32\)$"),
        (datasets.List(Value("int64")), [[0], [1]] * 2, [], r"label \(List\)$"),
        ({"a": Value("int64")}, [{"a": 1}] * 4, [], r"label \(struct\)$"),
        (Value("bool"), [True, False] * 2, [("x\x1b[2J", Value("string"), [""] * 4)], r"x\\x1b\[2J \(string\)$"),
    ],
)
def test_the_column_that_is_chosen(tmp_path: Path, label: Any, labels: Any, others: Any, expected: Any) -> None:
    extra = {name: (kind, values) for name, kind, values in others}
    path = write_parquet(tmp_path / "a.parquet", random_pixels(4), labels, label_type=label, extra=extra)
    if isinstance(expected, list):
        assert load(path).labels.tolist() == expected
    else:
        with pytest.raises(
            UserError, match=rf"a\.parquet: no label column \(label, labels, .*or integers\).*{expected}"
        ):
            load(path)


# --- labels that are strings ------------------------------------------------------------------------------------------


def words(path: Path, labels: Any, **options: Any) -> str:
    return write_parquet(path, random_pixels(len(labels)), labels, label_type=Value("string"), **options)


def test_strings_are_classes_in_sorted_order_which_is_said_once(tmp_path: Path) -> None:
    path = words(tmp_path / "a.parquet", ["b", "a", "Z", "b", "a", "Z"] * 2)
    said = "the labels in 'label' are strings; sorted, they are the 3 classes Z, a, b"
    with pytest.warns(UserWarning, match=said) as warned:
        train, test = load_pair(path)  # of which a part is held out
    assert len(warned) == 1
    assert train.classes == test.classes == ("Z", "a", "b")
    data = load(path)
    assert [data.classes[i] for i in data.labels] == ["b", "a", "Z", "b", "a", "Z"] * 2


def test_strings_of_a_test_set_are_the_training_sets_classes(tmp_path: Path) -> None:
    train = words(tmp_path / "a.parquet", ["cat", "ant", "bee", "dog"])
    test = words(tmp_path / "b.parquet", ["dog", "bee"])  # not all classes
    assert load_pair(train, test)[1].labels.tolist() == [3, 1]
    named = write_parquet(tmp_path / "c.parquet", random_pixels(3), [0, 1, 2], names=["cow", "dog", "bee"])
    assert load_pair(named, test)[1].labels.tolist() == [1, 2]
    other = words(tmp_path / "d.parquet", ["dog", None, "emu"])
    said = r"d\.parquet: row 2 has the label 'emu' in 'label', which is none of the classes: ant, bee, cat, dog"
    with pytest.raises(UserError, match=said):
        load_pair(train, other)
    numbers = write_parquet(tmp_path / "e.parquet", random_pixels(3), [0, 1, 2])
    with pytest.raises(UserError, match=r"b\.parquet: row 0 has the label 'dog' .* none of the classes: 0, 1, 2"):
        load_pair(numbers, test)


def test_a_string_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 of 4 rows have no label in 'label' .*, the first is row 2"):
        load(words(tmp_path / "a.parquet", ["b", "a", None, "b"]))
    with pytest.raises(UserError, match="all 3 images are of one class, 'a'"):
        load(words(tmp_path / "b.parquet", ["a"] * 3))
    encoded = pa.array(["b", "a", "b"]).dictionary_encode()
    pq.write_table(table_of(encoded, Value("string")), tmp_path / "c.parquet")
    assert load(tmp_path / "c.parquet").labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("kind", [Value("string"), classes("ab")])
def test_clean_labels_that_are_strings(tmp_path: Path, kind: Any) -> None:
    labels = list("ab") * 3 if kind == Value("string") else [0, 1] * 3

    def clean(values: str) -> Any:
        extra = {"clean": (Value("string"), list(values))}
        path = write_parquet(tmp_path / "a.parquet", random_pixels(6), labels, label_type=kind, extra=extra)
        return load_pair(path, path, clean_labels="clean")[0].clean_labels

    assert clean("babbaa").tolist() == [1, 0, 1, 1, 0, 0]
    with pytest.raises(UserError, match="row 5 has the label 'x' in 'clean', which is none of the classes: a, b"):
        clean("babbax")


# --- clean labels -----------------------------------------------------------------------------------------------------


def clean_of(folder: Path, kind: Any, values: list[Any], label: Any = None) -> list[int]:
    """Of a training set whose labels are 0, 1, 0, 1, 0, 1."""
    extra = {"clean": (kind, values)}
    path = write_parquet(folder / "a.parquet", random_pixels(6), [0, 1] * 3, label_type=label, extra=extra)
    train, test = load_pair(path, path, clean_labels="clean")
    assert train.labels.tolist() == [0, 1] * 3
    assert test.clean_labels is None
    assert train.clean_labels is not None
    return train.clean_labels.tolist()


@pytest.mark.parametrize(
    ("kind", "values", "name"),
    [
        (Value("string"), list("010101"), "string"),
        (Value("large_string"), list("ababab"), "large_string"),
        (Value("binary"), [b"a"] * 6, "binary"),
        (Value("bool"), [True, False] * 3, "bool"),
        (Value("float64"), [0.0, 1.0, 0.5, 1, 0, 1], "float64"),
        (Value("float16"), [*np.array([0, 1] * 3, np.float16)], "float16"),
        (Value("float32"), [0.0, float("nan")] * 3, "float32"),
        (Value("decimal128(5, 2)"), [decimal.Decimal(1)] * 6, r"decimal128\(5, 2\)"),
        (Value("null"), [None] * 6, "null"),
        (Value("timestamp[s]"), [datetime.datetime(2020, 1, 1)] * 6, r"timestamp\[ms\]"),
        (Value("date32"), [datetime.date(1970, 1, 1)] * 6, "date32"),
        (Value("time64[us]"), [datetime.time(0)] * 6, r"time64\[us\]"),
        (Value("duration[s]"), [datetime.timedelta(0)] * 6, r"duration\[s\]"),
        (datasets.List(Value("int64")), [[0], [1]] * 3, "List"),
        (datasets.List(classes("ab"), length=1), [[0], [1]] * 3, "List"),
        (datasets.Array2D((1, 2), "int64"), [[[1, 2]]] * 6, "Array2D"),
        ({"a": {"b": Value("int64")}}, [{"a": {"b": 1}}] * 6, "struct"),
        (datasets.Image(), [encoded(pixels) for pixels in random_pixels(6)], "Image"),
    ],
)
def test_clean_labels_of_another_type(tmp_path: Path, kind: Any, values: list[Any], name: str) -> None:
    said = rf"a\.parquet: the column 'clean' of clean labels is of the type {name}; it must be of integers or classes"
    with pytest.raises(UserError, match=said):
        clean_of(tmp_path, kind, values)


@pytest.mark.parametrize(
    ("kind", "values", "label", "expected"),
    [
        (Value("uint8"), [0, 1] * 3, None, [0, 1] * 3),
        (Value("int64"), [1, 0] * 3, classes("ab"), [1, 0] * 3),
        (classes("ab"), [0, 1] * 3, None, [0, 1] * 3),
        (classes("ab"), [0, 1] * 3, classes("ab"), [0, 1] * 3),
        (classes("cab"), [0, 1, 2] * 2, classes("abc"), [2, 0, 1] * 2),  # by name
        (classes("a"), [0] * 6, classes("ab"), "the column 'clean' .* the classes a, but 'label' has a, b; both must"),
        (classes("abc"), [0, 1] * 3, classes("ab"), "the classes a, b, c, but 'label' has a, b; both must have the"),
        (classes("xy"), [0, 1] * 3, classes("ab"), "the classes x, y, but 'label' has a, b; both must have the same"),
        (classes(["a", "\x1b"]), [0, 1] * 3, classes("ab"), r"the classes a, \\x1b, but 'label' has a, b"),
        (Value("int64"), [0, 2] * 3, classes("ab"), r"row 1 has the label 2 in 'clean'; allowed are 0\.\.1"),
        (Value("int64"), [0, 0, 0, 7, 0, 0], None, r"row 3 has the label 7 in 'clean'; allowed are 0\.\.1"),
        (classes("abc"), [0, 0, 2] * 2, None, r"row 2 has the label 2 in 'clean'; allowed are 0\.\.1"),
        (Value("uint8"), [0, None] * 3, None, "3 of 6 rows have no label in 'clean' .*, the first is row 1"),
    ],
)
def test_clean_labels_are_classes_of_the_labels(
    tmp_path: Path, kind: Any, values: list[Any], label: Any, expected: Any
) -> None:
    if isinstance(expected, list):
        assert clean_of(tmp_path, kind, values, label) == expected
    else:
        with pytest.raises(UserError, match=rf"a\.parquet: .*{expected}"):
            clean_of(tmp_path, kind, values, label)


@pytest.mark.parametrize("column", ["", "other", 3, b"label", ["label"]])
def test_columns_of_clean_labels_that_are_none(tmp_path: Path, column: Any) -> None:
    path = write_parquet(tmp_path / "a.parquet", random_pixels(6), [0, 1] * 3)
    with pytest.raises(
        UserError, match=r"a\.parquet: no column .* of clean labels among its columns: image \(Image\),"
    ):
        load_pair(path, clean_labels=column)


def test_rows_of_a_part_are_counted_as_in_the_file(tmp_path: Path) -> None:
    labels = [0, 1] * 20
    last = int(held_out(torch.tensor(labels))[0][-1])  # not the last one of the file, which is held out
    assert last == 38
    wrong = [50 if row == last else label for row, label in enumerate(labels)]
    path = write_parquet(tmp_path / "a.parquet", random_pixels(40), wrong)
    with pytest.raises(UserError, match=f"row {last} has the label 50 in 'label'; without class names"):
        load_pair(path)
    extra = {"clean": (Value("int64"), [7 if row == last else 0 for row in range(40)])}
    path = write_parquet(tmp_path / "b.parquet", random_pixels(40), labels, extra=extra)
    with pytest.raises(UserError, match=rf"row {last} has the label 7 in 'clean'; allowed are 0\.\.1"):
        load_pair(path, clean_labels="clean")


@pytest.mark.parametrize("names", [["0", "1", "10", "2"], ["3", "4"]])
@pytest.mark.parametrize("turned", [False, True])
def test_names_that_are_numbers_in_another_order(tmp_path: Path, names: list[str], turned: bool) -> None:
    """Folders 0 to 11, say, whose classes are in the order 0, 1, 10, 11, 2."""
    count = len(names)
    numbered = write_parquet(tmp_path / "a.parquet", random_pixels(8), [i % count for i in range(8)])
    in_order = ["00", "01", "2", "3"][:count]
    named = write_parquet(tmp_path / "b.parquet", random_pixels(8), [i % count for i in range(8)], names=in_order)
    load_pair(named, numbered)
