"""What every kind of data says of itself: how many rows, of what shape, with which classes."""

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
"""Bytes of uint8 pixels handled at a time, which bounds the temporaries of what works through a whole set."""
IGNORED = -100
"""Target of a position that counts nowhere, as of ``F.cross_entropy``."""


class Labelled(ABC):
    """N inputs, and the label that a model should give each of them.

    Attributes:
        name: the source they came from, for messages.
        labels: ``(N,)`` int64 on the CPU, each in 0..len(classes)-1; or of N masks ``(N, *places)``, where -100 counts
            nowhere; ``None``: they come with the inputs.
        classes: the name of each class, two at least, all different; ``None``: as many as the model has.
        shape: of one input, without the batch; ``None``: it is more than one tensor.
        clean_labels: ``(N,)`` int64, where it is known what labels ought to be; ``None``: not known.
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
        """What inputs are normalised with: mean and deviation for each channel; ``None``: inputs are as they are."""
        return None

    def select(self, positions: Tensor) -> Self:
        """The rows at `positions` (m,) int64 on the CPU."""
        part = self._selected(positions)
        if self.clean_labels is not None:
            part.clean_labels = self.clean_labels[positions]
        return part

    def relabelled(self, labels: Tensor, *, clean: Tensor | None) -> Self:
        """The same inputs under other labels; `clean` says what they ought to be."""
        other = copy.copy(self)
        other.labels, other.clean_labels = labels.contiguous(), clean
        return other

    def one_label_each(self, what: str) -> Tensor:
        """The labels, ``(N,)``.

        Raises:
            UserError: there are none before the inputs are read, or they are masks; `what` needs them.
        """
        if self.labels is None or self.labels.dim() > 1:
            kind = "are known only when its rows are read" if self.labels is None else "are masks"
            raise UserError(f"{self.name}: its labels {kind}, and {what} needs one label for each row")
        return self.labels


def rows_of(inputs: Any, rows: Tensor) -> Any:
    """Those rows of a model's inputs: a tensor, or a dictionary, tuple or list of them."""
    if isinstance(inputs, Tensor):
        return inputs[rows.to(inputs.device)]
    return tree_map(lambda x: rows_of(x, rows) if isinstance(x, Tensor) else x, inputs)


def checked_classes(name: str, classes: Sequence[str]) -> tuple[str, ...]:
    found = tuple(classes) if isinstance(classes, Iterable) else ()
    if len(found) < 2 or not all(isinstance(key, str) for key in found):
        raise UserError(f"{name}: classes must be the names of two classes at least, not {classes!r}")
    if len(set(found)) < len(found):
        key, times = Counter(found).most_common(1)[0]
        raise UserError(f"{name}: classes must have different names, but {key!r} is there {times} times")
    return found


def check_labels(name: str, labels: Tensor, classes: int, *, masks: bool) -> None:
    """That each is in 0..classes-1, or of `masks` -100.

    Raises:
        UserError: one is not; the sentence has its place.
    """
    wrong = (labels < 0) | (labels >= classes)
    if masks:
        wrong &= labels != IGNORED
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        at = ", ".join(map(str, place))
        allowed = f"0..{classes - 1}" + (f", or {IGNORED} where nothing counts" if masks else "")
        raise UserError(f"{name}: the label [{at}] is {int(labels[tuple(place)])}; it must be in {allowed}")
