"""Data sets made from others: a smaller one, a validation set, one with wrong labels."""

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
    """A stratified part of ``rows`` rows, the same in every run; each class keeps its proportion (to within one).

    Args:
        data: one label for each row.
        rows: number of rows, at least one for each class.

    Raises:
        UserError: ``rows`` is less than the number of classes, or more than the number of rows.

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
    """Splits data into a training part and a validation part, with which settings can be chosen, so that the test set
    is used only once, at the end.

    The split is the same in every run, and each class keeps its proportion in it.

    Args:
        data: one label for each row.
        fraction: fraction of the rows in the validation part, in (0, 1).

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
            f"{data.name}: validation is {fraction}, {count} of its {len(data)} rows; at least {present} must be in "
            "it and in the rest, one for each class"
        )
    held = torch.zeros(len(data), dtype=torch.bool)
    held[_stratified(data, count)] = True
    rest, part = (data.select(chosen.nonzero().flatten()) for chosen in (~held, held))
    part.name = f"{data.name} (validation)"
    return rest, part


def _stratified(data: Labelled, count: int) -> Tensor:
    """Ascending positions of a stratified part of ``count`` images."""
    # The j-th image of a class in a fixed shuffle gets the rank (j + 1/2) / size; images with the lowest ranks are
    # taken.
    labels = data.one_label_each("a part of it")
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    order = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = labels.bincount()
    starts = sizes.cumsum(0) - sizes
    labels = labels[order]
    place = (torch.arange(len(data)) - starts[labels]).double()
    first = place == 0  # at least one of each class, however rare it is
    rank = torch.where(first, -1.0, (place + 0.5) / sizes[labels])
    return order[rank.argsort(stable=True)[:count]].sort().values


def with_label_noise(data: D, fraction: float, seed: int) -> D:
    """The same inputs, round(fraction * N) of them with a wrong label; all other classes are equally likely (symmetric
    noise).

    The original labels are kept in ``clean_labels``.

    Args:
        data: one label for each row.
        fraction: fraction of the labels that are replaced, in [0, 1).
        seed: seed of the choice of rows and of their new labels.

    Raises:
        UserError: ``fraction`` is not in [0, 1), or the data already have clean labels beside noisy ones.

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
        raise UserError(f"noise is {fraction}, but {data.name} already has clean labels beside noisy ones")
    numbers = generator(seed, "label noise")
    chosen = torch.randperm(len(data), generator=numbers)[: round(float(fraction) * len(data))]
    right = data.one_label_each("noise")
    assert data.classes is not None
    classes, labels = len(data.classes), right.clone()
    labels[chosen] = (labels[chosen] + torch.randint(1, classes, (len(chosen),), generator=numbers)) % classes
    return data.relabelled(labels, clean=right)
