"""Labelled images in memory, or decoded when their batch is needed, with one interface."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from batchkern.data.crops import around_centre
from batchkern.data.labelled import CHUNK, Labelled, checked_classes
from batchkern.errors import UserError, whole

if TYPE_CHECKING:
    from typing_extensions import Self

    from batchkern.data.decode import Cells, Reading

# Streamed data are too large to be read an additional time: statistics and the number of channels come from this many
# of their rows, evenly spaced.
SAMPLE = 4096


def sample_rows(count: int) -> Tensor:
    """At most `SAMPLE` of `count` row indices, evenly spaced: (m,) int64."""
    size = min(count, SAMPLE)
    return torch.arange(size) * count // max(size, 1)


class ImageData(Labelled):
    """N labelled images of one shape.

    Attributes:
        labels: (N,) int64 on the CPU, each in 0..len(classes)-1.
        shape: (C, H, W) of every image; C is 1 (grey) or 3 (RGB).
        center_crop: whether images of another size were cropped to their central square (`load`), and not squeezed.
    """

    labels: Tensor
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    center_crop: bool = False

    def __init__(self, labels: Tensor, classes: Sequence[str], shape: tuple[int, int, int], name: str) -> None:
        if len(labels) == 0 or 0 in shape:
            raise UserError(f"{name}: {len(labels)} images of shape {shape} have no pixel; at least one is needed")
        self.name = name
        self.labels = labels.contiguous()
        self.classes = checked_classes(name, classes)
        self.shape = shape

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{type(self).__name__}({self.name!r}, {len(self)} images {size}, {len(self.classes)} classes)"

    @abstractmethod
    def rows(self, indices: Tensor) -> Tensor:
        """The images at `indices` (b,) int64 on the CPU, repeats allowed: uint8 (b, C, H, W) on the CPU."""

    @abstractmethod
    def reshaped(self, shape: tuple[int, int, int]) -> ImageData:
        """The images, colour-converted and resized to `shape`; see `match_shape`."""

    def select(self, positions: Tensor) -> Self:
        part = super().select(positions)
        part.center_crop = self.center_crop
        return part

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of images / 255: two (C,) float32 tensors.

        All images in memory are used; of streamed images, at most 4096, evenly spaced and always the same. The
        deviation is at least 1/255, one grey level, so that a constant channel can be divided by it.
        """
        indices = self._statistics_rows()
        channels, height, width = self.shape
        # Sums of integers are exact, so the result does not depend on the chunks or the order.
        total = torch.zeros(channels, dtype=torch.int64)
        squares = torch.zeros(channels, dtype=torch.int64)
        for chunk in indices.split(max(1, CHUNK // (channels * height * width))):
            pixels = self.rows(chunk).to(torch.int32)
            total += pixels.sum(dim=(0, 2, 3))
            squares += pixels.square_().sum(dim=(0, 2, 3))
        count = len(indices) * height * width
        mean = total.double() / count
        variance = (squares.double() / count - mean.square()).clamp_(min=0)
        return (mean / 255).float(), (variance.sqrt() / 255).clamp_(min=1 / 255).float()

    def _statistics_rows(self) -> Tensor:
        return torch.arange(len(self))


class TensorImages(ImageData):
    """Images held decoded in memory.

    Args:
        images: (N, C, H, W) uint8 on the CPU, C = 1 or 3.
        labels: (N,) int64 on the CPU.
        classes: the name of each class.
        name: the source, for messages.

    Raises:
        UserError: the tensors are not of these shapes and types, or have no rows; there are not two classes of
            different names; or a label is not in 0..len(classes)-1.

    Examples:
        >>> import torch
        >>> from batchkern.data import TensorImages
        >>> images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
        >>> data = TensorImages(images, torch.tensor([0, 1]), ["black", "white"], name="squares")
        >>> mean, std = data.statistics()
        >>> mean.tolist(), std.tolist()  # of the pixels / 255
        ([0.5], [0.5])
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str], *, name: str) -> None:
        for argument, value in (("images", images), ("labels", labels)):
            if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
                raise UserError(f"{argument} must be a dense tensor on the CPU, not {_described(value)}")
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"images must be uint8 (N, C, H, W) with C = 1 or 3, not {images.dtype} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise UserError(f"labels must be int64 ({len(images)},), not {labels.dtype} {tuple(labels.shape)}")
        super().__init__(labels, classes, (images.shape[1], images.shape[2], images.shape[3]), name)
        wrong = ((labels < 0) | (labels >= len(self.classes))).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise UserError(f"labels[{row}] is {int(labels[row])}; it must be in 0..{len(self.classes) - 1}")
        self.images = images

    def rows(self, indices: Tensor) -> Tensor:
        return self.images.index_select(0, indices)

    def _selected(self, positions: Tensor) -> TensorImages:
        return TensorImages(self.images[positions], self.labels[positions], self.classes, name=self.name)

    def reshaped(self, shape: tuple[int, int, int]) -> TensorImages:
        if shape == self.shape:
            return self
        images = torch.empty(len(self), *shape, dtype=torch.uint8)
        step = max(1, CHUNK // self.images[:1].numel())
        for out, chunk in zip(images.split(step), self.images.split(step), strict=True):
            out.copy_(_reshape(chunk, shape))
        return TensorImages(images, self.labels, self.classes, name=self.name)


class StreamedImages(ImageData):
    """Images that are decoded by a few threads when their batch is needed; only the labels are in memory.

    A `Feed` can decode the next batch ahead if it is announced by `Feed.prepare`; it is not announced automatically,
    since the next batch may depend on the losses of the current one.

    Args:
        cells: the undecoded images, with the channels and the size to which they are converted.
        labels, classes: as for `ImageData`.

    Examples:
        >>> import torch
        >>> from pathlib import Path
        >>> from batchkern.data import StreamedImages, load
        >>> from PIL import Image
        >>> for name, grey in (("black", 0), ("white", 255)):
        ...     Path(name).mkdir()
        ...     Image.new("L", (8, 8), grey).save(f"{name}/0.png")
        >>> data = load(".", memory_limit=0)  # nothing is held in memory
        >>> isinstance(data, StreamedImages), data.classes, data.rows(torch.tensor([1])).unique().tolist()
        (True, ('black', 'white'), [255])
    """

    def __init__(self, cells: Cells, labels: Tensor, classes: Sequence[str]) -> None:
        assert cells.channels is not None
        assert cells.size is not None
        super().__init__(labels, classes, (cells.channels, *cells.size), cells.name)
        self.cells = cells

    def rows(self, indices: Tensor) -> Tensor:
        """As `ImageData.rows`.

        Raises:
            UserError: an image cannot be decoded, or its size differs from that of the first one and no size was given;
                the message names its row and file.
        """
        return self.reading(indices).result()

    def reading(self, indices: Tensor, numbers: Tensor | None = None, *, pinned: bool = False) -> Reading:
        """A `Reading` that decodes the images at `indices` (b,) int64 on the CPU, into pinned memory if `pinned`.

        With `numbers` (`crops.window_numbers`), it reads a random window of each image in the file, resized.
        """
        out = torch.empty(len(indices), *self.shape, dtype=torch.uint8, pin_memory=pinned)
        return self.cells.reading(indices.tolist(), out, numbers)

    def _selected(self, positions: Tensor) -> StreamedImages:
        cells = replace(self.cells, index=self.cells.index[positions])
        return StreamedImages(cells, self.labels[positions], self.classes)

    def reshaped(self, shape: tuple[int, int, int]) -> StreamedImages:
        if shape == self.shape:
            return self
        resize = self.cells.resize or shape[1:] != self.shape[1:]
        cells = replace(self.cells, channels=shape[0], size=shape[1:], resize=resize)
        return StreamedImages(cells, self.labels, self.classes)

    def _statistics_rows(self) -> Tensor:
        return sample_rows(len(self))


def match_shape(data: ImageData, shape: tuple[int, int, int]) -> ImageData:
    """`data` as images of `shape` (C, H, W), so that a model built for that shape can use them.

    RGB becomes grey by its luminance (ITU-R 601: 0.299, 0.587, 0.114), grey becomes RGB by repeating it. Then the
    images are resized, bilinear with antialiasing, whatever their aspect. Streamed images with `center_crop` (`load`)
    are instead cropped at the new size, if it is square. The result is `data` itself if it already has this shape.

    Args:
        data: images of any one shape.
        shape: (C, H, W): C is 1 or 3, H and W are at least 1.

    Raises:
        UserError: C is not 1 or 3, or H or W is not positive.

    Examples:
        >>> import torch
        >>> from batchkern.data import TensorImages, match_shape
        >>> images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
        >>> data = TensorImages(images, torch.tensor([0, 1]), ["black", "white"], name="squares")
        >>> large = match_shape(data, (3, 16, 16))
        >>> large.shape, large.rows(torch.tensor([1])).unique().tolist()
        ((3, 16, 16), [255])
    """
    numbers = tuple(map(whole, shape)) if isinstance(shape, Iterable) else ()
    match numbers:
        case (1 | 3 as channels, int(height), int(width)) if min(height, width) >= 1:
            matching = data.reshaped((channels, height, width))
        case _:
            raise UserError(f"shape must be (C, H, W) with C = 1 or 3 and H, W >= 1, not {shape!r}")
    matching.clean_labels, matching.center_crop = data.clean_labels, data.center_crop
    return matching


def centre_of(data: TensorImages, size: int) -> TensorImages:
    """The central size x size pixels of each image, after its shorter side is resized to round(size / 0.875)."""
    (height, width), (top, left, _, _) = around_centre(*data.shape[1:], size)
    images = data.reshaped((data.shape[0], height, width)).images[:, :, top : top + size, left : left + size]
    return TensorImages(images.contiguous(), data.labels, data.classes, name=data.name)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"one of layout {value.layout} on {value.device}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _reshape(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """uint8 (b, C, H, W) -> uint8 (b, *shape)."""
    channels, height, width = shape
    if channels == 1 and images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float32)
        images = torch.einsum("bchw,c->bhw", images.float(), weights).round_().to(torch.uint8)[:, None]
    if images.shape[2:] != (height, width):
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return images.expand(-1, channels, -1, -1)
