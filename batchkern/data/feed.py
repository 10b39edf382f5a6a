"""Batches of a data set as the model takes them: on the device, augmented and normalised."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from batchkern.data.images import ImageData, TensorImages
from batchkern.errors import UserError
from batchkern.seeding import checked_seed

AUGMENTATIONS = ("none", "flip", "crop", "crop+flip")


class Feed:
    """Hands out batches of `data` on `device`.

    Images in memory are copied to the device once, as uint8, and every batch is made there; streamed ones are
    decoded on the CPU and copied batch by batch.

    Args:
        data: the images.
        mean, std: (C,) each, of images / 255 (`ImageData.statistics` of the training set).
        device: where the batches are to be.
        augment: "none"; "flip": left and right, every second image on average; "crop": a random window of the
            image's size from the image padded on every side with an eighth of its size in black (4 pixels at
            32); "crop+flip": both, as the CIFAR papers do.
        seed: of the augmentation.

    Raises:
        UserError: unknown `augment`, `seed` is no whole number, or `mean` or `std` is not of shape (C,).
    """

    def __init__(
        self,
        data: ImageData,
        *,
        mean: Tensor,
        std: Tensor,
        device: torch.device | str,
        augment: str = "none",
        seed: int = 0,
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise UserError(f"augment must be one of {', '.join(AUGMENTATIONS)}, not {augment!r}")
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != data.shape[:1]:
                raise UserError(
                    f"{name} must be of shape ({data.shape[0]},), one per channel, not {tuple(value.shape)}"
                )
        self.data = data
        self.device = torch.device(device)
        self.augment = augment
        self.seed = checked_seed(seed)
        # (pixel / 255 - mean) / std = pixel * scale + shift
        self._scale = (1 / (255 * std.double())).float().view(-1, 1, 1).to(self.device)
        self._shift = (-mean.double() / std.double()).float().view(-1, 1, 1).to(self.device)
        self._labels = data.labels.to(self.device)
        self._images = data.images.to(self.device) if isinstance(data, TensorImages) else None

    def batch(self, indices: Tensor, step: int | None, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The images at `indices` (b,) int64, on any device, repeats allowed.

        Args:
            step: the number of the update that the batch is for. The augmentation is a pure function of
                (seed, step) and the position in the batch, the same on every device, so that a resumed run
                draws what an uninterrupted one would. None: no augmentation, as for evaluation.
            positions: (p,) int64: make only these rows of the batch, as they are in the whole. None: all.

        Returns:
            float32 (b, C, H, W) normalised images, and int64 (b,) labels, both on the device; p of each with
            `positions`.
        """
        whole = len(indices)
        if positions is not None:
            indices = indices[positions.to(indices.device)]
        on_device = indices.to(self.device)
        if self._images is not None:
            images = self._images.index_select(0, on_device)
        else:
            images = self.data.rows(indices.cpu())
            if self.device.type == "cuda":
                images = images.pin_memory()
            images = images.to(self.device, non_blocking=True)
        if step is not None and self.augment != "none":
            images = self._augmented(images, step, whole, positions)
        return images.float().mul_(self._scale).add_(self._shift), self._labels.index_select(0, on_device)

    def _augmented(self, images: Tensor, step: int, whole: int, positions: Tensor | None) -> Tensor:
        """uint8 (b, C, H, W) -> the same: one gather over the padded pixels, a window for each image."""
        count, channels, height, width = images.shape
        # Drawn on the CPU, whatever the device: a GPU's generator would give other numbers.
        generator = torch.Generator().manual_seed(_key(self.seed, step))

        def own(drawn: Tensor) -> Tensor:
            """Of numbers drawn for the whole batch, those of the rows that are made."""
            return (drawn if positions is None else drawn[positions]).to(self.device)

        y = torch.arange(height, device=self.device).expand(count, -1)
        x = torch.arange(width, device=self.device).expand(count, -1)
        if "flip" in self.augment:
            flipped = torch.rand(whole, 1, generator=generator, dtype=torch.float32) < 0.5
            x = torch.where(own(flipped), x.flip(1), x)
        if "crop" in self.augment:
            pad_y, pad_x = max(1, height // 8), max(1, width // 8)
            y = y + own(torch.randint(2 * pad_y + 1, (whole, 1), generator=generator))
            x = x + own(torch.randint(2 * pad_x + 1, (whole, 1), generator=generator))
            images = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
        pixels = (y[:, :, None] * images.shape[3] + x[:, None, :]).view(count, 1, -1).expand(-1, channels, -1)
        return images.flatten(2).gather(2, pixels).view(count, channels, height, width)


def _key(seed: int, step: int) -> int:
    """A generator seed; hashed, so that neighbouring seeds and steps do not share streams."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=7).digest(), "little")
