"""Helpers that the launchers share."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Kernel:
    """A Triton kernel that profilers show as ours.

    Triton compiles a kernel again for each alignment of a pointer. The alignment may depend on the number of rows
    before a view, and may change while a CUDA graph is captured, when nothing can be compiled. So there are only two
    compilations: one for data that begin at multiples of 16 bytes (``VECTOR`` above 1), and one for data of any
    alignment, whose loads take one element. No alignment of a seed or a factor is assumed.
    """

    def __init__(self, function: Callable[..., None], runtime: Sequence[str]) -> None:
        shown = f"batchkern_{function.__name__.lstrip('_')}"
        arguments = [
            name for name, p in inspect.signature(function).parameters.items() if "constexpr" not in str(p.annotation)
        ]

        def compiled(anywhere: list[str]) -> Any:
            return triton.jit(
                function,
                repr=lambda _: shown,
                do_not_specialize=list(runtime),
                do_not_specialize_on_alignment=anywhere,
            )

        self._aligned = compiled(["seed", "factor"])
        self._anywhere = compiled(arguments)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int], *arguments: Any, VECTOR: int, **options: Any) -> None:
        chosen = self._aligned if VECTOR > 1 else self._anywhere
        chosen[grid](*arguments, **options, VECTOR=VECTOR)


def kernel(runtime: Sequence[str] = ()) -> Callable[[Callable[..., None]], Kernel]:
    """``runtime`` names the numbers that no compilation depends on."""
    return lambda function: Kernel(function, runtime)


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the device of ``x`` the current one, on which Triton launches."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def check_float(x: Tensor, name: str) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")


def dense_rows(x: Tensor) -> Tensor:
    """``x (N, C)`` itself if the elements of a row are contiguous, else a copy."""
    x = x.resolve_neg()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def vector(*tensors: Tensor) -> int:
    """The number of elements of a vectorised load: the most, up to 16 bytes, that divide the widths and row strides of
    all tensors. It is 1 if a tensor does not begin at a multiple of 16 bytes.

    Kernels take widths and strides in units of it, which tells the compiler that they are multiples of it. Triton's own
    hint is for multiples of 16 elements, which 1000, for example, is not.
    """
    if any(x.data_ptr() % 16 for x in tensors):
        return 1
    return math.gcd(16 // tensors[0].dtype.itemsize, *(n for x in tensors for n in (x.stride(0), x.shape[1])))


def cdiv(n: int, size: int) -> int:
    """The number of blocks of ``size`` that hold ``n``. ``triton.cdiv`` takes 5 us on the host."""
    return -(-n // size)


def power_of_two(n: int, least: int) -> int:
    """The lowest power of two that is at least ``n`` and ``least``."""
    return max(1 << (n - 1).bit_length(), least)
