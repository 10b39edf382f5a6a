"""A second copy of the last layers of a network, for the classes of another data set, on a shared trunk."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from batchkern.errors import UserError
from batchkern.models import find_classifier

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

CONVOLUTIONS = "convolutions"
ALL_BUT_THE_CLASSIFIER = "all but the classifier"


def second_head(
    model: nn.Module, classes: int, example: Inputs, *, shared: str = CONVOLUTIONS, classifier: str | None = None
) -> nn.ModuleDict:
    """Copies of the layers after the trunk. The classifier is replaced by a new one, with logits for ``classes``.

    Args:
        model: inputs -> logits ``(..., classes)``, or an output that has ``logits``. It is not changed.
        example: inputs that the model can take, a tensor, or a tuple or a dict of arguments. It runs once, to find the
            order of the layers.
        shared: the trunk.

            - ``"convolutions"``: all layers up to the last convolution, and up to the first linear layer after it; for
              a timm model, all that its ``forward_head`` does not run; without convolutions, all but the classifier;
            - ``"all but the classifier"``;
            - the name of a module: all layers up to its end.
        classifier: name of the model's last linear layer, as for :func:`batchkern.models.find_classifier`.

    Raises:
        UserError: there is no such module, or the model cannot be cut there.
    """
    last, _ = find_classifier(model, classifier)
    begun, ended, head_begins = _order(model, example)
    if last not in begun:
        raise UserError(f"the classifier {last!r} does not run; name the model's last linear layer")
    cut = _cut(model, shared, last, begun, ended, head_begins)
    head = nn.ModuleDict()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{taken}.") for taken in map(_name, head))
        if inside or name not in begun or not (module._parameters or module._buffers) or begun[name][-1] < cut:
            continue
        if begun[name][0] < cut:
            raise UserError(f"shared is {shared!r}, but the layer {name!r} runs before and after the end of that part")
        head[_key(name)] = copy.deepcopy(module).train().requires_grad_(True)
    if _key(last) not in head:
        raise UserError(f"shared is {shared!r}, but the classifier {last!r} is a part of that; name a module before it")
    old = head[_key(last)]
    assert isinstance(old, nn.Linear)
    head[_key(last)] = _like(old, classes)
    _check_logits(model, head, example, classes)
    return head


def second_classifier(model: nn.Module, classes: int, *, classifier: str | None = None) -> nn.ModuleDict:
    """Like :func:`second_head` with ``"all but the classifier"``, which needs no example."""
    name, old = find_classifier(model, classifier)
    return nn.ModuleDict({_key(name): _like(old, classes)})


def _like(old: nn.Linear, classes: int) -> nn.Linear:
    return nn.Linear(old.in_features, classes, old.bias is not None, old.weight.device, old.weight.dtype)


def _run(model: nn.Module, example: Inputs) -> Any:
    if isinstance(example, Tensor):
        return model(example)
    return model(**example) if isinstance(example, Mapping) else model(*example)


@contextlib.contextmanager
def in_place(model: nn.Module, head: nn.ModuleDict) -> Iterator[None]:
    """A context in which ``model`` runs the layers of a :func:`second_head` instead of its own."""
    own = {id(model.get_submodule(_name(key))): layer for key, layer in head.items()}
    places = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if id(child) in own
    ]
    for parent, name, child in places:
        parent._modules[name] = own[id(child)]
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def _key(name: str) -> str:
    """The name of a module as a key of a ModuleDict, which must not have dots."""
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")


@torch.no_grad()
def _order(model: nn.Module, example: Inputs) -> tuple[dict[str, list[int]], dict[str, list[int]], int | None]:
    """The times at which each module begins and ends, counted from 0; and when timm's ``forward_head`` begins."""
    begun: dict[str, list[int]] = {}
    ended: dict[str, list[int]] = {}
    heads: list[int] = []
    clock = iter(range(2**62))

    def note(moments: dict[str, list[int]], name: str, *_: Any) -> None:
        moments.setdefault(name, []).append(next(clock))

    def forward_head(*args: Any, **options: Any) -> Any:
        heads.append(next(clock))
        return type(model).forward_head(model, *args, **options)  # type: ignore[attr-defined]

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(note, begun, name)))
        handles.append(module.register_forward_hook(partial(note, ended, name)))
    watched = callable(getattr(type(model), "forward_head", None))
    if watched:
        model.forward_head = forward_head  # type: ignore[assignment]
    training = model.training
    model.eval()
    try:
        _run(model, example)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"the model cannot take the example: {str(error).splitlines()[0]}") from error
    finally:
        model.train(training)
        if watched:
            del model.forward_head
        for handle in handles:
            handle.remove()
    return begun, ended, heads[0] if heads else None


def _cut(
    model: nn.Module,
    shared: str,
    classifier: str,
    begun: dict[str, list[int]],
    ended: dict[str, list[int]],
    head_begins: int | None,
) -> int:
    """The time at which the trunk ends."""
    modules = dict(model.named_modules())
    if shared == ALL_BUT_THE_CLASSIFIER:
        return begun[classifier][-1]
    if shared != CONVOLUTIONS:
        if shared not in modules or shared not in ended:
            raise UserError(
                f"shared must be {CONVOLUTIONS!r}, {ALL_BUT_THE_CLASSIFIER!r} or the name of a module of the model "
                f"that runs, such as {next(iter(ended))!r}, got {shared!r:.60}"
            )
        return ended[shared][-1]
    if head_begins is not None:
        return head_begins
    convolutions = [moments[-1] for name, moments in ended.items() if isinstance(modules[name], _ConvNd)]
    if not convolutions:
        return begun[classifier][-1]
    linear = [moments[-1] for name, moments in begun.items() if isinstance(modules[name], nn.Linear)]
    return min((moment for moment in linear if moment > max(convolutions)), default=max(convolutions))


def _check_logits(model: nn.Module, head: nn.ModuleDict, example: Inputs, classes: int) -> None:
    training = model.training
    try:
        with torch.no_grad(), in_place(model, head):
            model.eval()
            output = _run(model, example)
            shape = tuple(getattr(output, "logits", output).shape)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the model cannot have a second head: {str(error).splitlines()[0]}") from error
    finally:
        model.train(training)
        head.train()
    if shape[-1] != classes:
        raise UserError(
            f"a second head for {classes} classes gives logits of shape {shape}: is its classifier the last?"
        )
