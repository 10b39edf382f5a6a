"""Images without labels, for a trained model: files, folders, tables, PIL images and tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchkern.data.decode import Cells
from batchkern.data.folders import image_files
from batchkern.data.images import ImageData, StreamedImages, TensorImages, centre_of, match_shape
from batchkern.data.sources import open_source, read_images
from batchkern.data.wording import printable
from batchkern.errors import UserError, require
from batchkern.files import read_file


def images_of(
    images: Tensor | Sequence[Any], *, shape: tuple[int, int, int], classes: Sequence[str], center_crop: bool = False
) -> ImageData:
    """Images of ``shape`` (C, H, W), all with the label 0.

    Args:
        images: uint8 (B, C, H, W), which are not resized if they have this height and width; or a list of files and PIL
            images, which are decoded, rotated, converted and resized like those of a data set.
        center_crop: how images of another size are fitted to this shape, as for `load`.
        shape: (C, H, W) of the result.
        classes: the names of the classes of the model.

    Raises:
        UserError: they are of another kind, or there are none. An image that cannot be decoded raises when its batch is
            read.

    Examples:
        >>> import torch
        >>> from batchkern.data import images_of
        >>> from PIL import Image
        >>> images = [Image.new("L", (8, 8), 255), Image.new("L", (16, 16), 0)]
        >>> data = images_of(images, shape=(1, 8, 8), classes=["black", "white"])
        >>> data.rows(torch.tensor([0, 1]))[:, 0, 0, 0].tolist()
        [255, 0]
    """
    if isinstance(images, Tensor):
        data = TensorImages(images, _zeros(len(images) if images.dim() else 0), classes, name="images")
        if center_crop and data.shape[1:] != shape[1:]:
            data = centre_of(data, shape[1])
        return match_shape(data, shape)
    if not isinstance(images, Sequence) or isinstance(images, str | bytes):
        raise UserError(
            f"images must be a uint8 tensor (B, C, H, W) or a list of paths and images of PIL, not {images!r:.60}"
        )
    return _streamed(_Given(images).cells(), shape, classes, center_crop)


def table_of(
    source: str,
    *,
    shape: tuple[int, int, int],
    classes: Sequence[str],
    center_crop: bool = False,
    split: str | None = None,
) -> ImageData:
    """Images of a parquet file, of a data set of the hub or of a built-in one, all with the label 0.

    The labels of the source are not read.

    Args:
        source: a parquet file, a name on the hub or a built-in name, as for `load`.
        shape: (C, H, W) of the result.
        classes: the names of the classes of the model.
        center_crop: how images of another size are fitted to this shape, as for `load`.
        split: name of the split; None: "test", else the only split.

    Raises:
        UserError: there is no such source or split, it has several and none is named, or it has no images.

    Examples:
        >>> from batchkern.data import table_of
        >>> data = table_of("digits", shape=(1, 8, 8), classes=tuple("0123456789"))
        >>> len(data), data.labels.unique().tolist()  # the test split, without its labels
        (359, [0])
    """
    name, splits = open_source(source)
    if split is None:
        if "test" not in splits and len(splits) > 1:
            raise UserError(f"{name}: it has the splits {', '.join(splits)}: name one with split (--split)")
        split = "test" if "test" in splits else next(iter(splits))
    if split not in list(splits):
        raise UserError(f"{name}: no split {split!r}; it has {', '.join(splits)}")
    part = splits[split]
    if not isinstance(part, TensorImages):
        return _streamed(read_images(name, split, part), shape, classes, center_crop)
    data = centre_of(part, shape[1]) if center_crop else part
    return images_of(data.images, shape=shape, classes=classes)


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The given files, and all images in the given folders and the folders below them, sorted by name.

    Args:
        paths: paths of files and of folders.

    Raises:
        UserError: a path does not exist, or a folder has no image.

    Examples:
        >>> from pathlib import Path
        >>> from batchkern.data import find_images
        >>> Path("photos/more").mkdir(parents=True)
        >>> for name in ("b.png", "a.jpg", "notes.txt", "more/c.png"):
        ...     Path("photos", name).touch()
        >>> find_images(["photos"])
        ['photos/a.jpg', 'photos/b.png', 'photos/more/c.png']
    """
    found: list[str] = []
    for path in (os.fspath(path) for path in paths):
        inside = [*image_files(printable(path), path)] if os.path.isdir(path) else [path]
        if not inside:
            raise UserError(f"{printable(path)}: no image in this folder, nor in those below it")
        if not os.path.isfile(inside[0]):
            raise UserError(f"{path!r} is no file or folder")
        found += inside
    return found


def _streamed(cells: Cells, shape: tuple[int, int, int], classes: Sequence[str], center_crop: bool) -> StreamedImages:
    source = cells.decode([0])[0].shape[1:] if len(cells) else None
    cells = replace(cells, channels=shape[0], size=shape[1:], resize=True, crop=center_crop, source=source)
    return StreamedImages(cells, _zeros(len(cells)), classes)


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


class _Given:
    """A list of files and images with the interface of a `datasets.Dataset` and of its `datasets.Image`.

    Files are read here, because `datasets` would treat a path with a scheme as an address, and block on a pipe.
    """

    def __init__(self, images: Sequence[Any]) -> None:
        self._feature = require("datasets", "train").Image()
        kinds = str | os.PathLike | require("PIL.Image", "train").Image
        for place, image in enumerate(images):
            if not isinstance(image, kinds):
                raise UserError(f"images[{place}] must be a path or an image of PIL, not {image!r:.60}")
        self._images = images

    def cells(self) -> Cells:
        return Cells("images", self, "image", self, torch.arange(len(self._images)))

    def __getitem__(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        return {"image": [self._cell(self._images[row]) for row in rows]}

    def _cell(self, image: Any) -> dict[str, Any]:
        return {"path": os.fspath(image)} if isinstance(image, str | os.PathLike) else {"path": None, "image": image}

    def decode_example(self, cell: dict[str, Any]) -> Any:
        if "image" in cell:
            return require("PIL.ImageOps", "train").exif_transpose(cell["image"])  # like datasets for a file
        return self._feature.decode_example({"path": cell["path"], "bytes": read_file(Path(cell["path"]))})
