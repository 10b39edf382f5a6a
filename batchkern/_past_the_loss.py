"""Detects trainings that bypass the loss of a patched model, from the state of the current call of the model and the
code that called it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

ADVICE = (
    "pass labels and train on the loss that the model returns (docs/integrations.md has trainers that do not), call it "
    "under torch.no_grad() or in eval mode, or remove the patch by CausalLMPatch.of(model).remove()"
)
HAND_ON = ("accelerate.", "batchkern.", "peft.", "torch.", "transformers.models.", "transformers.utils.")


class PatchedCall:
    """The state of the current call of a patched model. The object also replaces the ``forward`` of the output layer:
    while a loss is computed, it returns its input unchanged. It has no reference to the model, so that copying a layer
    does not copy the model."""

    def __init__(self, base: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        self.name, self._base = type(base).__name__, id(base)
        self._forward: Callable[[Tensor], Tensor] | None = forward
        self.inside = self.active = self.labelled = False
        self.hidden: Tensor | None = None
        self.version = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedCall:
        """Copies the object. If a single layer is copied without its model, the copy raises no errors and refers to no
        other layer."""
        copied = memo[id(self)] = object.__new__(PatchedCall)
        state = dict(self.__dict__)
        if self._base not in memo:
            state["inside"] = True
            if id(getattr(self._forward, "__self__", None)) not in memo:
                state["_forward"] = None
        copied.__dict__ = copy.deepcopy(state, memo)
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the state as in a copy of a single layer, unless :meth:`belong` is called next."""
        self.__dict__ = {**state, "inside": True}

    def belong(self, base: nn.Module) -> None:
        """Assigns this object to a model whose patch was copied or unpickled."""
        self._base, self.inside = id(base), False

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.active:
            self.hidden, self.version = hidden, version(hidden)
            return hidden
        assert self._forward is not None, "it stands for no layer"
        logits = self._forward(hidden)
        layer: Any = getattr(self._forward, "__self__", None)
        if not self.inside and isinstance(layer, nn.Module):
            self.refuse_around(layer, (), logits)
        return logits

    def refuse_around(self, layers: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Raises if a part of the model was called directly in training."""
        if not self.inside and learns(layers, output):
            raise RuntimeError(
                f"the layers of {self.name} were called in training by {caller()}, around the model that was patched "
                f"(after an adapter is merged, patch again), so that its loss would be that of all tokens: {ADVICE}"
            )

    def refuse_backward_of(self, loss: Tensor) -> None:
        """Makes the backward pass of a loss that was computed in evaluation mode raise an error. ``from_pretrained``
        returns models in that mode."""

        def refuse(grad: Tensor) -> None:
            raise RuntimeError(
                f"{self.name} is trained in evaluation mode, where its loss is that of all tokens: call train() first, "
                "or remove() the patch"
            )

        if loss.requires_grad and not torch.compiler.is_compiling():
            loss.register_hook(refuse)


def learns(model: nn.Module, output: Any) -> bool:
    """Whether a model is in training mode and its output requires a gradient, so that it may be trained on."""
    if not (model.training and torch.is_grad_enabled()):
        return False
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(output))


def caller() -> str:
    """The name of the function that called the model, and its module; wrappers in the libraries of ``HAND_ON`` are
    skipped."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and f"{frame.f_globals['__name__']}.".startswith(HAND_ON):
        frame = frame.f_back
    return "Python" if frame is None else f"{frame.f_code.co_name} of {frame.f_globals['__name__']}"


def place(function: Any) -> str:
    """The name of a function and its module. A function made with ``functools.wraps`` gets its own name, not that of
    the wrapped function."""
    function = getattr(function, "__func__", function)
    return f"{function.__code__.co_name} of {function.__globals__['__name__']}"


def version(x: Tensor) -> int:
    """The number of in-place changes of ``x``; 0 under ``torch.compile``, which cannot read this number."""
    return 0 if torch.compiler.is_compiling() else x._version
