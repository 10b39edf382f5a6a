"""Decoding of the images of a `datasets.Dataset` to uint8 arrays, by a few threads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from batchkern.data.crops import Window, around_centre, random_window
from batchkern.data.labelled import CHUNK
from batchkern.data.wording import printable
from batchkern.errors import UserError, require

# Number of encoded images in memory while only their headers are read.
_HEADERS = 64
# Images with more pixels than this are decoded by threads. Pillow releases the GIL while it decodes and resizes, but
# not while it opens a file. Two threads took 1.4 to 1.7 times as long as one for JPEGs of 32 x 32, 1.1 times at 128 x
# 128, 0.55 to 0.9 times at 256 x 256 (two busy cores).
_LARGE = 128 * 128
Numbers = Sequence[Sequence[float]]
"""The random numbers that `random_window` takes."""
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Cells:
    """The images of one split, not yet decoded.

    Attributes:
        name: the source, for messages.
        dataset: a `datasets.Dataset` whose image column is cast to `Image(decode=False)`.
        column: the name of that column.
        feature: the `datasets.Image` that decodes one cell.
        index: (N,) int64, the row of the data set that each image is (a held-out part has its own), so that
            messages give the row as the file counts it.
        channels: 1 or 3, to which every image is converted; None: as it is in the file.
        size: the (H, W) that every image must have; None: as it is in the file.
        resize: whether an image of another size is resized; otherwise it is an error.
        crop: whether, if `size` is square, the shorter side is resized and the central square cut out; else images
            are resized whatever their aspect.
        source: (H, W) of the first image, as it is in the file; None: not known yet.
    """

    name: str
    dataset: Any
    column: str
    feature: Any
    index: Tensor
    channels: int | None = None
    size: tuple[int, int] | None = None
    resize: bool = False
    crop: bool = False
    source: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def threaded(self) -> bool:
        """Whether images are so large, before or after resizing, that several threads are faster."""
        return max((height * width for height, width in filter(None, (self.source, self.size))), default=0) > _LARGE

    def decode(self, positions: Sequence[int]) -> list[Any]:
        """The images at `positions`: a list of uint8 arrays (C, H, W).

        Raises:
            UserError: an image is missing, cannot be decoded, or has a wrong size; the message names its row and
                file.
        """
        if not self.threaded:
            return list(self.images(positions))
        blocks = _pool().map(lambda block: list(self.images(block)), _blocks(positions))
        return [image for block in blocks for image in block]

    def reading(self, positions: Sequence[int], out: Tensor, numbers: Tensor | None = None) -> Reading:
        """Decodes the images into `out`; with `numbers`, random windows of the images as they are in the file."""
        return Reading(self, positions, out, _listed(numbers, len(positions)))

    def images(self, positions: Sequence[int], numbers: Sequence[Numbers | None] | None = None) -> Iterator[Any]:
        """Like `decode`, but one image after another in this thread."""
        rows = self.index[list(positions)].tolist()
        cells = self.dataset[rows][self.column]
        for row, cell, own in zip(rows, cells, numbers or [None] * len(rows), strict=True):
            yield self._decode_one(row, cell, own)

    def any_colour(self, positions: Tensor) -> bool:
        """Whether any of the images at `positions` (m,) int64 has colour, according to their headers."""
        pillow = require("PIL.Image", "train")
        for chunk in self.index[positions].split(_HEADERS):
            rows = chunk.tolist()
            for row, cell in zip(rows, self.dataset[rows][self.column], strict=True):
                try:
                    source = cell["path"] if cell["bytes"] is None else BytesIO(cell["bytes"])
                    with pillow.open(source) as image:
                        if image.mode not in GREY_MODES:
                            return True
                except Exception as error:
                    raise self._unreadable(row, cell, error) from error
        return False

    def _decode_one(self, row: int, cell: Any, numbers: Numbers | None) -> Any:
        # Pillow's plugins raise various exceptions for a broken file: OSError, SyntaxError, struct.error, ...
        try:
            image = self.feature.decode_example(cell)
            size = (image.height, image.width)
            if self.size is None or self.resize or size == self.size:
                image = converted(image, self.channels)
                return to_array(image if self.size is None else self._fitted(image, self.size, numbers))
        except Exception as error:
            raise self._unreadable(row, cell, error) from error
        raise UserError(
            f"{self.name}: the images are of mixed sizes: row {row} is {size[0]}x{size[1]}, "
            f"but row {int(self.index[0])} is {self.size[0]}x{self.size[1]}; resize them all with image_size "
            f"(--image-size)"
        )

    def _fitted(self, image: Any, size: tuple[int, int], numbers: Numbers | None) -> Any:
        """The window of a PIL image that is used, resized to `size`."""
        if numbers is not None:
            return resized(_cut(image, random_window(numbers, image.height, image.width)), size)
        if self.crop and size[0] == size[1]:
            return _centre(image, size[0])
        return resized(image, size)

    def _unreadable(self, row: int, cell: Any, error: Exception) -> UserError:
        path = (cell or {}).get("path")
        if cell is None:
            reason = "it is missing"
        elif type(error).__name__ == "UnidentifiedImageError":  # its message names an object in memory, not the file
            reason = "its format is unknown"
        else:
            reason = printable(f"{type(error).__name__}: {error}")
        where = f"row {row} ({printable(path)})" if path else f"row {row}"
        return UserError(f"{self.name}: {where} is not a readable image: {reason}")


def converted(image: Any, channels: int | None) -> Any:
    """A PIL image converted to grey or RGB: 1 or 3 `channels`, or its own number if None.

    The own number is 1 for black and white or grey images (without their alpha channel), 3 for all others. Integer
    modes are treated as 16-bit, of which the high byte is kept.
    """
    numpy = require("numpy", "train")
    pillow = require("PIL.Image", "train")
    if image.mode.startswith("I"):
        image = pillow.fromarray((numpy.asarray(image).clip(0, 65535) >> 8).astype(numpy.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; store 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # otherwise Pillow would warn for each image
    grey = channels == 1 or (channels is None and image.mode in GREY_MODES)
    mode = "L" if grey else "RGB"
    return image if image.mode == mode else image.convert(mode)


def resized(image: Any, size: tuple[int, int]) -> Any:
    """A PIL image resized to (H, W). Pillow's bilinear filter is antialiased."""
    if (image.height, image.width) == size:
        return image
    return image.resize((size[1], size[0]), require("PIL.Image", "train").Resampling.BILINEAR)


def _centre(image: Any, size: int) -> Any:
    """The central square of a PIL image, resized."""
    whole, window = around_centre(image.height, image.width, size)
    if max(whole) <= 16 * min(whole):
        return _cut(resized(image, whole), window)
    # A very long image might not fit into memory after resizing, so only the window is resized. Its pixels may differ
    # by rounding from those of the whole image.
    across, down = image.width / whole[1], image.height / whole[0]
    top, left, height, width = window
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    return image.resize((size, size), require("PIL.Image", "train").Resampling.BILINEAR, box=box)


def _cut(image: Any, window: Window) -> Any:
    top, left, height, width = window
    return image.crop((left, top, left + width, top + height))


def to_array(image: Any) -> Any:
    """A grey or RGB PIL image as a uint8 array (C, H, W)."""
    array = require("numpy", "train").asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


class Reading:
    """Images that are being decoded into one tensor. Errors are raised by `result`.

    Args:
        cells: the images, with known channels and size.
        positions: the positions of the images to decode.
        out: uint8 (len(positions), C, H, W) on the CPU, to be filled.
        numbers: for each image the numbers for `random_window`, or None for no random window.
    """

    def __init__(self, cells: Cells, positions: Sequence[int], out: Tensor, numbers: Sequence[Numbers | None]) -> None:
        self.cells, self.positions, self.out, self.numbers = cells, list(positions), out, list(numbers)
        self._process = os.getpid()
        self._dropped = False
        self._blocks: list[Future[None]] = []

    def start(self) -> None:
        """Starts threads, if images are large enough for them; does not wait for them."""
        if self.cells.threaded and not self._blocks:
            parts = map(_blocks, (self.positions, self.out.numpy(), self.numbers))
            self._blocks = [_pool().submit(self._fill, *block) for block in zip(*parts, strict=True)]

    def result(self) -> Tensor:
        """`out`, filled.

        Raises:
            UserError: as for `Cells.decode`, for the first image that cannot be read.
        """
        try:
            self.start()
            if not self.cells.threaded:
                self._fill(self.positions, self.out.numpy(), self.numbers)
            for block in self._blocks:
                block.result()
        except BaseException:  # Ctrl-C, too
            self.drop()
            raise
        return self.out

    def drop(self) -> None:
        """Cancels the decoding: threads stop after their current image."""
        self._dropped = True

    def gives(self, positions: Sequence[int], numbers: Tensor | None) -> bool:
        """Whether it decodes these images; never in a process forked since, which does not have the threads."""
        same = self.positions == list(positions) and self.numbers == _listed(numbers, len(positions))
        return self._process == os.getpid() and same

    def _fill(self, positions: Sequence[int], slots: Any, numbers: Sequence[Numbers | None]) -> None:
        for slot, image in zip(slots, self.cells.images(positions, numbers), strict=True):
            if self._dropped:
                return
            slot[...] = image


def decode_all(cells: Cells, channels: int) -> Tensor:
    """All images of `cells`, which has a size but no channels, as uint8 (N, C, H, W).

    C is `channels`, the expected number, except that it becomes 3 as soon as one image has colour.

    Raises:
        UserError: as `Cells.decode`.
    """
    assert cells.size is not None
    images = torch.empty(len(cells), channels, *cells.size, dtype=torch.uint8)
    step = max(1, min(1024, CHUNK // images[:1].numel()))
    for start in range(0, len(cells), step):
        decoded = cells.decode(range(start, min(start + step, len(cells))))
        if images.shape[1] == 1 and any(len(image) == 3 for image in decoded):
            images = images.expand(-1, 3, -1, -1).contiguous()
        for slot, image in zip(images[start:].numpy(), decoded, strict=False):
            slot[...] = image  # a grey image is repeated over three channels
    return images


def _listed(numbers: Tensor | None, count: int) -> list[Numbers | None]:
    """The numbers of each of `count` images."""
    return [None] * count if numbers is None else numbers.tolist()


def _blocks(rows: Any) -> list[Any]:
    """A sequence or an array in pieces for the threads, a few per thread."""
    step = -(-len(rows) // (4 * _threads())) or 1
    return [rows[i : i + step] for i in range(0, len(rows), step)]


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), thread_name_prefix="batchkern-decode")


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    # A forked child does not have its parent's threads: tasks in that pool would never run.
    os.register_at_fork(after_in_child=_pool.cache_clear)
