"""A wrapper of every operation: it supports ``__torch_function__`` and rejects tensors whose memory was freed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from batchkern import _backend

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def public(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Lets subclasses of Tensor and modes override a call, as for PyTorch's functions. A tensor without memory
    raises."""

    @functools.wraps(function)
    def operation(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():  # there, the PyTorch functions inside are overridden
            return function(*args, **kwargs)
        if _backend.are_plain(args, kwargs):  # nearly always
            return function(*args, **kwargs)
        arguments = args + tuple(kwargs.values())
        if has_torch_function(arguments) and not is_compiling():
            return handle_torch_function(operation, arguments, *args, **kwargs)
        if any(map(_is_freed, arguments)):
            _refuse(function, args, kwargs)
        return function(*args, **kwargs)

    return operation


def _is_freed(x: object) -> bool:
    return isinstance(x, Tensor) and not _backend.in_memory(x)


def _refuse(function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Raises an error that names the first tensor whose storage is too small; reading it would crash the process."""
    check_memory(**inspect.signature(function).bind(*args, **kwargs).arguments)


def check_memory(**arguments: Any) -> None:
    """Raises if the memory of a tensor was freed; also used in a backward pass, before which it may have been freed."""
    if is_compiling():
        return
    for name, x in arguments.items():
        if _is_freed(x):
            raise ValueError(
                f"{name} must have its values in memory, got shape {tuple(x.shape)} with a storage of "
                f"{x.untyped_storage().nbytes()} bytes: its owner, such as FSDP, has freed it, and must gather it first"
            )
