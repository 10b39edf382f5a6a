"""Crops of images: the centre for evaluation, a random window for training (C. Szegedy et al., "Going Deeper with
Convolutions", CVPR 2015, section 6), by the rules of torchvision's Resize and CenterCrop, and of its RandomResizedCrop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from batchkern.seeding import generator

_INSIDE = 0.875  # side of the central square, as a fraction of the image's shorter side: 224 of 256
_SCALE = (0.08, 1.0)  # area of a random window, as a fraction of the image's area
_ASPECT = (3 / 4, 4 / 3)  # width / height of a random window
_TRIES = 10


class Window(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def around_centre(height: int, width: int, size: int) -> tuple[tuple[int, int], Window]:
    """The (height, width) to which an image is resized so that its shorter side is round(size / 0.875), and the central
    window of size x size pixels in the resized image."""
    shorter = round(size / _INSIDE)
    longer = int(shorter * max(height, width) / min(height, width))
    resized = (longer, shorter) if width <= height else (shorter, longer)
    top, left = (round((side - size) / 2) for side in resized)
    return resized, Window(top, left, size, size)


def window_numbers(seed: int, step: int, count: int) -> Tensor:
    """Random numbers for :func:`random_window`, for each image of a batch: (count, 10, 4) float64 in [0, 1), on the
    CPU."""
    return torch.rand(count, _TRIES, 4, generator=generator(seed, "window", step), dtype=torch.float64)


def random_window(numbers: Sequence[Sequence[float]], height: int, width: int) -> Window:
    """A random window of the image: its area is uniform in 0.08 to 1 of the image's, the logarithm of its aspect
    uniform between those of 3/4 and 4/3. If none of ten windows fits, it is the largest central window with the nearest
    aspect.

    Args:
        numbers: ten tries of four numbers in [0, 1): area, aspect, top, left.
        height, width: size of the image.
    """
    for area, aspect, top, left in numbers:
        pixels = height * width * (_SCALE[0] + area * (_SCALE[1] - _SCALE[0]))
        ratio = _ASPECT[0] * (_ASPECT[1] / _ASPECT[0]) ** aspect
        h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < h <= height and 0 < w <= width:
            return Window(int(top * (height - h + 1)), int(left * (width - w + 1)), h, w)
    h, w = height, width
    if width / height < _ASPECT[0]:
        h = round(width / _ASPECT[0])
    elif width / height > _ASPECT[1]:
        w = round(height * _ASPECT[1])
    return Window((height - h) // 2, (width - w) // 2, h, w)


def resized_windows(images: Tensor, windows: Sequence[Window]) -> Tensor:
    """The window of each image of uint8 (b, C, H, W), enlarged to (H, W): bilinear, equal to Pillow's result to within
    one grey level (Pillow rounds between the two directions)."""
    top, left, high, wide = torch.tensor(windows).view(-1, 4).to(images.device).unbind(1)
    rows = _weights(top, high, images.shape[2])[:, None]
    columns = _weights(left, wide, images.shape[3])[:, None]
    # In float64 the order of a sum does not change the result, so a row is the same in any part of its batch.
    return (rows @ images.double() @ columns.mT).round_().clamp_(0, 255).to(torch.uint8)


def _weights(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Weights that resize pixels `start` to `start + length` to `size` pixels: float64 (b, to, from), with rows of sum
    1.

    Each new pixel has a triangle of weights around its place, cut off at the ends of the window. The triangle is one
    pixel wide on either side: a window is never reduced, so no antialiasing is needed.
    """
    start, length = start.double()[:, None, None], length.double()[:, None, None]
    places = torch.arange(size, device=start.device, dtype=torch.float64) + 0.5
    distance = (places - (start + places[:, None] * length / size)).abs()
    inside = (places > start) & (places < start + length)
    weights = (1 - distance).clamp(min=0) * inside
    return weights / weights.sum(2, keepdim=True)
