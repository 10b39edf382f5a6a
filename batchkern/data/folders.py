"""Folders of images: which sub-folders are splits, which are classes, and the files of each class."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from batchkern.data.wording import shortened
from batchkern.errors import UserError, require

# Splits, under the names that `datasets` uses, and the names of sub-folders that are taken for them.
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev"),
}
_SPLIT_FOLDERS = {name: split for split, names in _SPLITS.items() for name in names}


def open_folder(source: str, path: str) -> Mapping[str, Any]:
    """The splits of a folder: its sub-folders train and test (or validation, or other usual names of these) if they
    exist, or train if there is no other sub-folder; else only "train". The classes are those of the split "train".

    Files are listed here and not by `datasets`, which would treat any file or class with "test" in its name as part of
    a test split, use the innermost folder as the class, and read labels from a metadata file.
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
    """The split of each sub-folder; empty if the sub-folders are classes."""
    found = {name: _SPLIT_FOLDERS[name.lower()] for name in inside if name.lower() in _SPLIT_FOLDERS}
    folders = dict(sorted(found.items(), key=lambda item: item[1] != "train"))  # "train" first, which has the classes
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
            raise UserError(
                f"{where}: the sub-folder {name!r} has no image; each must be a class with at least one image"
            )
        if not files:  # at once, since searching all folders could take very long, for example in /
            raise UserError(f"{where}: no images in one sub-folder per class, as in class/image.png: none in {name!r}")
        images[name] = files
    if not images:
        raise UserError(f"{where}: no images in one sub-folder per class, as in class/image.png")
    return images


def image_files(where: str, path: str) -> Iterator[str]:
    """The image files in a folder and in the folders below it, by their extensions.

    Raises:
        UserError: an entry cannot be read, or has the name of an image but is not a file; the message begins with
            ``where``.
    """
    pillow = require("PIL.Image", "train")
    extensions = {extension for extension, kind in pillow.registered_extensions().items() if kind in pillow.OPEN}
    folders, seen = [path], set()
    while folders:
        folder = folders.pop()
        place = os.path.realpath(folder)
        if place in seen:  # a link to a folder above would cause an endless loop
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
    if not _is(entry.is_file):  # reading from a pipe might never end
        raise UserError(f"{where}: {entry.path!r} is neither a file nor a folder, but {what_it_is(entry.path)}")
    try:
        entry.path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the path {entry.path!r} is not valid UTF-8; rename it, so that it is") from None


def _extension(file: str) -> str:
    return "" if file.startswith(".") else os.path.splitext(file)[1].lower()


def _sub_folders(where: str, path: str) -> list[str]:
    return [entry.name for entry in _entries(where, path) if entry.name[0] != "." and _is_folder(where, entry)]


def _entries(where: str, path: str) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name."""
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        _refuse_folder(where, error)


def _is_folder(where: str, entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder.

    Raises:
        UserError: it is a broken link without a file extension, which may stand for a class.
    """
    folder = _is(entry.is_dir)
    if not folder and entry.is_symlink() and not os.path.exists(entry.path) and "." not in entry.name:
        raise UserError(f"{where}: {entry.path!r} is a link that cannot be followed; remove it, or repair it")
    return folder


def _is(kind: Callable[[], bool]) -> bool:
    """The result of ``kind``, a test of an entry; False if the entry is a link that refers to itself."""
    with contextlib.suppress(OSError):
        return kind()
    return False


def _refuse_folder(where: str, error: OSError) -> NoReturn:
    raise UserError(f"{where}: the folder {error.filename!r} cannot be read: {error.strerror}") from error


def what_it_is(path: str) -> str:
    return "a link that leads to no file" if os.path.islink(path) and not os.path.exists(path) else "a device or a pipe"
