"""Values of a saved state, checked before use: it may belong to another training, or be damaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def saved_number(state: Mapping[str, Any], name: str, most: int | None = None) -> int:
    """A count in a saved state.

    Raises:
        ValueError: it is not a whole number of at least 0, or above ``most``.
    """
    value = state[name]
    if type(value) is not int or value < 0 or (most is not None and value > most):
        raise ValueError(
            f"{name} is {value!r}, which must be a whole number from 0{'' if most is None else f' to {most}'}"
        )
    return value


def saved_tensor(state: Mapping[str, Any], name: str, like: Tensor) -> Tensor:
    """A tensor of a saved state, on the device of ``like``.

    Raises:
        ValueError: its shape or type is not that of ``like``.
    """
    value = state[name]
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (like.shape, like.dtype):
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]
        raise ValueError(f"{name} is {found}, which must be {like.dtype} {tuple(like.shape)}")
    return value.to(like.device)
