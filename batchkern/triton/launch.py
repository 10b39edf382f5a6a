"""What the launchers share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def kernel(runtime: Sequence[str] = ()) -> Callable[[Callable[..., None]], Any]:
    """A Triton kernel that profilers show as ours; ``runtime`` names arguments that no compilation depends on."""

    def decorate(function: Callable[..., None]) -> Any:
        name = f"batchkern_{function.__name__.lstrip('_')}"
        return triton.jit(function, repr=lambda _: name, do_not_specialize=list(runtime))

    return decorate


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the device of ``x`` the current one: Triton launches there."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def check_float(x: Tensor, name: str) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")


def dense_rows(x: Tensor) -> Tensor:
    """``x (N, C)`` itself where the elements of a row lie side by side, else a copy."""
    x = x.resolve_neg()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def vector(*tensors: Tensor) -> int:
    """Elements in 16 bytes, where every row of these tensors begins and ends at a multiple of them, else 1.

    Kernels take widths and strides in units of it: so the compiler knows that loads may take 16 bytes. Its own hint is
    for multiples of 16 elements, which 1000 is not.
    """
    size = 16 // tensors[0].dtype.itemsize
    whole = all(not (x.data_ptr() % 16 or x.stride(0) % size or x.shape[1] % size) for x in tensors)
    return size if whole else 1


def cdiv(n: int, size: int) -> int:
    """Blocks of ``size`` that hold ``n``. ``triton.cdiv`` is for kernels too, and takes 5 us on the host."""
    return -(-n // size)


def power_of_two(n: int, least: int) -> int:
    """The lowest power of two that is at least ``n`` and ``least``."""
    return max(1 << (n - 1).bit_length(), least)
