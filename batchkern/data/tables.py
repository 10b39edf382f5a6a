"""Tables: files of comma- or tab-separated values, or parquet, with a column of labels and the others as features.

A column of numbers or truth values is one feature; a column of texts is one feature for each text that occurs in
training. All features are standardised by the training set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from batchkern.data.labelled import Labelled
from batchkern.data.loading import load_pair
from batchkern.data.sources import held_out
from batchkern.data.tensors import TensorData
from batchkern.data.wording import printable, shortened
from batchkern.errors import UserError, require

_MOST = 1e150  # squares of larger numbers could overflow
MOST_TEXTS = 100
"""The largest number of different texts in a column of features."""


@dataclass(frozen=True)
class Column:
    """How a column becomes features: a number is one feature, ``"texts"`` are one-hot encoded over ``values``.

    Args:
        name: name of the column in the file.
        kind: ``"number"`` or ``"texts"``.
        values: for ``"texts"``, the values that the column may have, in the order of their features.

    Examples:
        >>> from batchkern.data import Column
        >>> Column("size", "number").width, Column("kind", "texts", ("cat", "dog", "fox")).width
        (1, 3)
    """

    name: str
    kind: Literal["number", "texts"]
    values: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return len(self.values) if self.kind == "texts" else 1


class TableData(TensorData):
    """Rows of a table, with the features of its columns in their order.

    Args:
        inputs: ``(N, features)`` float32, on the CPU.
        labels: ``(N,)`` int64, each in 0..len(classes)-1.
        classes: the name of each class.
        name: the source, for messages.
        standardize: give each feature mean 0 and deviation 1 in the training set.

    Attributes:
        columns: the encoding of each column.
        label: the name of the column of labels.
        other: columns of the file that are not features.

    Examples:
        >>> from pathlib import Path
        >>> from batchkern.data import load_table_pair
        >>> for name in ("train.csv", "test.csv"):
        ...     _ = Path(name).write_text("size,kind,label\\n1,cat,yes\\n3,dog,no\\n2,dog,no\\n")
        >>> train, test = load_table_pair("train.csv", "test.csv", label="label")
        >>> train.inputs.tolist(), train.labels.tolist(), train.classes  # size, cat, dog
        ([[1.0, 1.0, 0.0], [3.0, 0.0, 1.0], [2.0, 0.0, 1.0]], [1, 0, 0], ('no', 'yes'))
    """

    columns: tuple[Column, ...]
    label: str
    other: tuple[str, ...] = ()

    def _selected(self, positions: Tensor) -> TableData:
        part = TableData(
            self.inputs[positions], self.labels[positions], self.classes, name=self.name, standardize=self.standardize
        )
        part.columns, part.label, part.other = self.columns, self.label, self.other
        return part


def load_table_pair(
    train: str | os.PathLike[str],
    test: str | os.PathLike[str] | None = None,
    *,
    label: str,
    clean_labels: str | None = None,
) -> tuple[TableData, TableData]:
    """A training set and a test set with the same columns and classes.

    Args:
        train: a file that ends in .csv, .tsv or .parquet.
        test: another such file; None: a fixed fifth of each class is held out, the same in every run.
        label: the column of labels: texts, truth values or whole numbers. Sorted, they are the classes.
        clean_labels: a column of ``train`` with the correct labels; it is not a feature.

    Raises:
        UserError: a file cannot be read as a table, lacks a column, has a column that cannot be a feature, a missing
            value, or a label that is not a training class.

    Examples:
        >>> from pathlib import Path
        >>> from batchkern.data import load_table_pair
        >>> rows = [f"{size},{kind},{kind}" for size in range(10) for kind in ("cat", "dog")]
        >>> _ = Path("pets.csv").write_text("\\n".join(["size,kind,label", *rows]))
        >>> train, test = load_table_pair("pets.csv", label="label")
        >>> [column.kind for column in train.columns], len(train), len(test)
        (['number', 'texts'], 16, 4)
    """
    name, table = _read(train)
    left_out = (label, *(() if clean_labels is None else (clean_labels,)))
    for key in left_out:
        _column(name, table, key, "label" if key == label else "clean_labels")
    classes = _classes(name, table, label)
    columns = tuple(_described(name, table, key) for key in table.column_names if key not in left_out)
    if not columns:
        raise UserError(f"{name}: besides {', '.join(map(repr, left_out))} there is no column for features")
    data = _encoded(name, table, columns, label, classes)
    data.other = left_out[1:]
    if clean_labels is not None:
        data.clean_labels = _labels(name, table, clean_labels, classes)
    if test is not None:
        return data, load_table(test, columns=columns, label=label, classes=classes, other=left_out)
    kept, out = held_out(data.labels)
    if len(out) == 0:
        raise UserError(f"{name}: no class has three rows, so that one could be held out; name a test set")
    return data.select(kept), data.select(out)


def load_table(
    source: str | os.PathLike[str],
    *,
    columns: Sequence[Column],
    label: str,
    classes: tuple[str, ...],
    labelled: bool = True,
    other: Sequence[str] = (),
) -> TableData:
    """Rows of a table with the columns of another one.

    Args:
        source: a file that ends in .csv, .tsv or .parquet.
        columns: the features of the other table, in their order.
        label: the column of labels.
        classes: the names of the other table's classes.
        labelled: whether the labels are read; otherwise their column may be missing, and all labels are 0.
        other: names of columns that may be present but are not features.

    Raises:
        UserError: as for `load_table_pair`.

    Examples:
        >>> from pathlib import Path
        >>> from batchkern.data import Column, load_table
        >>> _ = Path("new.csv").write_text("size,kind\\n2,dog\\n")
        >>> columns = [Column("size", "number"), Column("kind", "texts", ("cat", "dog"))]  # of the training
        >>> data = load_table("new.csv", columns=columns, label="label", classes=("no", "yes"), labelled=False)
        >>> data.inputs.tolist()
        [[2.0, 0.0, 1.0]]
    """
    texts = [column.name for column in columns if column.kind == "texts"]
    if not _are_numbers(classes):
        texts.append(label)
    name, table = _read(source, texts)
    if labelled:
        _column(name, table, label, "label")
    for column in columns:
        if column.name not in table.column_names:
            raise UserError(f"{name}: no column {column.name!r}, which the training set has; it has {_listed(table)}")
    unknown = [key for key in table.column_names if key not in (*other, label, *(c.name for c in columns))]
    if unknown:
        raise UserError(f"{name}: its column {unknown[0]!r} is none of the training set's; remove it")
    return _encoded(name, table, columns, label, classes, labelled=labelled)


def open_pair(
    train: str | os.PathLike[str],
    test: str | os.PathLike[str] | None = None,
    *,
    label: str | None = None,
    clean_labels: str | None = None,
    image_size: int | None = None,
    center_crop: bool = False,
) -> tuple[Labelled, Labelled]:
    """Tables, if there is a ``label``, by :func:`load_table_pair`; else images, by `load_pair`.

    Args:
        train, test: as for :func:`load_table_pair` or `load_pair`.
        label: the column of labels of a table; ``None``: the data are images.
        clean_labels: as for these functions.
        image_size, center_crop: only for images, as for `load`.

    Examples:
        >>> from batchkern.data import open_pair
        >>> train, test = open_pair("digits")  # with label="..." files of tables
        >>> len(train) + len(test)
        1797
    """
    if label is None:
        return load_pair(train, test, clean_labels=clean_labels, image_size=image_size, center_crop=center_crop)
    if image_size is not None or center_crop:
        raise UserError(f"label is {label!r}, which is for tables, but image_size and center_crop are for images")
    return load_table_pair(train, test, label=label, clean_labels=clean_labels)


def _are_numbers(classes: Sequence[str]) -> bool:
    """Whether classes are numbers or truth values, so that a column of labels is not read as texts."""
    return set(classes) <= {"False", "True"} or all(re.fullmatch(r"-?\d+", name) for name in classes)


def _read(source: str | os.PathLike[str], texts: Sequence[str] = ()) -> tuple[str, Any]:
    """The name of a source in messages, and a pyarrow.Table. ``texts`` are columns that are always read as texts."""
    path = Path(os.path.expanduser(os.fspath(source)))
    name = printable(os.fspath(source))
    if not path.is_file():
        raise UserError(f"{name} is no file; a table (--label) is a file that ends in .csv, .tsv or .parquet")
    csv, parquet = require("pyarrow.csv", "train"), require("pyarrow.parquet", "train")
    try:
        match path.suffix.lower():
            case ".csv" | ".tsv" as suffix:
                options = csv.ParseOptions(delimiter="," if suffix == ".csv" else "\t", newlines_in_values=True)
                kinds = dict.fromkeys(texts, require("pyarrow", "train").string())
                convert = csv.ConvertOptions(
                    strings_can_be_null=True, quoted_strings_can_be_null=False, column_types=kinds
                )
                read = csv.read_csv(path, parse_options=options, convert_options=convert)
            case ".parquet":
                read = parquet.read_table(path)
            case suffix:
                raise UserError(f"{name}: a table (--label) ends in .csv, .tsv or .parquet, not {suffix!r}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: not a readable table: {str(error).partition(chr(10))[0]:.300}") from error
    try:
        names = read.column_names
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: the names of its columns are no text in UTF-8: write the file in this encoding"
        ) from error
    for key in names:
        if key == "" or key.startswith("__index_level_"):
            raise UserError(f"{name}: the column {key!r} is an index of pandas: write the table without (index=False)")
    if read.num_rows == 0:
        raise UserError(f"{name}: the table has no rows")
    if len(set(read.column_names)) < read.num_columns:
        twice = next(key for key in read.column_names if read.column_names.count(key) > 1)
        raise UserError(f"{name}: two of its columns are called {twice!r}")
    return name, read


def _listed(table: Any) -> str:
    return shortened(tuple(table.column_names))


def _column(name: str, table: Any, key: str, argument: str) -> Any:
    if key not in table.column_names:
        raise UserError(f"{name}: {argument} is {key!r}, which is none of its columns: {_listed(table)}")
    column = table.column(key)
    _check_whole(name, key, column)
    return column


def _check_whole(name: str, key: str, column: Any) -> None:
    """Checks that no row of a column lacks a value."""
    compute = require("pyarrow.compute", "train")
    missing = compute.is_null(column, nan_is_null=True)
    count = compute.sum(missing).as_py() or 0
    if count:
        row = compute.index(missing, True).as_py()
        raise UserError(
            f"{name}: column {key!r} has no value in row {row + 1} of {len(column)}"
            + (f", and in {count - 1} more" if count > 1 else "")
            + ": fill them, or remove the rows or the column (of a text file, NA, null and the like are no values)"
        )


def _kind(column: Any) -> str | None:
    """``"number"``, ``"texts"``, or ``None`` for another type."""
    types = require("pyarrow", "train").types
    of = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_string(of) or types.is_large_string(of):
        return "texts"
    return "number" if types.is_integer(of) or types.is_floating(of) or types.is_boolean(of) else None


def _texts(column: Any) -> list[str]:
    return [str(value) for value in column.to_pylist()]


def _described(name: str, table: Any, key: str) -> Column:
    column = table.column(key)
    _check_whole(name, key, column)
    kind = _kind(column)
    if kind == "number":
        return Column(key, "number")
    if kind is None:
        _check_encoding(name, key, column)
        raise UserError(
            f"{name}: column {key!r} is of type {column.type}; features are numbers, truth values and texts: remove "
            "it, or write it as one of these"
        )
    values = tuple(sorted(set(_texts(column))))
    if len(values) > MOST_TEXTS:
        raise UserError(
            f"{name}: column {key!r} has {len(values)} different texts, and each would be a feature; at most "
            f"{MOST_TEXTS} are: remove it, or write it as numbers"
        )
    return Column(key, "texts", values)


def _check_encoding(name: str, key: str, column: Any) -> None:
    """Raises for bytes, which is how text in another encoding than UTF-8 is read."""
    if str(column.type) in ("binary", "large_binary"):
        raise UserError(f"{name}: column {key!r} is no text in UTF-8: write the file in this encoding")


def _classes(name: str, table: Any, label: str) -> tuple[str, ...]:
    column = table.column(label)
    _check_encoding(name, label, column)
    types = require("pyarrow", "train").types
    if _kind(column) is None or types.is_floating(column.type):
        raise UserError(
            f"{name}: label is {label!r}, a column of type {column.type}; classes are texts, truth values or whole "
            "numbers: write it as one of these"
        )
    found = sorted(set(column.to_pylist()))
    if len(found) < 2:
        raise UserError(
            f"{name}: all {table.num_rows} rows are of one class, {str(found[0])!r}; at least two are needed"
        )
    if len(found) == table.num_rows:
        raise UserError(f"{name}: label is {label!r}, of which each row has a value of its own: these are no classes")
    return tuple(map(str, found))


def _labels(name: str, table: Any, key: str, classes: tuple[str, ...]) -> Tensor:
    """The class indices ``(N,)``."""
    place = {value: number for number, value in enumerate(classes)}
    found = [place.get(value, -1) for value in _texts(table.column(key))]
    if -1 in found:
        row = found.index(-1)
        raise UserError(
            f"{name}: row {row + 1} has {_texts(table.column(key))[row]!r} in {key!r}, which is none of the classes: "
            f"{shortened(classes)}"
        )
    return torch.tensor(found, dtype=torch.int64)


def _encoded(
    name: str,
    table: Any,
    columns: Sequence[Column],
    label: str,
    classes: tuple[str, ...],
    *,
    labelled: bool = True,
) -> TableData:
    features = [_features(name, table.column(column.name), column) for column in columns]
    labels = _labels(name, table, label, classes) if labelled else torch.zeros(table.num_rows, dtype=torch.int64)
    data = TableData(torch.cat(features, 1), labels, classes, name=name, standardize=True)
    data.columns, data.label = tuple(columns), label
    return data


def _features(name: str, column: Any, of: Column) -> Tensor:
    """The features of a column, float64 ``(N, width)``."""
    _check_whole(name, of.name, column)
    kind = _kind(column)
    if of.kind == "texts":  # a test column of numbers may be a column of texts in the training set
        place = {value: number for number, value in enumerate(of.values)}
        found = [place.get(value, -1) for value in _texts(column)]
        if -1 in found:
            row = found.index(-1)
            raise UserError(
                f"{name}: row {row + 1} has {_texts(column)[row]!r} in {of.name!r}, which no row of the training set "
                f"has: {shortened(of.values)}"
            )
        return torch.nn.functional.one_hot(torch.tensor(found), of.width).double()
    if kind != "number":
        raise UserError(f"{name}: column {of.name!r} is of type {column.type}, but of numbers in the training set")
    numbers = torch.from_numpy(np.asarray(column.to_pylist(), dtype=np.float64))
    finite = torch.isfinite(numbers) & (numbers.abs() < _MOST)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise UserError(f"{name}: column {of.name!r} is {column[row].as_py()} in row {row + 1}; it must be finite")
    return numbers[:, None]
