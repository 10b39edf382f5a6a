"""Data in tensors of inputs and labels: tables, sequences of tokens, images of any type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchkern.data.images import ImageData, TensorImages
from batchkern.data.labelled import Labelled, check_labels, checked_classes
from batchkern.errors import UserError


class TensorData(Labelled):
    """Inputs in memory, passed to the model unchanged or standardised; see `from_tensors`.

    Args:
        inputs: ``(N, ...)``, held on the CPU.
        labels: ``(N,)`` int64, each in 0..len(classes)-1; or masks ``(N, *places)`` of them, in which -100 is ignored.
        classes: the name of each class.
        name: the source, for messages.
        standardize: give each feature or channel, an index of dimension 1, mean 0 and deviation 1 in the training set.

    Examples:
        >>> import torch
        >>> from batchkern.data import TensorData
        >>> inputs = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> data = TensorData(inputs, torch.tensor([0, 1]), ["cat", "dog"], name="pets")
        >>> data.select(torch.tensor([1])).inputs.tolist()
        [[2.0, 3.0]]
    """

    labels: Tensor
    classes: tuple[str, ...]
    shape: tuple[int, ...]

    def __init__(
        self, inputs: Tensor, labels: Tensor, classes: Sequence[str], *, name: str, standardize: bool = False
    ) -> None:
        self.name = name
        self.inputs = inputs
        self.labels = labels
        self.classes = checked_classes(name, classes)
        self.shape = tuple(inputs.shape[1:])
        self.standardize = standardize

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"TensorData({self.name!r}, {len(self)} inputs {size} {self.inputs.dtype}, {len(self.classes)} classes)"

    def _selected(self, positions: Tensor) -> TensorData:
        return TensorData(
            self.inputs[positions],
            self.labels[positions],
            self.classes,
            name=self.name,
            standardize=self.standardize,
        )

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation for each index of dimension 1, a feature or a channel: two (C,) float64 tensors.

        The deviation of a constant feature is set to 1.
        """
        if not self.standardize:
            return None
        rows = self.inputs.transpose(0, 1).flatten(1).double()
        deviation = rows.std(1, correction=0)
        constant = deviation <= 1e-12 * rows.abs().amax(1)
        return rows.mean(1), deviation.masked_fill(constant, 1.0)


def from_tensors(
    inputs: Any, labels: Any, *, classes: Sequence[str] | None = None, name: str = "tensors", standardize: bool = False
) -> TensorData | ImageData:
    """Data from a pair of tensors or arrays.

    Args:
        inputs: ``(N, ...)`` of any numbers. Floats become float32, after standardisation if there is one. Whole
            numbers, such as tokens, stay as they are, except uint8 ``(N, C, H, W)``, which are images: each channel is
            standardised, and with C = 1 or 3 the result is `ImageData`, as from `load`.
        labels: ``(N,)`` whole numbers in 0..C-1; or masks ``(N, *places)`` of them, for a model whose logits are ``(N,
            C, *places)``; places with -100 are ignored.
        classes: the names of the classes; default: "0", "1", ... up to the highest label.
        standardize: give each feature or channel, an index of dimension 1, mean 0 and deviation 1 in the training set.
        name: the name in messages.

    Raises:
        UserError: they are not dense tensors with the same number of rows, are empty, hold a number that is not finite,
            or a label is out of range.

    Examples:
        >>> import torch
        >>> from batchkern.data import from_tensors
        >>> data = from_tensors(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([0, 1]), classes=["cat", "dog"])
        >>> len(data), data.shape, data.classes
        (2, (2,), ('cat', 'dog'))
    """
    inputs, labels = _tensor("inputs", inputs), _tensor("labels", labels)
    if inputs.dim() < 2 or len(inputs) == 0 or inputs.numel() == 0:
        raise UserError(f"{name}: inputs must be of shape (N, ...) with at least one number, got {tuple(inputs.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dim() == 0 or len(labels) != len(inputs):
        raise UserError(
            f"{name}: labels must be whole numbers of shape ({len(inputs)},), or masks of them, got {labels.dtype} of "
            f"shape {tuple(labels.shape)}"
        )
    labels = labels.to(torch.int64).contiguous()
    highest = int(labels.max())
    if classes is None and highest >= labels.numel():
        raise UserError(f"{name}: there is a label {highest}, and {labels.numel()} labels; classes are 0, 1, 2, ...")
    names = [*map(str, range(highest + 1))] if classes is None else classes
    if classes is None and highest < 1:
        raise UserError(f"{name}: the highest label is {highest}; at least two classes are needed, 0 and 1")
    check_labels(name, labels, len(checked_classes(name, names)), masks=labels.dim() > 1)
    if inputs.dtype == torch.uint8 and inputs.dim() == 4:
        if inputs.shape[1] in (1, 3) and labels.dim() == 1:
            return TensorImages(inputs, labels, names, name=name)
        return TensorData(inputs.float(), labels, names, name=name, standardize=True)
    if inputs.is_floating_point() or inputs.dtype == torch.bool:
        inputs = inputs if standardize and inputs.dtype == torch.float64 else inputs.float()
        if not torch.isfinite(inputs).all():
            row = int((~torch.isfinite(inputs.flatten(1)).all(1)).nonzero()[0])
            raise UserError(f"{name}: row {row} of inputs has a value that is not finite")
    elif standardize:
        raise UserError(f"{name}: standardize is for floats; inputs are {inputs.dtype}")
    return TensorData(inputs.contiguous(), labels, names, name=name, standardize=standardize)


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        try:
            value = torch.from_numpy(np.ascontiguousarray(value))
        except TypeError as error:
            raise UserError(f"{name} must be of numbers, got an array of {value.dtype}") from error
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_complex():
        kind = f"one of {value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{name} must be a dense tensor or an array of numbers, got {kind}")
    return value.detach().cpu()
