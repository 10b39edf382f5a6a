"""Argument checks shared by the operations: each raises one sentence with the argument, what it was, what it must be.

Checks read shapes, types and Python numbers, never a GPU tensor's values, so none of them synchronises. Values of CPU
tensors are read only outside ``torch.compile``.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def readable(x: Tensor) -> bool:
    """Whether looking at the values of ``x`` costs nothing: on the CPU, and not while a graph is being traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def tensor(name: str, x: Tensor, *, dims: int, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {allowed}, got {str(x.dtype).removeprefix('torch.')}")
    if x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimension(s), got shape {tuple(x.shape)}")


def vector(name: str, x: Tensor, *, rows: int, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """A 1-d companion of ``like``: ``rows`` elements on the same device."""
    tensor(name, x, dims=1, dtypes=dtypes)
    if x.shape[0] != rows:
        raise ValueError(f"{name} must have shape ({rows},), got {tuple(x.shape)}")
    same_device(name, x, like)


def same_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, the device of the other arguments, got {x.device}")


def target_values(x: Tensor, *, classes: int, ignore_index: int) -> None:
    """For the reference: a kernel looks at each target itself. On a GPU the gather trips a device-side assert."""
    if not readable(x):
        return
    wrong = (x != ignore_index) & ((x < 0) | (x >= classes))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"target[{row}] is {int(x[row])}; it must be in [0, {classes}) or ignore_index ({ignore_index})"
        )


def fraction(name: str, x: float | Tensor, like: Tensor) -> None:
    """A float in (0, 1], or a 0-dim float64 tensor on the device of ``like``."""
    if isinstance(x, Tensor):
        if x.dtype != torch.float64 or x.dim() != 0:
            raise TypeError(f"{name} as a tensor must be 0-dim float64, got {x.dim()}-dim {x.dtype}")
        same_device(name, x, like)
        if not readable(x):
            return
        x = float(x)
    elif isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be a float in (0, 1] or a 0-dim float64 tensor, got {type(x).__name__}")
    if not 0 < x <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {x}")


def split_keep(x: float | Tensor) -> tuple[float, Tensor | None]:
    """A checked fraction as the two arguments of a kernel: a number, or the tensor that replaces it."""
    return (1.0, x) if isinstance(x, Tensor) else (x, None)


def number(name: str, x: float, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """A Python number, not NaN, in [low, high], or in (low, high] with ``open_low``."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if not low <= x <= high or (open_low and x == low):
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must be in {bracket}{low}, {high}], got {x}")


def count(name: str, x: int, low: int = 0) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name} must be an int, got {type(x).__name__}")
    if x < low:
        raise ValueError(f"{name} must be at least {low}, got {x}")
