"""The common interface of all kinds of data: number of rows, shape, classes, labels."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_map

from batchkern.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNK = 1 << 24
"""Number of bytes of uint8 pixels processed at a time, which limits temporary memory."""
IGNORED = -100
"""Target of a position that is ignored, as in ``F.cross_entropy``."""


class Labelled(ABC):
    """N inputs with their labels.

    Attributes:
        name: the source of the data, for messages.
        labels: ``(N,)`` int64 on the CPU, each in 0..len(classes)-1; or N masks ``(N, *places)``, in which -100 is
            ignored; ``None``: the labels are read together with the inputs.
        classes: the names of the classes, at least two and all different; ``None``: as many as the model has.
        shape: shape of one input, without the batch; ``None``: an input is more than one tensor.
        clean_labels: ``(N,)`` int64, the correct labels, if labels are noisy; ``None``: not known.
    """

    name: str
    labels: Tensor | None
    classes: tuple[str, ...] | None
    shape: tuple[int, ...] | None
    clean_labels: Tensor | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _selected(self, positions: Tensor) -> Self:
        """The rows at `positions`, without clean labels."""

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of each channel, to normalise inputs; ``None``: inputs are not normalised."""
        return None

    def select(self, positions: Tensor) -> Self:
        """The rows at `positions` (m,) int64 on the CPU."""
        part = self._selected(positions)
        if self.clean_labels is not None:
            part.clean_labels = self.clean_labels[positions]
        return part

    def relabelled(self, labels: Tensor, *, clean: Tensor | None) -> Self:
        """The same inputs with other labels; `clean` are the correct ones."""
        other = copy.copy(self)
        other.labels, other.clean_labels = labels.contiguous(), clean
        return other

    def one_label_each(self, what: str) -> Tensor:
        """The labels, ``(N,)``.

        Raises:
            UserError: the labels are read together with the inputs, or are masks; `what` names the feature that needs
                them.
        """
        if self.labels is None or self.labels.dim() > 1:
            kind = "are known only when its rows are read" if self.labels is None else "are masks"
            raise UserError(f"{self.name}: its labels {kind}, and {what} needs one label for each row")
        return self.labels


def rows_of(inputs: Any, rows: Tensor) -> Any:
    """The given rows of a model's inputs: a tensor, or a dictionary, tuple or list of tensors."""
    if isinstance(inputs, Tensor):
        return inputs[rows.to(inputs.device)]
    return tree_map(lambda x: rows_of(x, rows) if isinstance(x, Tensor) else x, inputs)


def checked_classes(name: str, classes: Sequence[str]) -> tuple[str, ...]:
    found = tuple(classes) if isinstance(classes, Iterable) else ()
    if len(found) < 2 or not all(isinstance(key, str) for key in found):
        raise UserError(f"{name}: classes must be the names of at least two classes, not {classes!r}")
    if len(set(found)) < len(found):
        key, times = Counter(found).most_common(1)[0]
        raise UserError(f"{name}: classes must have different names, but {key!r} is there {times} times")
    return found


def check_labels(name: str, labels: Tensor, classes: int, *, masks: bool) -> None:
    """Checks that each label is in 0..classes-1, or -100 in `masks`.

    Raises:
        UserError: one is not; the message names its place.
    """
    wrong = (labels < 0) | (labels >= classes)
    if masks:
        wrong &= labels != IGNORED
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        at = ", ".join(map(str, place))
        allowed = f"0..{classes - 1}" + (f", or {IGNORED} where nothing counts" if masks else "")
        raise UserError(f"{name}: the label [{at}] is {int(labels[tuple(place)])}; it must be in {allowed}")
