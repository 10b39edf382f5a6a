"""What a user did wrong, told in one sentence; and the libraries that only some users need."""

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
        UserError: it is not installed; the sentence names the extra of `batchkern` that brings it. Or it refuses to be
            loaded, as matplotlib does where the environment names a backend that there is not.
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
    """The whole number that a value is, one of numpy's and torch's too; None: it is another thing, such as True."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return None if isinstance(value, bool) else number


@contextlib.contextmanager
def only_warned(what: str) -> Iterator[None]:
    """For what is done after results are safe, such as drawing them: where it fails there is a warning."""
    try:
        yield
    except Exception as error:
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        warnings.warn(f"{what}: {reason}", stacklevel=3)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that there was not enough memory: torch has a type for that of a GPU alone."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
