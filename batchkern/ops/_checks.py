"""Argument checks shared by the operations: each raises one sentence with the argument, what it was, what it must be.

Checks read shapes, types and Python numbers, never a GPU tensor's values, so none of them synchronises. Values of CPU
tensors are read only outside ``torch.compile``.
"""

from __future__ import annotations

import numbers

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def readable(x: Tensor) -> bool:
    """Whether looking at the values of ``x`` costs nothing: on the CPU, and not while a graph is being traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def tensor(name: str, x: Tensor, *, dims: int | None = None, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """``dims`` is how many dimensions it must have; None: any number."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {allowed}, got {str(x.dtype).removeprefix('torch.')}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimension(s), got shape {tuple(x.shape)}")


def vector(name: str, x: Tensor, *, rows: int, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """A 1-d companion of ``like``: ``rows`` elements on the same device."""
    tensor(name, x, dims=1, dtypes=dtypes)
    if x.shape[0] != rows:
        raise ValueError(f"{name} must have shape ({rows},), got {tuple(x.shape)}")
    same_device(name, x, like)


def companion(name: str, x: Tensor, like: Tensor, like_name: str, *, dtypes: tuple[torch.dtype, ...]) -> None:
    """A tensor of the shape and device of ``like``."""
    tensor(name, x, dtypes=dtypes)
    if x.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {like_name}, {tuple(like.shape)}, got {tuple(x.shape)}")
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


def fraction(name: str, x: float | Tensor, like: Tensor) -> float | Tensor:
    """A float in (0, 1], or a 0-dim float tensor on the device of ``like``, which becomes float64. Returns it."""
    if isinstance(x, Tensor):
        if x.dtype not in FLOATS or x.dim() != 0:
            raise TypeError(f"{name} as a tensor must be a 0-dim float one, got {x.dim()}-dim {x.dtype}")
        same_device(name, x, like)
        constant(name, x)
        x = x.double()
        value = float(x) if readable(x) else 1.0
    else:
        if not _is_number(x):
            raise TypeError(f"{name} must be a float in (0, 1] or a 0-dim float tensor, got {type(x).__name__}")
        x = value = float(x)
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")
    return x


def _is_number(x: object) -> bool:
    return isinstance(x, int | float | numbers.Real) and not isinstance(x, bool)  # numpy.float32 is no float


def one_of(name: str, x: str, allowed: tuple[str, ...]) -> None:
    if x not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {x!r}")


def constant(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(f"{name} must not require a gradient: it gets none")


def ignored(x: int, group: dist.ProcessGroup | None) -> None:
    """The arguments ``ignore_index`` and ``group``."""
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"ignore_index must be an int, got {type(x).__name__}")
    if not -(2**63) <= x < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, got {x}")
    process_group(group)


def process_group(group: dist.ProcessGroup | None) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group or None, got {type(group).__name__}")


def split_keep(x: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """A checked fraction as the two arguments of a kernel: a number, or the tensor that replaces it."""
    if isinstance(x, Tensor):
        return 1.0, x
    if torch.compiler.is_compiling():  # as a number it would be a constant of the graph: a schedule would recompile
        return 1.0, torch.ones((), dtype=torch.float64, device=like.device) * x
    return x, None


def number(
    name: str,
    x: float,
    low: float,
    high: float = float("inf"),
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """A number, not NaN, in [low, high]; without low with ``open_low``, without high with ``open_high``."""
    if not _is_number(x):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if not low <= x <= high or (open_low and x == low) or (open_high and x == high):
        begin, end = "(" if open_low else "[", ")" if open_high else "]"
        raise ValueError(f"{name} must be in {begin}{low}, {high}{end}, got {x}")


def count(name: str, x: int, low: int = 0, high: int = 2**31 - 1) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name} must be an int, got {type(x).__name__}")
    if x < low:
        raise ValueError(f"{name} must be at least {low}, got {x}")
    if x > high:
        raise ValueError(f"{name} must be at most {high}, got {x}")
