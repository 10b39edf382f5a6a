"""Errors of the user, reported in one sentence; and imports of optional libraries."""

from __future__ import annotations

import contextlib
import errno
import importlib
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch


class UserError(ValueError):
    """One clear sentence that names the argument or file, what it was, and what is allowed.

    The command line prints it and exits with status 2, without a traceback.
    """


def require(module: str, extra: str) -> Any:
    """Import an optional library, by its module name.

    Raises:
        UserError: it is not installed, and the message names the extra of `batchkern` that includes it; or it cannot be
            loaded, as with matplotlib if the environment names an unknown backend.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs the library {library!r}, which cannot be imported ({error}): pip install 'batchkern[{extra}]'"
        ) from error
    except Exception as error:
        raise UserError(f"this needs the library {library!r}, which cannot be imported ({error})") from error


def whole(value: object) -> int | None:
    """``value`` as int if it is a whole number, also one of numpy or torch; None for other values, such as True."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return None if isinstance(value, bool) else number


@contextlib.contextmanager
def only_warned(what: str) -> Iterator[None]:
    """For steps after the results are saved, such as plots: an error in them becomes a warning."""
    try:
        yield
    except Exception as error:
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        warnings.warn(f"{what}: {reason}", stacklevel=3)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a lack of memory, for which torch has a type only on GPUs."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
