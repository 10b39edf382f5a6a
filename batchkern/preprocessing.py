"""What turns a user's input into what a trained model takes, and its logits into the name of a class.

It is written beside the weights, as preprocessing.json. Each kind of data is a dataclass here, whose fields are what
the file has beside its format and its kind: :data:`KINDS` has them by the word that stands for them there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from batchkern._version import __version__
from batchkern.data import Feed, ImageData, Trained, images_of, load_test, table_of
from batchkern.errors import UserError

FORMAT = 1
"""Raised when what the file holds means something else than before."""


@dataclass(frozen=True)
class ImagePreprocessing:
    """Of images. Called, it makes a batch of them, by the code that training and its evaluations use.

    Attributes:
        shape: (C, H, W) that the model takes.
        mean, std: (C,) each, of the training images / 255.
        resize: what becomes of an image of another size: ``"squeeze"``, to H x W whatever its aspect;
            ``"center-crop"``, its shorter side becomes round(H / 0.875) and the central square is cut out.
        classes: the names of the classes, in the order of the logits.
        model: what the model is called by ``batchkern.models.build``; ``None``: it was a module of the user's.
        classifier: the name of its last linear layer, where the user gave one.
    """

    kind: ClassVar[str] = "images"

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Literal["squeeze", "center-crop"]
    classes: tuple[str, ...]
    model: str | None
    classifier: str | None

    def __post_init__(self) -> None:
        channels, height, width = self.shape
        if min(self.shape) < 1:
            raise ValueError(f"shape must be (C, H, W) of images, not {self.shape}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels or not _float32(values).isfinite().all():
                raise ValueError(f"{name} must be {channels} finite numbers, one for each channel, not {values}")
        if not (_float32(self.std) > 0).all():
            raise ValueError(f"std must be positive, not {self.std}")
        if self.resize == "center-crop" and height != width:
            raise ValueError(f"resize must be squeeze, since images of shape {self.shape} are not square")
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be two different names at least, not {self.classes!r:.100}")

    @classmethod
    def of(
        cls, data: ImageData, statistics: tuple[Tensor, Tensor], *, model: str | None, classifier: str | None
    ) -> ImagePreprocessing:
        """Of a training on ``data``, whose statistics these are."""
        crop = data.center_crop and data.shape[1] == data.shape[2]
        resize: Literal["squeeze", "center-crop"] = "center-crop" if crop else "squeeze"
        mean, std = (tuple(numbers.tolist()) for numbers in statistics)
        return cls(data.shape, mean, std, resize, tuple(data.classes), model, classifier)

    def __call__(self, images: Tensor | Sequence[Any]) -> Tensor:
        """float32 (B, C, H, W) on the CPU, ready for the model.

        Args:
            images: uint8 (B, C, H, W), where those of the model's height and width are not resized; or a list of paths
                and images of PIL.

        Raises:
            UserError: they are of another kind, there is none, or one cannot be read, which is named.
        """
        data = self.data(images)
        return self.feed(data, "cpu").batch(torch.arange(len(data)), None)[0]

    def data(self, images: Tensor | Sequence[Any]) -> ImageData:
        """The same images, not normalised yet: what ``Trainer.predict`` and :func:`feed` take. Their labels are 0."""
        return images_of(images, shape=self.shape, classes=self.classes, center_crop=self._crop)

    def table(self, source: str, split: str | None = None) -> ImageData:
        """Those of a parquet file, a data set of the hub or a built-in one, with labels or without. Theirs are 0."""
        return table_of(source, shape=self.shape, classes=self.classes, center_crop=self._crop, split=split)

    def labelled(self, source: str, split: str | None = None, *, trained: str = "the model") -> ImageData:
        """With their labels, as :func:`batchkern.data.load_test` has them; ``trained``: what the model was trained on,
        for messages."""
        return load_test(source, Trained(trained, self.classes), self.shape, split=split, center_crop=self._crop)

    def feed(self, data: ImageData, device: torch.device | str) -> Feed:
        """Batches of images of this shape, normalised."""
        return Feed(data, mean=_float32(self.mean), std=_float32(self.std), device=device)

    @property
    def _crop(self) -> bool:
        return self.resize == "center-crop"


def _float32(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


KINDS = {kind.kind: kind for kind in (ImagePreprocessing,)}


def encoded(preprocessing: ImagePreprocessing) -> bytes:
    """As preprocessing.json has it."""
    content = {"format": FORMAT, "kind": preprocessing.kind, **asdict(preprocessing)}
    return json.dumps(content, indent=1).encode()


def read(path: Path) -> ImagePreprocessing:
    """
    Raises:
        UserError: the file cannot be read, is damaged, or is of a format or kind that is not read here.
    """
    from batchkern import records

    try:
        content = records.read_json(path, records.Preprocessing)
        if content["format"] != FORMAT or content["kind"] not in KINDS:
            raise UserError(
                f"{path} is of format {content['format']} and kind {content['kind']!r:.40}; batchkern {__version__} "
                f"reads format {FORMAT} and {', '.join(KINDS)}"
            )
        return records.made(content, KINDS[content["kind"]])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
