"""Preprocessing: converts a user's input into the input of a trained model, and names the classes of its logits.

It is written beside the weights, as preprocessing.json. Each kind of data is a dataclass here, whose fields are the
entries of the file besides its format and its kind; :data:`KINDS` maps the kind in the file to the class.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from batchkern._version import __version__
from batchkern.data import (
    HELD_OUT,
    Column,
    DatasetFeed,
    Feed,
    ImageData,
    Labelled,
    TableData,
    Trained,
    feed_of,
    from_tensors,
    images_of,
    load_table,
    load_test,
    table_of,
)
from batchkern.data.sources import held_out
from batchkern.errors import UserError
from batchkern.validation import check_kind, check_standardized

FORMAT = 1
"""The format of the file; raised when the meaning of its contents changes."""


@dataclass(frozen=True)
class ImagePreprocessing:
    """The preprocessing of images. A call makes a batch, with the code that training and its evaluations use.

    Attributes:
        shape: (C, H, W) of the model's images.
        mean, std: (C,) each, of the training images / 255.
        resize: how an image of another size is resized: ``"squeeze"``, to H x W whatever its aspect;
            ``"center-crop"``, its shorter side becomes round(H / 0.875) and the central square is cut out.
        classes: the names of the classes, in the order of the logits.
        model: the model's name for ``batchkern.models.build``; ``None`` if it was a module of the user.
        classifier: the name of its last linear layer, if the user gave one.
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
        _check_classes(self.classes)

    @classmethod
    def of(
        cls, data: ImageData, statistics: tuple[Tensor, Tensor], *, model: str | None, classifier: str | None
    ) -> ImagePreprocessing:
        """The preprocessing of a training on ``data`` with these statistics."""
        crop = data.center_crop and data.shape[1] == data.shape[2]
        resize: Literal["squeeze", "center-crop"] = "center-crop" if crop else "squeeze"
        mean, std = (tuple(numbers.tolist()) for numbers in statistics)
        return cls(data.shape, mean, std, resize, tuple(data.classes), model, classifier)

    def __call__(self, images: Tensor | Sequence[Any]) -> Tensor:
        """float32 (B, C, H, W) on the CPU, ready for the model.

        Args:
            images: uint8 (B, C, H, W), which are not resized if they have the model's height and width; or a list of
                paths and PIL images.

        Raises:
            UserError: they are of another kind, there are none, or one cannot be read; the message names it.
        """
        data = self.data(images)
        return self.feed(data, "cpu").batch(torch.arange(len(data)), None)[0]

    def data(self, images: Tensor | Sequence[Any]) -> ImageData:
        """The images before normalisation, in the form that ``Trainer.predict`` and :func:`feed` take. All labels are
        0."""
        return images_of(images, shape=self.shape, classes=self.classes, center_crop=self._crop)

    def table(self, source: str, split: str | None = None) -> ImageData:
        """The images of a parquet file, a data set of the hub or a built-in one, with or without labels. All labels are
        set to 0."""
        return table_of(source, shape=self.shape, classes=self.classes, center_crop=self._crop, split=split)

    def labelled(self, source: str, split: str | None = None, *, trained: str = "the model") -> ImageData:
        """The images of a source with their labels, see :func:`batchkern.data.load_test`; ``trained`` is the name of
        the training data, for messages."""
        return load_test(source, Trained(trained, self.classes), self.shape, split=split, center_crop=self._crop)

    def feed(self, data: Labelled, device: torch.device | str) -> Feed:
        """Batches of images of this shape, normalised."""
        if not isinstance(data, ImageData):
            raise UserError("the model was trained on uint8 images, but these data are other inputs")
        return Feed(data, mean=_float32(self.mean), std=_float32(self.std), device=device)

    @property
    def _crop(self) -> bool:
        return self.resize == "center-crop"


@dataclass(frozen=True)
class TensorPreprocessing:
    """The preprocessing of other inputs: tensors, which may be standardised, or the rows of a dataset.

    Attributes:
        shape: shape of one input, without the batch; ``None``: an input is more than one tensor.
        mean, std: (C,) each, of the training inputs along dimension 1; ``None``: inputs are not changed.
        classes, model, classifier: as in :class:`ImagePreprocessing`.
    """

    kind: ClassVar[str] = "tensors"

    shape: tuple[int, ...] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    classes: tuple[str, ...]
    model: str | None
    classifier: str | None

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            fits = self.shape and values is not None and len(values) == self.shape[0]
            if (self.mean is None) != (self.std is None) or (values is not None and not fits):
                raise ValueError(f"{name} must be one number for each channel of {self.shape}, not {values!r:.60}")
            if values is not None and not _float64(values).isfinite().all():
                raise ValueError(f"{name} must be finite numbers, not {values!r:.60}")
        if self.std is not None and not (_float64(self.std) > 0).all():
            raise ValueError(f"std must be positive, not {self.std!r:.60}")
        _check_classes(self.classes)

    def __call__(self, inputs: Any) -> Any:
        """The input of the model for inputs ``(B, ...)``."""
        if self.mean is None:
            return inputs
        data = self.data(inputs)
        return self.feed(data, "cpu").batch(torch.arange(len(data)), None)[0]

    def data(self, inputs: Any) -> Labelled:
        """The inputs before standardisation. All labels are 0."""
        made = from_tensors(inputs, torch.zeros(len(inputs), dtype=torch.int64), classes=self.classes, name="inputs")
        if made.shape != self.shape:
            raise UserError(f"inputs are of shape {made.shape}; the model takes {self.shape}")
        return made

    def table(self, source: str, split: str | None = None) -> Labelled:
        raise _no_files()

    def labelled(self, source: str, split: str | None = None, *, trained: str = "the model") -> Labelled:
        raise _no_files()

    def feed(self, data: Labelled, device: torch.device | str) -> Feed | DatasetFeed:
        """Batches of inputs of this shape, standardised."""
        if isinstance(data, ImageData):
            raise UserError("the model was trained on other inputs than uint8 images, which these data are")
        statistics = None if self.mean is None or self.std is None else (_float32(self.mean), _float64(self.std))
        check_standardized("data", data, statistics is not None)
        return feed_of(data, statistics, device=device)


@dataclass(frozen=True)
class TablePreprocessing(TensorPreprocessing):
    """The preprocessing of tables in files.

    Attributes:
        label: the name of the column of labels, which may be missing for predictions.
        columns: the columns of features, and their encoding.
        other: columns that may be present but are not features.
    """

    kind: ClassVar[str] = "table"

    label: str
    columns: tuple[Column, ...]
    other: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape != (sum(column.width for column in self.columns),):
            raise ValueError(f"columns are not those of inputs of shape {self.shape}")

    def __call__(self, inputs: Any) -> Any:
        """float32 (B, features) on the CPU, from the path of a file or from the result of :meth:`data`."""
        check_kind("inputs", inputs, str | os.PathLike | Labelled, "the path of a table")
        data = inputs if isinstance(inputs, Labelled) else self.table(os.fspath(inputs))
        return self.feed(data, "cpu").batch(torch.arange(len(data)), None)[0]

    def table(self, source: str, split: str | None = None) -> Labelled:
        """The rows of a file, with or without labels. All labels are set to 0."""
        _check_no_split(split)
        return self._load(source, labelled=False)

    def labelled(self, source: str, split: str | None = None, *, trained: str = "the model") -> Labelled:
        """The rows of a file with their labels. ``split`` may be ``"held-out"``, the fifth that a training holds
        out."""
        data = self._load(source)
        if split == HELD_OUT:
            return data.select(held_out(data.labels)[1])
        _check_no_split(split)
        if os.path.realpath(source) == os.path.realpath(trained):
            raise UserError(
                f"{source}: the model was trained on it; say by split (--split) {HELD_OUT}, the fifth that a training "
                "without other test data leaves out, or give other data"
            )
        return data

    def _load(self, source: str, labelled: bool = True) -> TableData:
        return load_table(
            source,
            columns=self.columns,
            label=self.label,
            classes=self.classes,
            labelled=labelled,
            other=self.other,
        )


def _check_no_split(split: str | None) -> None:
    if split is not None:
        raise UserError(f"split is {split!r}, but a table has none, other than {HELD_OUT} of one with labels")


def _no_files() -> UserError:
    return UserError(
        "the model was trained on tensors or a dataset in Python, not on files: "
        "batchkern.load_model(run).evaluate(data) takes such data in Python"
    )


def _check_classes(classes: tuple[str, ...]) -> None:
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise ValueError(f"classes must be two different names at least, not {classes!r:.100}")


Preprocessing = ImagePreprocessing | TensorPreprocessing


def preprocessing_of(
    data: Labelled,
    statistics: tuple[Tensor, Tensor] | None,
    *,
    classes: tuple[str, ...],
    model: str | None,
    classifier: str | None,
) -> Preprocessing:
    """The preprocessing of a training on ``data`` with these statistics."""
    if isinstance(data, ImageData):
        assert statistics is not None
        return ImagePreprocessing.of(data, statistics, model=model, classifier=classifier)
    mean, std = (None, None) if statistics is None else (tuple(numbers.tolist()) for numbers in statistics)
    if isinstance(data, TableData):
        return TablePreprocessing(
            data.shape, mean, std, classes, model, classifier, data.label, data.columns, data.other
        )
    return TensorPreprocessing(data.shape, mean, std, classes, model, classifier)


def _float64(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _float32(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


KINDS: dict[str, type[Preprocessing]] = {
    kind.kind: kind for kind in (ImagePreprocessing, TensorPreprocessing, TablePreprocessing)
}


def encoded(preprocessing: Preprocessing) -> bytes:
    """The contents of preprocessing.json."""
    content = {"format": FORMAT, "kind": preprocessing.kind, **asdict(preprocessing)}
    return json.dumps(content, indent=1).encode()


def read(path: Path) -> Preprocessing:
    """Reads preprocessing.json.

    Raises:
        UserError: the file cannot be read, is damaged, or has a format or kind that this version does not read.
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
