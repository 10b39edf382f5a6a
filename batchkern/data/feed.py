"""Batches of a data set, ready for the model: on the device, augmented and normalised."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from batchkern.data.crops import random_window, resized_windows, window_numbers
from batchkern.data.decode import Reading
from batchkern.data.images import ImageData, StreamedImages, TensorImages
from batchkern.data.tensors import TensorData
from batchkern.errors import UserError
from batchkern.seeding import checked_seed

# Size in bytes of the largest block that the C library (glibc) keeps for reuse when it is freed.
_KEPT_BY_MALLOC = 1 << 25

AUGMENTATIONS = ("none", "flip", "crop", "crop+flip", "resized-crop", "resized-crop+flip")


class Feed:
    """Returns batches of `data` on `device`.

    Data in memory are copied to the device once, images as uint8, and batches are built there. Streamed images are
    decoded on the CPU and copied batch by batch; the next batch may be decoded ahead (`prepare`).

    Args:
        data: images, or other inputs in memory.
        mean, std: (C,) each, of images / 255 or of other inputs (`Labelled.statistics` of the training set); None, for
            inputs that are not images: no normalisation.
        device: the device of the batches.
        augment: "none"; "flip": left and right, every second image on average; "crop": a random window of the
            image's size from the image padded on every side with an eighth of its size in black (4 pixels at
            32); "crop+flip": both, as in the CIFAR papers; "resized-crop": a random window of 0.08 to 1 of the
            image's area and with an aspect of 3/4 to 4/3, resized (`crops.random_window`); for streamed images it is
            cut from the image in the file; "resized-crop+flip": both, as in ImageNet papers.
        seed: seed of the augmentation.

    Raises:
        UserError: unknown `augment`, or one that does not fit these inputs; `seed` is not a whole number; or a
            statistic is not of shape (C,).

    Examples:
        >>> import torch
        >>> from batchkern.data import Feed, TensorImages
        >>> pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
        >>> data = TensorImages(pixels, torch.tensor([0, 1]), ["black", "white"], name="squares")
        >>> feed = Feed(data, mean=torch.tensor([0.5]), std=torch.tensor([0.5]), device="cpu")
        >>> images, labels = feed.batch(torch.tensor([1, 0]), None)
        >>> images[:, 0, 0, 0].tolist(), labels.tolist()
        ([1.0, -1.0], [1, 0])
    """

    def __init__(
        self,
        data: ImageData | TensorData,
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        device: torch.device | str,
        augment: str = "none",
        seed: int = 0,
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise UserError(f"augment must be one of {', '.join(AUGMENTATIONS)}, not {augment!r}")
        _check_augmentation(data, augment)
        for name, value in (("mean", mean), ("std", std)):
            shape = None if value is None else tuple(value.shape)
            if shape != data.shape[:1] and (shape is not None or isinstance(data, ImageData)):
                raise UserError(f"{name} must be of shape ({data.shape[0]},), one per channel, not {shape}")
        self.data = data
        self.device = torch.device(device)
        self.augment = augment
        self._kinds = augment.split("+")
        self.seed = checked_seed(seed)
        self.depth = 1
        """The number of batches that are decoded ahead."""
        # (pixel / 255 - mean) / std = pixel * scale + shift
        self._scale = self._shift = None
        if mean is not None and std is not None:
            wide = (-1, *(1 for _ in data.shape[1:]))
            if isinstance(data, ImageData):
                self._scale = (1 / (255 * std.double())).float().view(wide).to(self.device)
                self._shift = (-mean.double() / std.double()).float().view(wide).to(self.device)
            else:  # in float64, since float32 would lose most digits of, for example, a date in seconds
                self._scale, self._shift = (x.double().view(wide).to(self.device) for x in (std, mean))
        self._labels = data.labels.to(self.device)
        self._images: Tensor | None = None
        if isinstance(data, TensorData | TensorImages):
            self._images = (data.inputs if isinstance(data, TensorData) else data.images).to(self.device)
        self._ahead: list[Reading] = []
        self._memory = _Memory()

    def prepare(self, indices: Tensor, step: int | None, positions: Tensor | None = None) -> None:
        """Announces the next batch, with the arguments of `batch`: if images are streamed, threads decode it ahead.

        Small images are left to `batch`, since most of their time is spent in Python, where only one thread runs at a
        time. This is only a hint: without it, or with a wrong one, `batch` returns the same, only later. Errors of
        images are raised by `batch`. The last two hints are kept, so that the next batch may be announced before the
        current one is read: it is decoded while the current one is converted to floats.
        """
        if isinstance(self.data, StreamedImages) and self.data.cells.threaded:
            numbers, rows = self._window_numbers(len(indices), step, positions), _chosen(indices, positions)
            if any(ahead.gives(rows.tolist(), numbers) for ahead in self._ahead):
                return
            for old in self._ahead[:-1]:
                old.drop()
            self._ahead = [*self._ahead[-1:], self._reading(rows, numbers)]
            self._ahead[-1].start()

    def forget(self) -> None:
        """Cancels prepared batches, and frees the memory kept for the next batch."""
        self._memory = _Memory()
        for ahead in self._ahead:
            ahead.drop()
        self._ahead = []

    def batch(self, indices: Tensor, step: int | None, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The images at `indices` (b,) int64, on any device, repeats allowed.

        Args:
            step: the number of the update that the batch is for. The augmentation is a pure function of
                (seed, step) and the position in the batch, the same on every device, so a resumed run gets
                the same images as an uninterrupted one. None: no augmentation, as for evaluation.
            positions: (p,) int64: return only these rows, as they are in the whole batch. None: all.

        Returns:
            float32 (b, C, H, W) normalised images, or inputs (b, ...), and int64 labels (b, ...), both on the device; p
            of each with `positions`.
        """
        whole, numbers = len(indices), self._window_numbers(len(indices), step, positions)
        indices = _chosen(indices, positions)
        on_device = indices.to(self.device)
        if isinstance(self.data, StreamedImages):
            images = self._read(indices, numbers).to(self.device, non_blocking=True)
        else:
            images = self._held(on_device)
            if numbers is not None:
                images = resized_windows(images, [random_window(own, *images.shape[2:]) for own in numbers.tolist()])
        if step is not None and {"flip", "crop"} & set(self._kinds):
            images = self._augmented(images, step, whole, positions)
        return self._normalised(images), self._labels.index_select(0, on_device)

    def _normalised(self, images: Tensor) -> Tensor:
        """uint8 (b, C, H, W) or inputs (b, C, ...) -> float32, on the device; unchanged without statistics."""
        if self._scale is None or self._shift is None:
            return images
        if self._scale.dtype == torch.float64:
            return ((images.double() - self._shift) / self._scale).float()
        if self.device.type != "cpu" or images.numel() * 4 <= _KEPT_BY_MALLOC:
            return images.float().mul_(self._scale).add_(self._shift)
        # NumPy, in this thread only: torch's threads would wait for each other while other threads decode.
        out, scale, shift = self._memory.tensor(images.shape), self._scale.numpy(), self._shift.numpy()
        for slot, image in zip(out.numpy(), images.numpy(), strict=True):  # a single image stays in the cache
            np.multiply(image, scale, out=slot)
            slot += shift
        return out

    def _held(self, indices: Tensor) -> Tensor:
        """Rows of inputs that are not streamed, on the device."""
        if self._images is not None:
            return self._images.index_select(0, indices)
        assert isinstance(self.data, ImageData)
        return self.data.rows(indices.cpu()).to(self.device)

    def _read(self, indices: Tensor, numbers: Tensor | None) -> Tensor:
        """Streamed images as uint8 (b, C, H, W) on the CPU, pinned for a GPU; from a prepared batch if there is one."""
        rows = indices.tolist()
        while self._ahead:
            ahead = self._ahead.pop(0)
            if ahead.gives(rows, numbers):
                return ahead.result()
            ahead.drop()
        return self._reading(indices, numbers).result()

    def _reading(self, indices: Tensor, numbers: Tensor | None) -> Reading:
        assert isinstance(self.data, StreamedImages)
        return self.data.reading(indices.cpu(), numbers, pinned=self.device.type == "cuda")

    def _window_numbers(self, whole: int, step: int | None, positions: Tensor | None) -> Tensor | None:
        """The numbers for random windows of the rows at `positions` of a batch of `whole` rows; None without
        windows."""
        if step is None or "resized-crop" not in self._kinds:
            return None
        numbers = window_numbers(self.seed, step, whole)
        return numbers if positions is None else numbers[positions.cpu()]

    def _augmented(self, images: Tensor, step: int, whole: int, positions: Tensor | None) -> Tensor:
        """uint8 (b, C, H, W) images, flipped and, with "crop", cut out by one gather over the padded pixels."""
        # Drawn on the CPU for every device: a GPU's generator would give other numbers.
        generator = torch.Generator().manual_seed(_key(self.seed, step))

        def own(drawn: Tensor) -> Tensor:
            """The part of numbers drawn for the whole batch that belongs to these rows."""
            return (drawn if positions is None else drawn[positions]).to(self.device)

        flipped = torch.zeros(whole, 1, dtype=torch.bool)
        if "flip" in self._kinds:
            flipped = torch.rand(whole, 1, generator=generator, dtype=torch.float32) < 0.5
        if "crop" not in self._kinds:
            return torch.where(own(flipped)[:, :, None, None], images.flip(3), images)
        count, channels, height, width = images.shape
        x = torch.arange(width, device=self.device).expand(count, -1)
        x = torch.where(own(flipped), x.flip(1), x)
        pad_y, pad_x = max(1, height // 8), max(1, width // 8)
        top = own(torch.randint(2 * pad_y + 1, (whole, 1), generator=generator))
        y = torch.arange(height, device=self.device) + top
        x = x + own(torch.randint(2 * pad_x + 1, (whole, 1), generator=generator))
        images = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
        pixels = (y[:, :, None] * images.shape[3] + x[:, None, :]).view(count, 1, -1).expand(-1, channels, -1)
        return images.flatten(2).gather(2, pixels).view(count, channels, height, width)


def _check_augmentation(data: ImageData | TensorData, augment: str) -> None:
    if augment == "none" or isinstance(data, ImageData):
        return
    if len(data.shape) != 3 or not data.inputs.is_floating_point():
        raise UserError(f"augment is {augment}, but inputs are {data.inputs.dtype} of shape {data.shape}, no images")
    if data.labels.dim() > 1:
        raise UserError(f"augment is {augment}, but labels are masks, which would stay where they are: give none")
    if "resized" in augment:
        raise UserError(f"augment is {augment}, which is for uint8 images; inputs are float32: give crop+flip, or less")


class _Memory:
    """Reuses the memory of large batches that are no longer referenced.

    The first access to new pages takes several times as long as the arithmetic on them.
    """

    def __init__(self) -> None:
        self._lent: list[tuple[Tensor, weakref.ref[Any]]] = []

    def tensor(self, shape: torch.Size) -> Tensor:
        """An uninitialised float32 tensor. At most two are kept: the last batch and the one that replaces it."""
        free = [memory for memory, borrower in self._lent if borrower() is None and memory.shape == shape]
        memory = free[0] if free else torch.empty(shape, dtype=torch.float32)
        view = memory.numpy()[...]  # lives as long as the storage of any tensor that shares it
        lent = [(other, borrower) for other, borrower in self._lent if borrower() is not None]
        self._lent = [*lent[-1:], (memory, weakref.ref(view))]
        return torch.from_numpy(view)


def _chosen(indices: Tensor, positions: Tensor | None) -> Tensor:
    return indices if positions is None else indices[positions.to(indices.device)]


def _key(seed: int, step: int) -> int:
    """A generator seed; hashed, so that neighbouring seeds and steps do not share streams."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=7).digest(), "little")
