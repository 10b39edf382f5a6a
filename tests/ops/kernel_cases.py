"""What the tests of the kernels share: every instruction set of the machine, layouts, threads, and the error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import kernel_backend
import pytest
import torch
from torch import Tensor

from batchkern import _backend

if _backend.extension is None:
    pytest.skip(_backend.extension_error, allow_module_level=True)

INSTRUCTION_SETS: list[str] = _backend.extension.instruction_sets()[
    : 1 if kernel_backend.chosen else None
]  # a GPU has one
TOLERANCE = 3e-7 if kernel_backend.chosen else 1e-7
"""Relative, beside a correctly rounded result: CPU kernels add in double precision, GPU kernels in single."""
COARSER = TOLERANCE / 1e-7
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DRAWN_DTYPES = [x for x in DTYPES if x != torch.bfloat16 or kernel_backend.chosen != "interpreter"]
"""For tests that choose by themselves: with those of DTYPES that Triton's interpreter computes wrongly, left out
there."""

SLOW = kernel_backend.chosen == "interpreter"
"""50 ms a block of a grid: tests of many values look at some of them."""
REPEATS = 4 if kernel_backend.chosen == "host" else 20
"""Of what must not change: on the host each run has another order of all threads, and few show what depends on it."""
ORDERED = pytest.mark.skipif(SLOW, reason="the interpreter has neither threads nor an order that varies")
FEWER_DTYPES = DTYPES[: 1 if kernel_backend.chosen == "host" else None]
"""Where only losses differ, which are float32 whatever the logits are: a fiber for each thread takes its time."""


def rounded_once_more(dtype: torch.dtype) -> float:
    """Relative error that the gradient of soft_label_kl may have besides: on a GPU it is kept in bfloat16."""
    return 2**-8 if kernel_backend.chosen == "cuda" and dtype == torch.bfloat16 else 0.0


@contextmanager
def with_instruction_set(name: str) -> Iterator[None]:
    before = _backend.extension.instruction_set()
    _backend.extension.use_instruction_set(name)
    try:
        yield
    finally:
        _backend.extension.use_instruction_set(before)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def column_slice(x: Tensor) -> Tensor:
    """The same values in rows that start at odd addresses, between others that would show in every sum."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), 77.0, dtype=x.dtype)
    wide[:, 3:-2] = x
    return wide[:, 3:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "column slice": column_slice,
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "negative bit": lambda x: torch._neg_view(-x),  # the imaginary part of a conjugate: bytes that are not the values
    "first row expanded": lambda x: x[:1].expand(len(x), -1),
}


def bits(x: Tensor) -> Tensor:
    """For comparisons that tell -0.0 from 0.0 and find a NaN equal to itself."""
    return x.reshape(-1).view(torch.uint8)


def excess(ours: Tensor, exact: Tensor, best: Tensor) -> Tensor:
    """Per element, how much further ``ours`` is from ``exact`` than ``best`` is; infinite where not both are finite.

    With ``best`` the exact value rounded to a dtype this is a bound against any other result in that dtype, torch's
    own included: none is closer.
    """
    ours, exact, best = ours.double(), exact.double(), best.double()
    same = (ours == exact) | (ours.isnan() & exact.isnan())
    error = (ours - exact).abs().nan_to_num(math.inf)
    return torch.where(same, 0.0, torch.where(error.isfinite(), error - (best - exact).abs(), math.inf))
