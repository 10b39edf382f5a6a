"""What a source string stands for: its splits, with the labels read and checked, and no image decoded yet."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from batchkern.data.decode import Cells
from batchkern.data.images import TensorImages
from batchkern.data.labels import LABEL_COLUMNS, described, label_column, read_clean_labels, read_labels
from batchkern.data.wording import printable, shortened
from batchkern.errors import UserError, require

# Sub-folders of a folder that are splits, and the names under which `datasets` knows them.
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev"),
}
_SPLIT_FOLDERS = {name: split for split, names in _SPLITS.items() for name in names}
_HUB_NAME = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class Table:
    """One split: undecoded images, checked labels.

    Attributes:
        cells: the images.
        labels: (N,) int64, none negative, each below len(classes) if there are names.
        column: the name of their column.
        classes: the names of the classes, or None: the labels are just integers.
        clean: (N,) int64, what the labels ought to be, or None: not known.
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

    The same for the same labels always, whatever the seeds of a run. A fifth of each class, rounded, is held
    out: nothing of a class with fewer than three rows.
    """
    count = len(labels)
    labels = labels.unique(return_inverse=True)[1]  # a label may be any number: what is counted must not
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    order = shuffled[labels[shuffled].argsort(stable=True)]  # by class, shuffled within it
    sizes = labels.bincount()
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(count) - starts[labels[order]]
    is_test = torch.empty(count, dtype=torch.bool)
    is_test[order] = rank < (sizes[labels[order]] + 2) // 5
    return (~is_test).nonzero().flatten(), is_test.nonzero().flatten()


def open_source(source: str | os.PathLike[str]) -> tuple[str, Mapping[str, Any]]:
    """How `source` is called in messages; and its splits by name, each a `TensorImages` or a `datasets.Dataset`.

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
        return name, _open_folder(name, path)
    if os.path.isfile(path):
        if path.lower().endswith((".csv", ".tsv")):
            raise UserError(f"{name} is a table: say by label (--label) which of its columns has the labels")
        return name, _open_parquet(name, path)
    if os.path.lexists(path):
        raise UserError(f"{given!r} is neither a file nor a folder, but {_what_it_is(path)}")
    if not isinstance(source, str):
        raise UserError(f"{given!r} is no file or folder, which a path must be; a name is given as a string")
    if given.endswith(".parquet") or not _HUB_NAME.fullmatch(given) or given.startswith("."):
        raise UserError(f"{given!r} is no file or folder, and neither {_built_in_names()} nor a hub name (owner/name)")
    return name, _open_hub(given)


def _what_it_is(path: str) -> str:
    return "a link that leads to no file" if os.path.islink(path) and not os.path.exists(path) else "a device or a pipe"


def read_table(
    name: str, split: str, dataset: Any, clean_labels: str | None = None, classes: tuple[str, ...] | None = None
) -> Table:
    """The images and labels of one split of a `datasets.Dataset`.

    Args:
        clean_labels: the column of what the labels ought to be, where it is known.
        classes: those of labels that are strings, else they are the strings that occur, sorted.

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
    feature = datasets.Image(mode=dataset.features[images[0]].mode)  # one that decodes, which it may be told not to
    undecoded = dataset.select_columns(images[:1]).cast_column(images[0], datasets.Image(decode=False))
    return Cells(name, undecoded, images[0], feature, torch.arange(len(dataset)))


def _open_digits() -> dict[str, TensorImages]:
    """scikit-learn's 1,797 digits, 8x8, grey; their values 0..16 become multiples of 15, losing nothing."""
    digits = require("sklearn.datasets", "train").load_digits()
    images = torch.tensor(digits.images * 15).to(torch.uint8)[:, None]
    return _split(TensorImages(images, torch.tensor(digits.target), list("0123456789"), name="digits"))


def _open_photo_patches() -> dict[str, TensorImages]:
    """The 520 whole 32x32 patches of scikit-learn's two photographs, side by side; which one is the class."""
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
        path = os.path.abspath(path)  # or s3:/a.parquet would be an address
        if parquet.read_metadata(path).num_rows == 0:
            raise UserError(f"{source}: the file has no rows")
        # Among what datasets knows its cache by is the name of a configuration.
        options = {"name": _digest(path), "cache_dir": _cache_dir()}
        # `datasets` tells the hub of each load, of local files too, and waits for its answer.
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
    """Of a parquet file's size, of its first and its last mebibyte and its footer: by its time of change alone another
    file in its place may be taken for it."""
    size, piece = os.path.getsize(path), 1 << 20
    with open(path, "rb") as file:
        digest = hashlib.blake2b(size.to_bytes(8, "little") + file.read(piece), digest_size=8)
        file.seek(size - 8)
        footer = 8 + int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - max(piece, footer)))
        digest.update(file.read())
    return digest.hexdigest()


def _check_embedded(source: str, dataset: Any) -> None:
    """That images lie in the file: what a cell names instead, a file of this machine or an address, is never opened."""
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


def _open_folder(source: str, path: str) -> Mapping[str, Any]:
    """Splits are the sub-folders train and test (or validation, or other usual names of these) where there are such, or
    train where there is nothing else; else "train" only. Classes are those of the split "train".

    Files are found here, and not by `datasets`, which would take any file or class with "test" in its name for a part
    of a test split, the innermost folder for the class, and the labels from a metadata file.
    """
    datasets = require("datasets", "train")
    inside = _sub_folders(source, path)
    folders = _split_folders(source, inside) or {"": "train"}
    splits: dict[str, Any] = {}
    classes: tuple[str, ...] = ()
    training = ""
    for name, split in folders.items():
        where = os.path.join(source, name).rstrip(os.sep) or os.sep
        images = _images_of_classes(where, os.path.join(os.path.abspath(path), name))
        if split == "train":
            classes, training = tuple(images), where
        for of_class in images:
            if of_class not in classes:
                raise UserError(f"{where}: its sub-folder {of_class!r} is no class of {training}: {shortened(classes)}")
        columns = {
            "image": [file for files in images.values() for file in files],
            "label": [classes.index(of_class) for of_class, files in images.items() for _ in files],
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))})
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return splits


def _split_folders(source: str, inside: list[str]) -> dict[str, str]:
    """Which split each sub-folder is; none where they are classes."""
    found = {name: _SPLIT_FOLDERS[name.lower()] for name in inside if name.lower() in _SPLIT_FOLDERS}
    folders = dict(sorted(found.items(), key=lambda item: item[1] != "train"))  # it has the classes
    others = [name for name in inside if name not in folders]
    splits = set(folders.values())
    if others and ("train" not in splits or len(folders) == 1):
        return {}  # a class may be called train, or test
    if others:
        raise UserError(
            f"{source}: its sub-folders {shortened(tuple(folders))} are splits, and {shortened(tuple(others))} none; "
            "put it elsewhere, or give the folders of training and test each by itself"
        )
    if len(splits) < len(folders):
        raise UserError(f"{source}: of its sub-folders {shortened(tuple(folders))} two are names of the same split")
    if folders and "train" not in splits:
        raise UserError(f"{source}: of splits it has {shortened(tuple(folders))}, but no train")
    return folders


def _images_of_classes(where: str, path: str) -> dict[str, list[str]]:
    """The files of each class, sorted: all images in its folder and those below it, as in torchvision's ImageFolder."""
    images: dict[str, list[str]] = {}
    for name in _sub_folders(where, path):
        files = [*image_files(where, os.path.join(path, name))]
        if not files and images:
            raise UserError(f"{where}: the sub-folder {name!r} has no image; each must be a class with one at least")
        if not files:  # said at once: of the root of a file system, to look at all folders would take for ever
            raise UserError(f"{where}: no images in one sub-folder per class, as in class/image.png: none in {name!r}")
        images[name] = files
    if not images:
        raise UserError(f"{where}: no images in one sub-folder per class, as in class/image.png")
    return images


def image_files(where: str, path: str) -> Iterator[str]:
    """Those in a folder and in the folders below it, by their names alone.

    Raises:
        UserError: something in it cannot be read, or is called as an image and is none; ``where`` begins the sentence.
    """
    pillow = require("PIL.Image", "train")
    extensions = {extension for extension, kind in pillow.registered_extensions().items() if kind in pillow.OPEN}
    folders, seen = [path], set()
    while folders:
        folder = folders.pop()
        place = os.path.realpath(folder)
        if place in seen:  # a link to a folder above would lead round for ever
            continue
        seen.add(place)
        below = []
        for entry in _entries(where, folder):
            if _is_folder(where, entry):
                below += [entry.path] if entry.name[0] != "." else []
            elif _extension(entry.name) in extensions:
                _check_image_file(where, entry)
                yield entry.path
        folders += reversed(below)


def _check_image_file(where: str, entry: os.DirEntry[str]) -> None:
    if not _is(entry.is_file):  # to read from a pipe would take for ever
        raise UserError(f"{where}: {entry.path!r} is neither a file nor a folder, but {_what_it_is(entry.path)}")
    try:
        entry.path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the path {entry.path!r} is not valid UTF-8; rename it, so that it is") from None


def _extension(file: str) -> str:
    return "" if file.startswith(".") else os.path.splitext(file)[1].lower()


def _sub_folders(where: str, path: str) -> list[str]:
    return [entry.name for entry in _entries(where, path) if entry.name[0] != "." and _is_folder(where, entry)]


def _entries(where: str, path: str) -> list[os.DirEntry[str]]:
    """What is in a folder, by name."""
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        _refuse_folder(where, error)


def _is_folder(where: str, entry: os.DirEntry[str]) -> bool:
    """
    Raises:
        UserError: it is a link that cannot be followed, without the extension of a file: a class may lie behind it.
    """
    folder = _is(entry.is_dir)
    if not folder and entry.is_symlink() and not os.path.exists(entry.path) and "." not in entry.name:
        raise UserError(f"{where}: {entry.path!r} is a link that cannot be followed; remove it, or mend it")
    return folder


def _is(kind: Callable[[], bool]) -> bool:
    """What an entry of a folder says of itself; no to all, where it is a link that leads round for ever."""
    with contextlib.suppress(OSError):
        return kind()
    return False


def _refuse_folder(where: str, error: OSError) -> NoReturn:
    raise UserError(f"{where}: the folder {error.filename!r} cannot be read: {error.strerror}") from error


def _open_hub(source: str) -> Mapping[str, Any]:
    match = _HUB_NAME.fullmatch(source)
    assert match is not None
    if os.path.exists(match["path"]):
        raise UserError(f"{source!r}: {match['path']!r} is a local file or folder, which has no configurations")
    if match["path"] in require("datasets.packaged_modules", "train")._PACKAGED_DATASETS_MODULES:
        raise UserError(f"{source!r} is a reader of files in `datasets`, no data set: name the file or the folder")
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
    """Why the hub does not answer, or nothing. It is asked once; `datasets` would ask for half a minute."""
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
    """A setting of modules, for one load; one load at a time."""
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
    """None, for datasets' own cache, or where that cannot be written a folder that is removed at exit."""
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
    """The root of a chain of exceptions, in one line: datasets wraps what went wrong several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}")
