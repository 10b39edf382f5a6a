"""Opens a source given by a string or path: its splits, with labels read and checked, but no image decoded yet."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from batchkern.data.decode import Cells
from batchkern.data.folders import open_folder, what_it_is
from batchkern.data.images import TensorImages
from batchkern.data.labels import LABEL_COLUMNS, described, label_column, read_clean_labels, read_labels
from batchkern.data.wording import printable
from batchkern.errors import UserError, require

_HUB_NAME = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class Table:
    """One split: undecoded images, checked labels.

    Attributes:
        cells: the images.
        labels: (N,) int64, none negative, each below len(classes) if there are names.
        column: the name of the column of labels.
        classes: the names of the classes; None: the labels are integers without names.
        clean: (N,) int64, the correct labels; None: not known.
    """

    cells: Cells
    labels: Tensor
    column: str
    classes: tuple[str, ...] | None
    clean: Tensor | None = None

    @property
    def name(self) -> str:
        return self.cells.name

    def select(self, positions: Tensor) -> Table:
        """The rows at `positions` (m,) int64."""
        cells = replace(self.cells, index=self.cells.index[positions])
        clean = None if self.clean is None else self.clean[positions]
        return replace(self, cells=cells, labels=self.labels[positions], clean=clean)


def held_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """A fixed stratified split of N rows: the (ascending) int64 positions of the 80 % and of the 20 %.

    The split depends only on the labels, not on the seeds of a run. A fifth of each class, rounded, is held out;
    nothing of a class with fewer than three rows.
    """
    count = len(labels)
    labels = labels.unique(return_inverse=True)[1]  # labels may be any numbers; bincount needs small ones
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    order = shuffled[labels[shuffled].argsort(stable=True)]  # by class, shuffled within it
    sizes = labels.bincount()
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(count) - starts[labels[order]]
    is_test = torch.empty(count, dtype=torch.bool)
    is_test[order] = rank < (sizes[labels[order]] + 2) // 5
    return (~is_test).nonzero().flatten(), is_test.nonzero().flatten()


def open_source(source: str | os.PathLike[str]) -> tuple[str, Mapping[str, Any]]:
    """The name of `source` in messages, and its splits by name, each a `TensorImages` or a `datasets.Dataset`.

    A path object is always a file or a folder, never the name of a data set.

    Raises:
        UserError: there is no such file, folder or hub data set, or it cannot be read.
    """
    if not isinstance(source, str | os.PathLike) or not isinstance(os.fspath(source), str):
        raise UserError(f"a data set must be given by its name or its path, not by {source!r}")
    given = os.fspath(source)
    name = printable(given)
    if source in _BUILT_IN:
        return name, _BUILT_IN[given]()
    path = os.path.expanduser(given)
    if os.path.isdir(path):
        return name, open_folder(name, path)
    if os.path.isfile(path):
        if path.lower().endswith((".csv", ".tsv")):
            raise UserError(f"{name} is a table: give the column of its labels by label (--label)")
        return name, _open_parquet(name, path)
    if os.path.lexists(path):
        raise UserError(f"{given!r} is neither a file nor a folder, but {what_it_is(path)}")
    if not isinstance(source, str):
        raise UserError(
            f"{given!r} is not a file or folder, as a path must be; give the name of a data set as a string"
        )
    if given.endswith(".parquet") or not _HUB_NAME.fullmatch(given) or given.startswith("."):
        raise UserError(f"{given!r} is no file or folder, and neither {_built_in_names()} nor a hub name (owner/name)")
    return name, _open_hub(given)


def read_table(
    name: str, split: str, dataset: Any, clean_labels: str | None = None, classes: tuple[str, ...] | None = None
) -> Table:
    """The images and labels of one split of a `datasets.Dataset`.

    Args:
        clean_labels: the column of correct labels, if there is one.
        classes: the classes of labels that are strings; by default, the sorted strings that occur.

    Raises:
        UserError: no image column, no label column, no rows, an unlabelled row, or a label out of range.
    """
    cells = read_images(name, split, dataset)
    label = label_column(dataset.features)
    if label is None:
        raise UserError(
            f"{name}: no label column ({', '.join(LABEL_COLUMNS)}, or the only one of classes or integers) "
            f"among its columns: {described(dataset.features)}"
        )
    labels, names = read_labels(name, dataset, label, classes)
    clean = None if clean_labels is None else read_clean_labels(name, dataset, clean_labels, label, names)
    return Table(cells, labels, label, names, clean)


def read_images(name: str, split: str, dataset: Any) -> Cells:
    """The images of one split of a `datasets.Dataset`.

    Raises:
        UserError: no image column, or no rows.
    """
    datasets = require("datasets", "train")
    images = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise UserError(f"{name}: no image column (datasets.Image) among its columns: {described(dataset.features)}")
    if len(dataset) == 0:
        raise UserError(f"{name}: the split {split!r} has no rows")
    feature = datasets.Image(
        mode=dataset.features[images[0]].mode
    )  # a copy that decodes, since the column's own feature may have decode=False
    undecoded = dataset.select_columns(images[:1]).cast_column(images[0], datasets.Image(decode=False))
    return Cells(name, undecoded, images[0], feature, torch.arange(len(dataset)))


def _open_digits() -> dict[str, TensorImages]:
    """scikit-learn's 1,797 digits, 8x8, grey; their values 0..16 become multiples of 15, without loss."""
    digits = require("sklearn.datasets", "train").load_digits()
    images = torch.tensor(digits.images * 15).to(torch.uint8)[:, None]
    return _split(TensorImages(images, torch.tensor(digits.target), list("0123456789"), name="digits"))


def _open_photo_patches() -> dict[str, TensorImages]:
    """The 520 complete, non-overlapping 32x32 patches of scikit-learn's two photographs, which are the two classes."""
    require("PIL.Image", "train")
    photos = require("sklearn.datasets", "train").load_sample_images()
    patches = []
    for photo in photos.images:
        rows = torch.tensor(photo).unfold(0, 32, 32).unfold(1, 32, 32)  # (rows, columns, C, 32, 32)
        patches.append(rows.flatten(0, 1))
    labels = torch.arange(len(patches)).repeat_interleave(torch.tensor([len(p) for p in patches]))
    classes = [os.path.splitext(os.path.basename(path))[0] for path in photos.filenames]
    return _split(TensorImages(torch.cat(patches), labels, classes, name="photo-patches"))


_BUILT_IN = {"digits": _open_digits, "photo-patches": _open_photo_patches}


def _built_in_names() -> str:
    return " nor ".join(map(repr, _BUILT_IN))


def _split(data: TensorImages) -> dict[str, TensorImages]:
    parts = zip(("train", "test"), held_out(data.labels), strict=True)
    return {
        split: TensorImages(data.images[rows], data.labels[rows], data.classes, name=data.name) for split, rows in parts
    }


def _open_parquet(source: str, path: str) -> Mapping[str, Any]:
    parquet = require("pyarrow.parquet", "train")
    try:
        path = os.path.abspath(path)  # otherwise s3:/a.parquet would be taken for an address
        if parquet.read_metadata(path).num_rows == 0:
            raise UserError(f"{source}: the file has no rows")
        # The name of the configuration is part of the cache key of datasets.
        options = {"name": _digest(path), "cache_dir": _cache_dir()}
        # `datasets` reports each load to the hub, even of local files, and waits for the answer.
        with _set("HF_UPDATE_DOWNLOAD_COUNTS", False, "datasets.config"):
            splits = _load_dataset("parquet", data_files={"train": glob.escape(path)}, **options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source}: not a readable parquet file: {_cause(error)}") from error
    for dataset in splits.values():
        _check_embedded(source, dataset)
    return splits


def _digest(path: str) -> str:
    """A digest of a parquet file's size, its first and last mebibyte and its footer. The modification time alone would
    not detect every replaced file."""
    size, piece = os.path.getsize(path), 1 << 20
    with open(path, "rb") as file:
        digest = hashlib.blake2b(size.to_bytes(8, "little") + file.read(piece), digest_size=8)
        file.seek(size - 8)
        footer = 8 + int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - max(piece, footer)))
        digest.update(file.read())
    return digest.hexdigest()


def _check_embedded(source: str, dataset: Any) -> None:
    """Checks that images are embedded in the file: a path or address in a cell is never opened."""
    datasets = require("datasets", "train")
    compute = require("pyarrow.compute", "train")
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            cells = dataset.select_columns([name]).with_format("arrow")[:].column(name)
            named = compute.and_(cells.is_valid(), compute.struct_field(cells, "bytes").is_null())
            if (row := compute.index(named, True).as_py()) >= 0:
                raise UserError(
                    f"{source}: row {row} has no bytes in its column {name!r}, but the path "
                    f"{cells[row].as_py()['path']!r}; in a parquet file the images themselves must be in it"
                )


def _open_hub(source: str) -> Mapping[str, Any]:
    match = _HUB_NAME.fullmatch(source)
    assert match is not None
    if os.path.exists(match["path"]):
        raise UserError(f"{source!r}: {match['path']!r} is a local file or folder, which has no configurations")
    if match["path"] in require("datasets.packaged_modules", "train")._PACKAGED_DATASETS_MODULES:
        raise UserError(f"{source!r} is a file reader of `datasets`, not a data set: name the file or the folder")
    silence = _silence_of_hub(match["path"])
    offline = ("HF_HUB_OFFLINE", True, "datasets.config", "huggingface_hub.constants")
    try:
        with _set(*offline) if silence else contextlib.nullcontext():  # it may be in the cache
            return _load_dataset(match["path"], match["config"])
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{source!r} is no local file or folder, and cannot be loaded from the hub: {silence or _cause(error)}"
        ) from error


def _silence_of_hub(name: str) -> str:
    """The reason why the hub cannot be reached, or an empty text. It is tried once; `datasets` would retry for half a
    minute."""
    if require("datasets.config", "train").HF_HUB_OFFLINE:
        return ""
    hub = require("huggingface_hub", "train")
    try:
        hub.HfApi().dataset_info(name, timeout=5)
    except (hub.utils.HfHubHTTPError, hub.utils.HFValidationError):
        return ""
    except Exception as error:
        return _cause(error)
    return ""


def _load_dataset(*args: Any, **options: Any) -> Mapping[str, Any]:
    datasets = require("datasets", "train")
    with _no_progress_bars(datasets):
        return datasets.load_dataset(*args, **options)


_setting = threading.Lock()


@contextlib.contextmanager
def _set(name: str, value: bool, *modules: str) -> Iterator[None]:
    """Changes a setting of modules during one load; only one load runs at a time."""
    holders = [require(module, "train") for module in modules]
    with _setting:
        before = [getattr(holder, name) for holder in holders]
        for holder in holders:
            setattr(holder, name, value)
        try:
            yield
        finally:
            for holder, earlier in zip(holders, before, strict=True):
                setattr(holder, name, earlier)


@contextlib.contextmanager
def _no_progress_bars(datasets: Any) -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _cache_dir() -> str | None:
    """None for datasets' own cache; if that is not writable, a folder that is removed at exit."""
    folder = require("datasets.config", "train").HF_DATASETS_CACHE
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError:
        return _scratch().name


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="batchkern-")


def _cause(error: BaseException) -> str:
    """The root of a chain of exceptions, in one line, since datasets wraps an error several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}")
