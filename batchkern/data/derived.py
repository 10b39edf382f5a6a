"""Data sets made from others: a smaller one, a part to look at while one searches, one with wrong labels."""

from __future__ import annotations

from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor

from batchkern.data.labelled import Labelled
from batchkern.errors import UserError, whole
from batchkern.seeding import generator

D = TypeVar("D", bound=Labelled)


def subset(data: D, rows: int) -> D:
    """``rows`` of the data, the same ones in every run, each class with its share (to within one).

    Args:
        data: one label for each row.
        rows: how many to take, at least one for each class.

    Raises:
        UserError: ``rows`` is less than the classes that there are, or more than there are.

    Examples:
        >>> import torch
        >>> from batchkern.data import from_tensors, subset
        >>> data = from_tensors(torch.zeros(100, 3), torch.arange(100) % 2)
        >>> subset(data, 10).labels.bincount().tolist()
        [5, 5]
    """
    present = len(data.one_label_each("a part of it").unique())
    count = whole(rows)
    if count is None or not present <= count <= len(data):
        raise UserError(
            f"{data.name}: a part of it must have {present} (its classes) to {len(data)} rows, got {rows!r}"
        )
    return data.select(_stratified(data, count))


def validation_split(data: D, fraction: float) -> tuple[D, D]:
    """The data without ``fraction`` of them, and that part: to choose settings by, so that the test set is looked at
    once, at the end.

    The part is the same in every run, and each class has its share in it.

    Args:
        data: one label for each row.
        fraction: of the rows that is held out, in (0, 1).

    Raises:
        UserError: ``fraction`` is not in (0, 1), or either part would have fewer rows than there are classes.

    Examples:
        >>> import torch
        >>> from batchkern.data import from_tensors, validation_split
        >>> data = from_tensors(torch.zeros(100, 3), torch.arange(100) % 2)
        >>> train, validation = validation_split(data, 0.2)
        >>> train.labels.bincount().tolist(), validation.labels.bincount().tolist()
        ([40, 40], [10, 10])
    """
    if isinstance(fraction, bool) or not isinstance(fraction, Real) or not 0 < fraction < 1:
        raise UserError(f"validation must be in (0, 1), got {fraction!r}")
    present, count = len(data.one_label_each("validation").unique()), round(float(fraction) * len(data))
    if not present <= count <= len(data) - present:
        raise UserError(
            f"{data.name}: validation is {fraction}, {count} of its {len(data)} rows; {present} at least must be in "
            "it and in the rest, one for each class"
        )
    held = torch.zeros(len(data), dtype=torch.bool)
    held[_stratified(data, count)] = True
    rest, part = (data.select(chosen.nonzero().flatten()) for chosen in (~held, held))
    part.name = f"{data.name} (validation)"
    return rest, part


def _stratified(data: Labelled, count: int) -> Tensor:
    """Ascending positions of so many images."""
    # Within a class the j-th image of a fixed shuffle stands at (j + 1/2) / size: the first of all classes together.
    labels = data.one_label_each("a part of it")
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    order = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = labels.bincount()
    starts = sizes.cumsum(0) - sizes
    labels = labels[order]
    place = (torch.arange(len(data)) - starts[labels]).double()
    first = place == 0  # of each class at least one, however rare it is
    rank = torch.where(first, -1.0, (place + 0.5) / sizes[labels])
    return order[rank.argsort(stable=True)[:count]].sort().values


def with_label_noise(data: D, fraction: float, seed: int) -> D:
    """The same inputs, round(fraction * N) of them with another label, any other class alike (symmetric noise).

    The labels from before are kept in ``clean_labels``.

    Args:
        data: one label for each row.
        fraction: of the labels that are replaced, in [0, 1).
        seed: of the choice of rows and of their new labels.

    Raises:
        UserError: ``fraction`` is not in [0, 1), or the labels are known to be noisy already.

    Examples:
        >>> import torch
        >>> from batchkern.data import from_tensors, with_label_noise
        >>> data = from_tensors(torch.zeros(100, 3), torch.arange(100) % 2)
        >>> noisy = with_label_noise(data, 0.2, seed=0)
        >>> int((noisy.labels != noisy.clean_labels).sum())
        20
    """
    if isinstance(fraction, bool) or not isinstance(fraction, Real) or not 0 <= fraction < 1:
        raise UserError(f"noise must be in [0, 1), got {fraction!r}")
    if data.clean_labels is not None:
        raise UserError(f"noise is {fraction}, but {data.name} has clean labels beside noisy ones already")
    numbers = generator(seed, "label noise")
    chosen = torch.randperm(len(data), generator=numbers)[: round(float(fraction) * len(data))]
    right = data.one_label_each("noise")
    assert data.classes is not None
    classes, labels = len(data.classes), right.clone()
    labels[chosen] = (labels[chosen] + torch.randint(1, classes, (len(chosen),), generator=numbers)) % classes
    return data.relabelled(labels, clean=right)
