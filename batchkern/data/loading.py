"""`load` for one split, and `load_pair` for a training set and a test set with the same classes and shape."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from numbers import Real
from typing import Any, NamedTuple

from batchkern.data.decode import decode_all
from batchkern.data.images import ImageData, StreamedImages, TensorImages, centre_of, match_shape, sample_rows
from batchkern.data.labels import UnlabelledError, check_clean_labels
from batchkern.data.sources import Table, held_out, open_source, read_table
from batchkern.data.wording import shortened
from batchkern.errors import UserError, whole

MEMORY_LIMIT = 4 << 30
LARGEST = 1 << 14
"""The largest number of pixels along a side of an image."""
HELD_OUT = "held-out"
"""A name in place of a split: the fifth of "train" that `load_pair` holds out if there is no other test set."""


def load(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    image_size: int | None = None,
    center_crop: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> ImageData:
    """One split of a data set of labelled images.

    Args:
        source: one of
            - "digits": scikit-learn's 1,797 8x8 grey digits, with a fixed train and test split;
            - "photo-patches": 520 32x32 colour patches of scikit-learn's two photographs (the classes), to be
              injected into the training on another set; with a fixed train and test split;
            - a parquet file in the image layout of Hugging Face `datasets`; its one split is "train";
            - a folder with one sub-folder of images per class, or of folders of them; or with sub-folders
              train and test (or validation, valid, val, dev, training, testing; in any case) that are like this;
              else its one split is "train";
            - a name on the Hugging Face hub, `owner/name`, `name`, or either with `:config`.
            A path object is always a file or a folder.
            Images are in the first column of type `datasets.Image`. Labels are in the column "label", "labels" or
            "fine_label", else in the only column of classes, else in the only column of integers (but if one of
            the three names has an unsupported type, it is an error). Strings in one of these three are classes
            too, in sorted order.
        split: name of the split.
        image_size: resize all images to this many pixels square, bilinear with antialiasing.
        center_crop: instead of squeezing an image into the square, resize its shorter side to
            round(image_size / 0.875), and cut the square out of the centre (of 256 pixels 224, as for ImageNet).
            The split "train" is then streamed, whatever the limit, so that augment="resized-crop" cuts its windows
            out of the images in the files; this does not apply to built-in sources.
        memory_limit: in bytes; if the decoded uint8 images would take more, they are streamed, which means that
            images are decoded each time for their batch.

    Returns:
        Images of one channel if all are grey or black and white, of three otherwise. 16-bit greys keep their
        high byte. Of streamed images, at most 4,096, evenly spaced, are checked for colour; if none of them
        has colour, all images become grey.

    Raises:
        UserError: there is no such source or split, it cannot be read, it lacks an image or label column, a
            row has no label or one out of range, all rows are of one class, an image cannot be decoded, or
            sizes are mixed without `image_size` (for streamed images: raised when its batch is read).

    Examples:
        >>> from batchkern.data import load
        >>> train, test = load("digits"), load("digits", split="test")
        >>> len(train) + len(test), train.shape, train.classes[:3]
        (1797, (1, 8, 8), ('0', '1', '2'))
    """
    size = _checked_size(image_size, center_crop)
    _check_limit(memory_limit)
    name, splits = open_source(source)
    part = _part(name, splits, split)
    limit = 0 if center_crop and split == "train" else memory_limit
    return _decoded(part, _classes(part), size, center_crop, limit)


def load_pair(
    train: str | os.PathLike[str],
    test: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    center_crop: bool = False,
    clean_labels: str | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> tuple[ImageData, ImageData]:
    """A training set, the split "train" of `train`, and a test set with the same classes and shape.

    Args:
        train: a source, as for `load`.
        test: another source, of which "test" is used, else "validation" (also if no row of "test" has a label),
            else its only split. None: "test" or "validation" of `train`, in the same way; if it has neither, a
            fixed fifth of each class is held out from its split "train", the same in every run whatever its
            seeds.
        image_size, center_crop, memory_limit: as for `load`; the limit is applied to each set separately. With
            `center_crop` the training set is streamed, and the test set only above the limit.
        clean_labels: a column of `train` with the correct labels, if its labels are known to be noisy: integers with
            the same meaning as the labels, or classes, which are matched by name if the labels have names too.

    Returns:
        (training set, test set), the second with the channels and the class names of the first.

    Raises:
        UserError: as for `load`; or the class names differ; or, if one of the two has integers without names, a test
            label is not a training class; or a clean label is not; or the images differ in size without
            `image_size`.

    Examples:
        >>> from batchkern.data import load_pair
        >>> train, test = load_pair("digits", image_size=16)
        >>> len(train) + len(test), test.shape
        (1797, (1, 16, 16))
    """
    size = _checked_size(image_size, center_crop)
    _check_limit(memory_limit)
    name, splits = open_source(train)
    train_part = _part(name, splits, "train", clean_labels)
    classes = _classes(train_part)
    if test is not None:
        test_part = _test_part(*open_source(test), classes)
    elif "test" in splits or "validation" in splits:
        test_part = _test_part(name, splits, classes)
    else:
        # Only built-in sources are already decoded, and these have their own test split.
        assert isinstance(train_part, Table)
        kept, out = held_out(train_part.labels)
        if len(out) == 0:
            raise UserError(f"{name}: no class has three images, so that one could be held out; name a test set")
        train_part, test_part = train_part.select(kept), train_part.select(out)
        classes = _classes(train_part)
    if isinstance(train_part, Table) and train_part.clean is not None:
        assert clean_labels is not None
        check_clean_labels(name, train_part.clean, clean_labels, len(classes), train_part.cells.index)
    _check_test_classes(test_part, train_part, classes)
    train_data = _decoded(train_part, classes, size, center_crop, 0 if center_crop else memory_limit)
    test_data = _decoded(test_part, classes, size, center_crop, memory_limit)
    if test_data.shape[1:] != train_data.shape[1:]:
        sizes = [f"{data.shape[1]}x{data.shape[2]}" for data in (test_data, train_data)]
        raise UserError(
            f"{test_part.name}: test images are {sizes[0]}, training images {sizes[1]}; "
            f"resize them all with image_size (--image-size)"
        )
    return train_data, match_shape(test_data, train_data.shape)


class Trained(NamedTuple):
    """The data that a model was trained on: their name and their classes.

    Examples:
        >>> from batchkern.data import Trained, load
        >>> data = load("digits")
        >>> Trained(data.name, data.classes[:2])
        Trained(name='digits', classes=('0', '1'))
    """

    name: str
    classes: tuple[str, ...]


def load_test(
    source: str | os.PathLike[str],
    trained: Trained,
    shape: tuple[int, int, int],
    *,
    split: str | None = None,
    center_crop: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> ImageData:
    """Labelled images to test a trained model, in the form that `load_pair` returns.

    Args:
        source: as for `load`.
        shape: (C, H, W) of the model's images.
        split: name of the split, or `HELD_OUT`; None: "test", else "validation", else the only split, unless the model
            was trained on it.
        center_crop: how images of another size are fitted to this shape, as for `load`.
        trained: the name and the classes of the data that the model was trained on.
        memory_limit: as for `load`.

    Raises:
        UserError: as for `load_pair`.

    Examples:
        >>> from batchkern.data import Trained, load_test
        >>> trained = Trained("digits", tuple("0123456789"))  # what the model was trained on
        >>> data = load_test("digits", trained, shape=(1, 8, 8))
        >>> len(data), data.classes == trained.classes
        (359, True)
    """
    name, splits = open_source(source)
    if split is None:
        if not {"test", "validation"} & set(splits) and os.path.realpath(source) == os.path.realpath(trained.name):
            raise UserError(
                f"{name}: the model was trained on it, and it has no split 'test' or 'validation'; say by split "
                f"(--split) whether {HELD_OUT}, the fifth that a training without other test data leaves out, or train"
            )
        part = _test_part(name, splits, trained.classes)
    elif split == HELD_OUT:
        own = [key for key in ("test", "validation") if key in splits]
        if own:
            raise UserError(f"{name}: nothing of it is held out, since it has a split {own[0]!r}")
        table = _part(name, splits, "train", classes=trained.classes)
        assert isinstance(table, Table)  # built-in sources have a test split
        part = table.select(held_out(table.labels)[1])
    else:
        part = _part(name, splits, split, classes=trained.classes)
    _check_test_classes(part, trained, trained.classes)
    return match_shape(_decoded(part, trained.classes, shape[1:], center_crop, memory_limit), shape)


def _part(
    source: str,
    splits: Mapping[str, Any],
    split: str,
    clean_labels: str | None = None,
    classes: tuple[str, ...] | None = None,
) -> TensorImages | Table:
    if split not in list(splits):
        raise UserError(f"{source}: no split {split!r}; it has {', '.join(splits)}")
    part = splits[split]
    if not isinstance(part, TensorImages):
        return read_table(source, split, part, clean_labels, classes)
    if clean_labels is not None:
        raise UserError(f"{source}: it has no columns, so none of clean labels either, got {clean_labels!r}")
    return part


def _test_part(source: str, splits: Mapping[str, Any], classes: tuple[str, ...]) -> TensorImages | Table:
    """The split of a source that is used as test set; ``classes`` are those of the training set."""
    for split in ("test", "validation"):
        if split in splits:
            try:
                return _part(source, splits, split, classes=classes)
            except UnlabelledError:
                # Some benchmarks do not publish the labels of their test images (in ImageNet they are all -1).
                if split == "validation" or "validation" not in splits:
                    raise
    if len(splits) > 1:
        raise UserError(f"{source}: no split 'test' or 'validation'; it has {', '.join(splits)}")
    return _part(source, splits, next(iter(splits)), classes=classes)


def _decoded(
    part: TensorImages | Table,
    classes: tuple[str, ...],
    size: tuple[int, int] | None,
    center_crop: bool,
    memory_limit: int,
) -> ImageData:
    """The images, in memory if they fit, else streamed."""
    data: ImageData
    if isinstance(part, TensorImages):
        data = TensorImages(part.images, part.labels, classes, name=part.name)
        if size is not None:
            data = centre_of(data, size[0]) if center_crop else match_shape(data, (data.shape[0], *size))
        data.center_crop = center_crop
        return data
    first = part.cells.decode([0])[0]
    resize, size = size is not None, size or first.shape[1:]
    cells = replace(part.cells, size=size, resize=resize, crop=center_crop, source=first.shape[1:])
    channels = 3 if len(first) == 3 or cells.any_colour(sample_rows(len(cells))) else 1
    if len(cells) * channels * math.prod(size) > memory_limit:
        data = StreamedImages(replace(cells, channels=channels), part.labels, classes)
    else:
        data = TensorImages(decode_all(cells, channels), part.labels, classes, name=part.name)
    data.clean_labels, data.center_crop = part.clean, center_crop
    return data


def _checked_size(image_size: int | None, center_crop: bool) -> tuple[int, int] | None:
    """The (H, W) of images for an ``image_size``, checked; None without one."""
    size = whole(image_size)
    if image_size is not None and size is None:
        raise UserError(f"image_size must be a whole number of pixels, not {image_size!r}")
    if size is not None and not 4 <= size <= LARGEST:
        raise UserError(f"image_size must be 4 to {LARGEST} pixels, not {size}")
    if not isinstance(center_crop, bool):
        raise UserError(f"center_crop must be True or False, not {center_crop!r:.60}")
    if center_crop and size is None:
        raise UserError("center_crop cuts a square out of each image: image_size (--image-size) must say how large")
    return None if size is None else (size, size)


def _check_limit(memory_limit: float) -> None:
    if not isinstance(memory_limit, Real) or math.isnan(memory_limit):
        raise UserError(f"memory_limit must be a number of bytes, not {memory_limit!r}")


def _classes(part: TensorImages | Table) -> tuple[str, ...]:
    """The class names of a training set; "0", "1", ... if it has none."""
    present = part.labels.unique()
    if len(present) < 2:
        name = part.classes[int(present[0])] if part.classes is not None else str(int(present[0]))
        raise UserError(
            f"{part.name}: all {len(part.labels)} images are of one class, {name!r}; at least two are needed"
        )
    if part.classes is not None:
        return part.classes
    highest = int(present[-1])
    if highest >= len(part.labels):
        raise UserError(
            f"{part.name}: {_found(part, int(part.labels.argmax()))}; without class names the "
            f"labels must be 0..{len(part.labels) - 1}, since there are not more classes than images"
        )
    return tuple(map(str, range(highest + 1)))


def _check_test_classes(
    test: TensorImages | Table, train: TensorImages | Table | Trained, classes: tuple[str, ...]
) -> None:
    if test.classes is not None and train.classes is not None:
        for index, (name, expected) in enumerate(zip_longest(test.classes, classes)):
            if name != expected:
                raise UserError(
                    f"{test.name}: class {index} is {_quoted(name)}, but {_quoted(expected)} in the training "
                    f"set {train.name}; both must have the same classes in the same order: "
                    f"{shortened(classes)}"
                )
    for named, numbered in ((test, train), (train, test)):
        if named.classes is not None and numbered.classes is None and _are_numbers_out_of_order(named.classes):
            raise UserError(
                f"{named.name}: its classes are numbers in the order {shortened(named.classes)}, so the labels of "
                f"{numbered.name}, numbers without names, cannot be matched to them; rename them, as to 00, 01, 02, ..."
            )
    wrong = (test.labels >= len(classes)).nonzero().flatten()
    if len(wrong):
        raise UserError(
            f"{test.name}: {_found(test, int(wrong[0]))}; the training set {train.name} allows 0..{len(classes) - 1}"
        )


def _are_numbers_out_of_order(names: tuple[str, ...]) -> bool:
    return all(name.isdecimal() for name in names) and [*map(int, names)] != [*range(len(names))]


def _found(part: TensorImages | Table, position: int) -> str:
    label = int(part.labels[position])
    if isinstance(part, TensorImages):
        return f"row {position} has the label {label}"
    return f"row {int(part.cells.index[position])} has the label {label} in {part.column!r}"


def _quoted(name: str | None) -> str:
    return "missing" if name is None else repr(name)
