"""The labels of a table: the column that has them, and their conversion to int64."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from batchkern.data.wording import printable, shortened
from batchkern.errors import UserError, require

LABEL_COLUMNS = ("label", "labels", "fine_label")
_HIGHEST = torch.iinfo(torch.int64).max


class UnlabelledError(UserError):
    """No row of a split has a label."""


def kind_of(feature: Any) -> str:
    """A column's type for messages: "int64", "ClassLabel", "Image", "struct", ..."""
    if isinstance(feature, dict):
        return "struct"
    return feature.dtype if type(feature).__name__ == "Value" else type(feature).__name__


def described(features: Mapping[str, Any]) -> str:
    """The columns of a table and their types, for messages."""
    return ", ".join(f"{printable(key)} ({kind_of(feature)})" for key, feature in features.items())


def label_column(features: Mapping[str, Any]) -> str | None:
    """The column of labels, or None if there is none or the choice is not clear.

    If one of `LABEL_COLUMNS` has a type that is not supported, the labels are most likely in it, so a column of
    integers (an identifier, a width) is not used instead. Strings are labels only in `LABEL_COLUMNS`.
    """
    usable = [key for key, feature in features.items() if _has_classes(feature) or _is_integer(feature)]
    named = [key for key in LABEL_COLUMNS if key in features]
    for key in named:
        if key in usable:
            return key
    classes = [key for key in usable if _has_classes(features[key])]
    if len(classes) == 1:
        return classes[0]
    for key in named:
        if is_text(features[key]):
            return key
    return usable[0] if len(usable) == 1 and not named else None


def read_labels(
    name: str, dataset: Any, column: str, names: tuple[str, ...] | None = None
) -> tuple[Tensor, tuple[str, ...] | None]:
    """The labels (N,) int64, which are class indices if the column has classes; and the names of the classes, or None.

    Args:
        names: the classes of strings; by default, the sorted strings that occur, with a warning.

    Raises:
        UserError: a label is missing (null, or -1 as in test sets of the hub), or out of range.
    """
    arrow, compute = require("pyarrow", "train"), require("pyarrow.compute", "train")
    values = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    if hasattr(values.type, "value_type"):  # a dictionary array, with indices of its entries
        values = values.cast(values.type.value_type)
    if is_text(dataset.features[column]):
        values, names = _numbers_of(name, column, values, names)
    else:
        found = getattr(dataset.features[column], "names", None)
        names = tuple(found) if found else None
    allowed = f"0..{len(names) - 1}" if names else "0, 1, 2, ..."
    if values.type == arrow.uint64():
        row = compute.index(compute.greater(values, arrow.scalar(_HIGHEST, arrow.uint64())), True).as_py()
        if row >= 0:
            raise _out_of_range(name, column, row, values[row].as_py(), allowed)
    labels = torch.from_numpy(values.cast("int64").fill_null(-1).to_numpy().copy())
    unlabelled = (labels == -1).nonzero().flatten()
    if len(unlabelled):
        kind = UnlabelledError if len(unlabelled) == len(labels) else UserError
        raise kind(
            f"{name}: {len(unlabelled)} of {len(labels)} rows have no label in {column!r} (null or -1), "
            f"the first is row {int(unlabelled[0])}; every row must have one"
        )
    wrong = ((labels < 0) | (labels >= (len(names) if names else torch.inf))).nonzero().flatten()
    if len(wrong):
        raise _out_of_range(name, column, int(wrong[0]), int(labels[wrong[0]]), allowed)
    return labels, names


def _numbers_of(name: str, column: str, values: Any, names: tuple[str, ...] | None) -> tuple[Any, tuple[str, ...]]:
    """The index of each string in `names`, null for null; and `names`."""
    arrow, compute = require("pyarrow", "train"), require("pyarrow.compute", "train")
    if names is None:
        names = tuple(sorted(compute.unique(values).drop_null().to_pylist()))
        warnings.warn(
            f"{name}: the labels in {column!r} are strings; sorted, they are the {len(names)} classes "
            f"{shortened(names)}",
            stacklevel=2,
        )
    numbers = compute.index_in(values, value_set=arrow.array(names, values.type))
    row = compute.index(compute.and_(compute.is_valid(values), compute.is_null(numbers)), True).as_py()
    if row >= 0:
        raise UserError(
            f"{name}: row {row} has the label {values[row].as_py()!r} in {column!r}, which is none of the classes: "
            f"{shortened(names)}"
        )
    return numbers, names


def read_clean_labels(name: str, dataset: Any, column: str, label: str, names: tuple[str, ...] | None) -> Tensor:
    """(N,) int64, the correct labels for the column `label`, with the same numbers for the same classes.

    If both columns name their classes, they are matched by name and not by order.

    Args:
        names: the classes of the labels, or None.

    Raises:
        UserError: there is no such column, it has neither integers nor classes, or other classes than the labels; or as
            for `read_labels`.
    """
    features = dataset.features
    if column not in list(features):
        raise UserError(f"{name}: no column {column!r} of clean labels among its columns: {described(features)}")
    feature = features[column]
    if not _has_classes(feature) and not _is_integer(feature) and not (names and is_text(feature)):
        raise UserError(
            f"{name}: the column {column!r} of clean labels is of the type {kind_of(feature)}; "
            f"it must be of integers or classes"
        )
    clean, own = read_labels(name, dataset, column, names)
    if not names or is_text(feature):
        return clean
    if own and set(own) != set(names):
        raise UserError(
            f"{name}: the column {column!r} of clean labels has the classes {shortened(tuple(own))}, but {label!r} "
            f"has {shortened(tuple(names))}; both must have the same names, in any order"
        )
    if own:
        return torch.tensor([names.index(key) for key in own])[clean]
    check_clean_labels(name, clean, column, len(names))
    return clean


def check_clean_labels(name: str, clean: Tensor, column: str, classes: int, rows: Tensor | None = None) -> None:
    """Checks that clean labels are below the number of classes; `rows` (N,) are their rows in the file, if not all."""
    wrong = (clean >= classes).nonzero().flatten()
    if len(wrong):
        at = int(wrong[0])
        raise _out_of_range(name, column, at if rows is None else int(rows[at]), int(clean[at]), f"0..{classes - 1}")


def _out_of_range(name: str, column: str, row: int, label: int, allowed: str) -> UserError:
    return UserError(f"{name}: row {row} has the label {label} in {column!r}; allowed are {allowed}")


def is_text(feature: Any) -> bool:
    return kind_of(feature) in ("string", "large_string")


def _has_classes(feature: Any) -> bool:
    return isinstance(feature, require("datasets", "train").ClassLabel)


def _is_integer(feature: Any) -> bool:
    return re.fullmatch(r"u?int\d+", kind_of(feature)) is not None
