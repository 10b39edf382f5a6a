"""Any map-style dataset for PyTorch's `DataLoader`, read in the order of the trainer's plan."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import parent_process
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from batchkern.data.feed import Feed
from batchkern.data.images import ImageData
from batchkern.data.labelled import Labelled, check_labels, checked_classes
from batchkern.data.tensors import TensorData, from_tensors
from batchkern.errors import UserError
from batchkern.seeding import derived_seed

Inputs = Any
"""Inputs of a model: a tensor, or a dictionary, tuple or list of tensors, each with the batch's rows in dimension 0."""
Data = Dataset[Any] | tuple[Tensor, Tensor]
"""Data that :func:`as_labelled` converts to `Labelled`."""
Collate = Callable[[list[Any]], tuple[Inputs, Tensor]]


class DatasetData(Labelled):
    """Rows of a dataset, fetched when their batch is needed; see `from_dataset`.

    Args:
        dataset: an object with a length and rows by index.
        collate_fn: makes ``(inputs, labels)`` from a list of rows.
        classes: the names of the classes; ``None``: as many classes as the model has.
        name: the name in messages.

    Examples:
        >>> import torch
        >>> from batchkern.data import DatasetData, from_dataset
        >>> rows = [({"x": torch.tensor([float(row)])}, row % 2) for row in range(10)]
        >>> data = from_dataset(rows, classes=["even", "odd"])
        >>> isinstance(data, DatasetData), len(data.select(torch.tensor([1, 3, 5])))
        (True, 3)
    """

    labels = None

    def __init__(
        self, dataset: Dataset[Any], collate_fn: Collate, classes: tuple[str, ...] | None, *, name: str
    ) -> None:
        self.name = name
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.classes = classes
        with contextlib.ExitStack() as ending:
            ending.enter_context(_own_generators())
            inputs, labels = self.fetch([0], [derived_seed(0, "shape")])
        self.shape = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else None
        self.places = tuple(labels.shape[1:])
        """Shape of one target: () for a label, or the shape of a mask."""

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"DatasetData({self.name!r}, {len(self)} rows of {type(self.dataset).__name__})"

    def _selected(self, positions: Tensor) -> DatasetData:
        part = torch.utils.data.Subset(self.dataset, positions.tolist())
        return DatasetData(part, self.collate_fn, self.classes, name=self.name)

    def fetch(self, rows: Sequence[int], seeds: Sequence[int]) -> tuple[Inputs, Tensor]:
        """The batch of `rows`, each fetched with the generators of torch, NumPy and Python at its seed.

        Raises:
            UserError: a row cannot be read, or the result of collate_fn is not a batch.
        """
        samples = []
        for row, seed in zip(rows, seeds, strict=True):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes ten times as long
            np.random.seed(seed % 2**32)  # noqa: NPY002  # the global generator, which transforms use
            random.seed(seed)
            try:
                samples.append(self.dataset[row])
            except Exception as error:
                raise UserError(f"{self.name}: row {row} cannot be read: {_told(error)}") from error
        try:
            batch = self.collate_fn(samples)
        except Exception as error:
            raise UserError(f"{self.name}: collate_fn fails on rows {_few(rows)}: {_told(error)}") from error
        return self._checked(batch, rows)

    def _checked(self, batch: Any, rows: Sequence[int]) -> tuple[Inputs, Tensor]:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            kind = f"a {type(batch).__name__}" + (
                f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
            )
            raise UserError(
                f"{self.name}: collate_fn must make a pair (inputs, labels) from a list of rows, got {kind:.200}: "
                "give from_dataset one that does"
            )
        inputs, labels = batch
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or labels.dim() == 0:
            kind = (
                f"{labels.dtype} of shape {tuple(labels.shape)}"
                if isinstance(labels, Tensor)
                else type(labels).__name__
            )
            raise UserError(
                f"{self.name}: labels of a batch must be a tensor of whole numbers, (B,) or masks (B, *places), "
                f"got {kind}"
            )
        for x in (labels, *tree_flatten(inputs)[0]):
            if isinstance(x, Tensor) and (x.dim() == 0 or len(x) != len(rows)):
                raise UserError(
                    f"{self.name}: a batch of {len(rows)} rows has a tensor of shape {tuple(x.shape)}; dimension 0 "
                    "must be that of the rows"
                )
        if isinstance(inputs, Tensor) and inputs.dtype == torch.float64:
            inputs = inputs.float()
        return inputs, labels.to(torch.int64)


def from_dataset(
    dataset: Dataset[Any],
    *,
    classes: Sequence[str] | None = None,
    collate_fn: Collate | None = None,
    name: str | None = None,
) -> DatasetData | TensorData | ImageData:
    """Data from a map-style dataset: an object with a length and rows by index.

    Every row is fetched with the generators of torch, NumPy and Python at a seed that is derived from the training's
    seed, the update and the position in the batch. So random transforms are the same in a resumed run and with any
    number of workers; this does not hold for generators that a dataset creates itself.

    Args:
        dataset: the dataset. A `TensorDataset` of two tensors is treated as by `from_tensors`.
        classes: the names of the classes; default: ``dataset.classes``, as in torchvision's datasets, else as many
            classes as the model has logits.
        collate_fn: makes ``(inputs, labels)`` from a list of rows, like that of a `DataLoader`; default: torch's, for
            rows ``(input, label)``. Each tensor in them has the rows in dimension 0. The model is called with the
            inputs, whatever their type. Labels have the form of those of `from_tensors`.
        name: the name in messages; default: the name of the type.

    Raises:
        UserError: it is not a map-style dataset, is empty, or its first row is not of this form.

    Examples:
        >>> import torch
        >>> from batchkern.data import from_dataset
        >>> from torch.utils.data import Dataset
        >>> class Squares(Dataset):
        ...     def __len__(self):
        ...         return 10
        ...     def __getitem__(self, row):
        ...         return torch.tensor([row**2.0]), row % 2
        >>> data = from_dataset(Squares(), classes=["even", "odd"])  # Trainer takes the dataset itself, too
        >>> len(data), data.classes
        (10, ('even', 'odd'))
    """
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            "dataset must be map-style, with __len__ and __getitem__, since the trainer chooses the rows of each "
            f"batch; got {type(dataset).__name__}"
        )
    name = type(dataset).__name__ if name is None else name
    if len(dataset) == 0:
        raise UserError(f"{name}: the dataset has no rows")
    if type(dataset) is TensorDataset and collate_fn is None and len(dataset.tensors) == 2:
        return from_tensors(*dataset.tensors, classes=classes, name=name)
    own = getattr(dataset, "classes", None)
    found = own if classes is None and _are_names(own) else classes
    names = None if found is None else checked_classes(name, found)
    return DatasetData(dataset, collate_fn or default_collate, names, name=name)


def as_labelled(name: str, data: Any, classes: tuple[str, ...] | None = None) -> Labelled:
    """`data` in the form that the trainer takes: `Labelled` data themselves, or made from a dataset or a pair.

    Args:
        name: name of the argument, for messages.
        classes: classes of the training set, which are used for a pair or a dataset, too.
        data: `Labelled`, a map-style dataset (`from_dataset`), or a pair of inputs and labels (`from_tensors`).

    Examples:
        >>> import torch
        >>> from batchkern.data import as_labelled
        >>> data = as_labelled("train", (torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])))
        >>> data.name, len(data), data.classes
        ('train', 4, ('0', '1'))
    """
    if isinstance(data, Labelled):
        return data
    if isinstance(data, tuple | list) and len(data) == 2:
        return from_tensors(*data, classes=classes, name=name)
    held = str | bytes | Mapping | Tensor | np.ndarray | list | tuple
    if hasattr(data, "__getitem__") and not isinstance(data, held):
        return from_dataset(data, classes=None if _are_names(getattr(data, "classes", None)) else classes)
    raise UserError(
        f"{name} must be labelled images, as batchkern.data.load gives them, a map-style dataset, or a pair of tensors "
        f"(inputs, labels), got {data!r:.60}"
    )


class DatasetFeed:
    """Batches of a dataset on a device, fetched by `workers` processes ahead of their update.

    Args:
        data: the result of `from_dataset`.
        device: the device of the batches.
        seed: seed of the random transforms of the rows.
        workers: number of worker processes; 0: this process fetches a batch when it is needed.
        classes: number of classes, if the dataset does not name them; with ``None`` its labels are not checked.

    Examples:
        >>> import torch
        >>> from batchkern.data import DatasetFeed, from_dataset
        >>> rows = [(torch.tensor([float(row)]), row % 2) for row in range(10)]
        >>> feed = DatasetFeed(from_dataset(rows, classes=["even", "odd"]), device="cpu")
        >>> inputs, labels = feed.batch(torch.tensor([3, 4]), None)
        >>> inputs.tolist(), labels.tolist()
        ([[3.0], [4.0]], [1, 0])
    """

    def __init__(
        self,
        data: DatasetData,
        *,
        device: torch.device | str,
        seed: int = 0,
        workers: int = 0,
        classes: int | None = None,
    ) -> None:
        self.data = data
        self.device = torch.device(device)
        self.seed = seed
        self.workers = workers
        self.classes = classes if data.classes is None else len(data.classes)
        self.depth = max(1, workers)
        """The number of batches that are fetched ahead."""
        self._pool: ProcessPoolExecutor | None = None
        self._ahead: list[tuple[_Request, Future[Any]]] = []

    def prepare(self, indices: Tensor, step: int | None, positions: Tensor | None = None) -> None:
        """A hint to fetch a batch ahead, as in `Feed.prepare`."""
        if not self.workers:
            return
        request = self._request(indices, step, positions)
        if all(waiting != request for waiting, _ in self._ahead):
            self._ahead.append((request, self._submit(request)))

    def forget(self) -> None:
        """Discards prepared batches, and ends the workers."""
        self._ahead = []
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def batch(self, indices: Tensor, step: int | None, positions: Tensor | None = None) -> tuple[Inputs, Tensor]:
        """Inputs and labels at `indices`, on the device; `step` and `positions` as for `Feed.batch`."""
        inputs, labels = self._fetched(self._request(indices, step, positions))
        if self.classes is not None:
            check_labels(self.data.name, labels, self.classes, masks=labels.dim() > 1)
        on_device = tree_map(lambda x: x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x, inputs)
        return on_device, labels.to(self.device)

    def _fetched(self, request: _Request) -> tuple[Inputs, Tensor]:
        while self._ahead:
            waiting, future = self._ahead.pop(0)
            if waiting == request:
                return self._result(future)
            future.cancel()
        if self.workers:
            return self._result(self._submit(request))
        with _own_generators():
            return self.data.fetch(*request)

    def _request(self, indices: Tensor, step: int | None, positions: Tensor | None) -> _Request:
        """Rows and their seeds. In evaluation, the seed of a row does not depend on its position in the batch."""
        places = torch.arange(len(indices)) if positions is None else positions.cpu()
        rows = indices.cpu()[places].tolist()
        seeds = [
            derived_seed(self.seed, "row", row) if step is None else derived_seed(self.seed, "row", step, place)
            for row, place in zip(rows, places.tolist(), strict=True)
        ]
        return rows, seeds

    def _submit(self, request: _Request) -> Future[Any]:
        if self._pool is None:
            context = torch.multiprocessing.get_context()
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_adopt, initargs=(self.data,))
        try:
            return self._pool.submit(_fetch, *request)
        except BrokenProcessPool as error:
            raise self._died() from error

    def _result(self, future: Future[Any]) -> tuple[Inputs, Tensor]:
        try:
            inputs, labels = future.result()
            return inputs, labels
        except BrokenProcessPool as error:
            raise self._died() from error

    def _died(self) -> UserError:
        self._pool = None
        return UserError(
            f"{self.data.name}: a worker process ended (for lack of memory, or by an error outside Python), or "
            "the dataset cannot be sent to one: try workers=0, which shows errors where they happen"
        )


def feed_of(
    data: Labelled,
    statistics: tuple[Tensor, Tensor] | None,
    *,
    device: torch.device | str,
    augment: str = "none",
    seed: int = 0,
    workers: int = 0,
    classes: int | None = None,
) -> Feed | DatasetFeed:
    """A feed that returns batches of `data`.

    Args:
        statistics: the result of `Labelled.statistics` for the training set.
        workers, classes: as for `DatasetFeed`; used only for a dataset.
        data: images, other inputs in memory, or a dataset.
        device: the device of the batches.
        augment: as for `Feed`; must be ``"none"`` for a dataset.
        seed: seed of the augmentation, or of the random transforms of the rows.

    Examples:
        >>> import torch
        >>> from batchkern.data import feed_of, from_tensors
        >>> data = from_tensors(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]), standardize=True)
        >>> feed = feed_of(data, data.statistics(), device="cpu")  # the mean is 1, and so is the deviation
        >>> feed.batch(torch.tensor([0, 1]), None)[0].tolist()
        [[-1.0], [1.0]]
    """
    if isinstance(data, DatasetData):
        if augment != "none":
            raise UserError(
                f"augment is {augment}, but {data.name} is a dataset, whose transforms are its own: give none"
            )
        return DatasetFeed(data, device=device, seed=seed, workers=workers, classes=classes)
    assert isinstance(data, ImageData | TensorData)
    mean, std = statistics or (None, None)
    return Feed(data, mean=mean, std=std, device=device, augment=augment, seed=seed)


_Request = tuple[list[int], list[int]]
_of_worker: DatasetData


def _adopt(data: DatasetData) -> None:
    global _of_worker
    torch.set_num_threads(1)  # a forked process does not have the threads of its parent
    _of_worker = data
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        """Ends the worker with its parent; otherwise it would wait forever."""
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _fetch(rows: list[int], seeds: list[int]) -> tuple[Inputs, Tensor]:
    return _of_worker.fetch(rows, seeds)


@contextlib.contextmanager
def _own_generators() -> Iterator[None]:
    """Restores the states of the generators of torch, NumPy and Python of this process afterwards."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def _are_names(classes: Any) -> bool:
    return isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"


def _few(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:3])) + (", ..." if len(rows) > 3 else "")
