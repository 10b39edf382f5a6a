"""Passive batches in your own training loop: P. Singh, P. Mazumder, V. P. Namboodiri, "Passive Batch Injection Training
Technique", 2020 (arXiv:2006.04406), Algorithm 1."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

from torch import nn

from batchkern import schedules
from batchkern.errors import UserError, whole
from batchkern.models import AttachedHead, find_classifier
from batchkern.saved_state import saved_number
from batchkern.second_head import CONVOLUTIONS, Inputs, in_place, second_classifier, second_head

NAME = "second_head"
UNASKED = 3
"""The number of passive batches that may be read ahead before :func:`is_passive` is called for one of them."""


class Passive:
    """Marks a batch of the passive set. It is mixed into the batch's own class, because trainers that move a batch to a
    device keep its class."""


@cache
def _marked(kind: type) -> type:
    return type(f"Passive{kind.__name__}", (Passive, kind), {})


def mark_passive(batch: Any) -> Any:
    """A copy of ``batch``, a mapping, tuple or list of tensors, for which :func:`is_passive` is true."""
    if not isinstance(batch, Mapping | UserDict | tuple | list):
        raise UserError(f"passive batches must be mappings, tuples or lists, got {type(batch).__name__}")
    kind = _marked(type(batch))
    return kind(*batch) if hasattr(batch, "_fields") else kind(batch)


_recognised = 0
"""How often :func:`is_passive` has returned True."""


def is_passive(batch: Any) -> bool:
    """Whether :class:`inject` took a batch from the passive set. Call it before a new batch is built from this one: the
    list ``[x.to(device) for x in batch]`` is no longer marked.

    Args:
        batch: the batch, as the loader returned it.

    Examples:
        >>> from batchkern.parts import inject, is_passive
        >>> batches = list(inject([["a"], ["b"]], [["p"]], every=2))
        >>> [is_passive(batch) for batch in batches]
        [False, False, True]
        >>> is_passive([*batches[2]])  # a new list
        False
    """
    global _recognised
    passive = isinstance(batch, Passive)
    _recognised += passive
    return passive


def _state(loader: Any) -> Any:
    """The state of a loader; None if it has none. Loaders of accelerate have the method, but it may fail."""
    try:
        return loader.state_dict()
    except AttributeError:
        return None


class inject:
    """A loader that yields the batches of ``loader`` and, after every g-th of them, a batch of ``passive``, for which
    :func:`is_passive` is true. One pass over it is one pass over ``loader``.

    Batches of ``loader`` are counted over all passes, so a small data set gets its passive batches, too. The number of
    batches may differ by one between epochs, so it has no ``len()``.

        for batch in inject(loader, passive_loader, every=100):
            x, y = batch
            with head.used_by(batch):  # a SecondHead
                loss = F.cross_entropy(model(x), y)
            ...  # the update

    Args:
        loader: the loader of the training set.
        passive: the loader of the passive set, which is restarted whenever it ends.
        every: g, at least 1; or ``f(batches of loader so far)`` -> bool.

    Its state includes the state of both loaders if they have one, as :class:`batchkern.parts.WholeEpochs` does. A
    loader without a state starts from its beginning, so a state saved within a pass over it is rejected.

    Raises:
        UserError: ``every`` is below 1, or ``passive`` is empty.
        RuntimeError: passive batches are delivered, but :func:`is_passive` is never called for them.

    Examples:
        >>> from batchkern.parts import inject, is_passive
        >>> loader, passive = [["a"], ["b"], ["c"], ["d"]], [["p"], ["q"]]
        >>> [(batch[0], is_passive(batch)) for batch in inject(loader, passive, every=2)]
        [('a', False), ('b', False), ('p', True), ('c', False), ('d', False), ('q', True)]
    """

    def __init__(self, loader: Any, passive: Iterable[Any], every: int | Callable[[int], bool] = 100) -> None:
        self.loader, self.passive = loader, passive
        self.due = every if callable(every) else schedules.every(every)
        self.active = self.injected = 0
        """The numbers of batches of each kind that were delivered."""
        self.pending = False
        """Whether the next batch is a passive one."""
        self.begun = 0
        """The value of ``active`` at the beginning of the current pass, or of the next one."""
        self.sized = False
        """Whether it has a length, that of the current pass. Set it only for a trainer that reads the length in each
        epoch."""
        self._stream = _endless(self.passive)
        self._unasked = 0
        """Number of passive batches since one was last recognised."""
        self._asked = _recognised

    def __iter__(self) -> Iterator[Any]:
        self.begun = self._begin()
        if self.pending:
            yield self._passive()
        for batch in self.loader:
            self.active += 1
            self.pending = self.due(self.active)
            yield batch
            if self.pending:
                yield self._passive()

    def _begin(self) -> int:
        """``begun`` of the pass that starts now: a new one, or the rest of a pass that was stopped early."""
        over = self.sized and self.active - self.begun >= len(self.loader) and not self.pending
        return self.active if over or _state(self.loader) is None else self.begun

    def __len__(self) -> int:
        if not self.sized:
            raise TypeError("passes differ in their number of batches, so there is no len()")
        own, begun = len(self.loader), self._begin()
        return own + sum(map(self.due, range(begun + 1, begun + own + 1)))

    def _passive(self) -> Any:
        self._unasked = 0 if _recognised > self._asked else self._unasked + 1
        self._asked = _recognised
        if self._unasked > UNASKED:
            raise RuntimeError(
                f"{UNASKED} passive batches were delivered and none was recognised: call head.used_by(batch), or "
                "is_passive(batch), before a new batch is built from it, as in [x.to(device) for x in batch]"
            )
        self.pending = False
        self.injected += 1
        return mark_passive(next(self._stream))

    @property
    def dataset(self) -> Any:
        return self.loader.dataset

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {name: getattr(self, name) for name in ("active", "injected", "pending", "begun")}
        for name in ("loader", "passive"):
            if (own := _state(getattr(self, name))) is not None:
                state[name] = own
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.active, self.injected = saved_number(state, "active"), saved_number(state, "injected")
        self.pending, self.begun = bool(state["pending"]), saved_number(state, "begun", self.active)
        if "loader" not in state and (self.pending or 0 < self.active - self.begun < len(self.loader)):
            raise ValueError(
                f"the state was saved within a pass, and a {type(self.loader).__name__} cannot continue there: inject "
                "into WholeEpochs(loader)"
            )
        for name in ("loader", "passive"):
            if name in state:
                getattr(self, name).load_state_dict(state[name])
        self._stream = _endless(self.passive)


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise UserError("passive must have batches whenever it is iterated, but it has none")


class SecondHead:
    """A second copy of the last layers of a model, for the classes of another data set.

    The head is attached to the model, as ``second_head`` of its classifier, until :meth:`detach`; until then
    ``parameters()`` and ``state_dict()`` of the model include it. Attach it before the optimizer is built, and before
    the model is compiled or given to DistributedDataParallel, which needs ``find_unused_parameters=True``.

    In a step that does not use it, the head has no gradient (PyTorch's ``zero_grad`` leaves None), so the optimizer
    does not change it, neither by momentum nor by weight decay. The same holds for the model's own last layers in a
    step on a passive batch. Detach the head before the model is saved for other uses, or its keys will be in the file.

    Args:
        model: any module with a linear layer as its classifier.
        classes: number of classes of the passive set, at least 1.
        example: inputs that the model can take: a tensor, or a tuple or dict of arguments. With it, the head has all
            layers after the last convolution, as in the paper, or after ``shared``; without it, only the classifier.
        shared: the part that both sets share, as in :func:`batchkern.second_head.second_head`.
        classifier: name of the model's last linear layer, needed only if it is not the one registered last.

    Raises:
        UserError: there is no such module, the model cannot be cut there, or it already has a second head.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from batchkern.parts import SecondHead, inject
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> head = SecondHead(model, classes=2)
        >>> for batch in inject([[torch.zeros(1, 4)]] * 2, [[torch.zeros(1, 4)]], every=2):
        ...     with head.used_by(batch):
        ...         print(model(batch[0]).numel(), end=" ")  # classes: of the training set, and of the passive one
        3 3 2
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        example: Inputs | None = None,
        *,
        shared: str = CONVOLUTIONS,
        classifier: str | None = None,
    ) -> None:
        if (whole(classes) or 0) < 1:
            raise UserError(f"classes must be a whole number of at least 1, got {classes!r}")
        name, self._classifier = find_classifier(model, classifier)
        if not name:
            raise UserError("model must contain its classifier, but it is itself the only Linear layer")
        if hasattr(self._classifier, NAME):
            raise UserError(f"the classifier {name!r} already has a {NAME}; detach() it first")
        if example is not None:
            layers = second_head(model, classes, example, shared=shared, classifier=classifier)
        elif shared != CONVOLUTIONS:
            raise UserError(f"shared is {shared!r}, which needs an example of the model's inputs to find its end")
        else:
            layers = second_classifier(model, classes, classifier=classifier)
        self.model, self.layers = model, AttachedHead(dict(layers.items()))
        self._classifier.add_module(NAME, self.layers)  # a Linear layer does not call its children

    def used_by(self, batch: Any) -> AbstractContextManager[None]:
        """A context in which the model runs this head instead of its own last layers if ``batch`` is passive."""
        return in_place(self.model, self.layers) if is_passive(batch) else nullcontext()

    def detach(self) -> None:
        """Removes the head from the model, and so from its state_dict."""
        if getattr(self._classifier, NAME, None) is self.layers:
            delattr(self._classifier, NAME)
