"""Argument checks shared by the operations. Each raises an error that names the argument, its value and what is
allowed.

Checks read shapes, types and Python numbers, but never the values of a GPU tensor, so none of them synchronises. Values
of CPU tensors are read only outside ``torch.compile``.
"""

from __future__ import annotations

import numbers

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from batchkern import _backend

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)

PLAIN = (Tensor, torch.nn.Parameter)
UNSERVED = {
    "DTensor": "call the operation on its to_local() if each rank holds whole rows, or on its full_tensor()",
    "MaskedTensor": "give its get_data(), and leave rows out by ignore_index or mask",
    "NestedTensor": "give its values(), or pad it and leave the padding out by ignore_index or mask",
}
"""Subclasses of Tensor that kernels cannot read, with the advice in the error message."""


def readable(x: Tensor) -> bool:
    """Whether the values of ``x`` can be read without a synchronisation: on the CPU, and not while a graph is
    traced."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor) or _backend.within_transform():
        return False
    return x.device.type == "cpu"


def tensor(name: str, x: Tensor, *, dims: int | None = None, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Checks that ``x`` is a dense tensor of one of ``dtypes`` with ``dims`` dimensions (None: any number)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    ordinary(name, x)
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {allowed}, got {str(x.dtype).removeprefix('torch.')}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimension(s), got shape {tuple(x.shape)}")


def ordinary(name: str, x: Tensor) -> None:
    """Raises for the subclasses of Tensor in ``UNSERVED``, and for their subclasses."""
    if type(x) not in PLAIN:
        for kind in type(x).__mro__:
            if kind.__name__ in UNSERVED:
                raise TypeError(f"{name} must be an ordinary tensor, got a {kind.__name__}: {UNSERVED[kind.__name__]}")
    if x.is_nested:
        raise TypeError(f"{name} must be an ordinary tensor, got a nested tensor: {UNSERVED['NestedTensor']}")


def vector(name: str, x: Tensor, *, rows: int, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Checks for a 1-d tensor of ``rows`` elements on the device of ``like``."""
    tensor(name, x, dims=1, dtypes=dtypes)
    if x.shape[0] != rows:
        raise ValueError(f"{name} must have shape ({rows},), got {tuple(x.shape)}")
    same_device(name, x, like)


def companion(name: str, x: Tensor, like: Tensor, like_name: str, *, dtypes: tuple[torch.dtype, ...]) -> None:
    """Checks for a tensor with the shape and device of ``like``."""
    tensor(name, x, dtypes=dtypes)
    if x.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {like_name}, {tuple(like.shape)}, got {tuple(x.shape)}")
    same_device(name, x, like)


def same_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, the device of the other arguments, got {x.device}")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weight_name: str,
    ignore_index: int,
    label_smoothing: float,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Checks the arguments that all cross entropies share, those of ``F.cross_entropy``."""
    tensor("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits must have shape (C,), (B, C) or (B, C, d1, ...), got no dimension")
    class_dim = min(logits.dim() - 1, 1)
    classes = logits.shape[class_dim]
    if classes == 0:
        raise ValueError(f"logits must have at least one class in dimension {class_dim}, got {tuple(logits.shape)}")
    tensor("target", target, dtypes=(*INTEGERS, *FLOATS))
    rows = logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
    soft = target.is_floating_point()
    if target.shape != (logits.shape if soft else rows):
        raise ValueError(
            f"target must hold class indices of shape {tuple(rows)}, or probabilities as floats of the logits' shape "
            f"{tuple(logits.shape)}, got {str(target.dtype).removeprefix('torch.')} {tuple(target.shape)}"
        )
    same_device("target", target, logits)
    number("label_smoothing", label_smoothing, 0, 1)
    ignored(ignore_index, group)
    if soft and ignore_index >= 0:
        raise ValueError(f"ignore_index must not be given with a target of probabilities, got {ignore_index}")
    if weight is not None:
        vector(weight_name, weight, rows=classes, like=logits, dtypes=FLOATS)
        constant(weight_name, weight)


def target_values(x: Tensor, *, classes: int, ignore_index: int) -> None:
    """Checks the class indices for the reference; kernels check each target themselves. On a GPU, a wrong one causes a
    device-side assert in the gather."""
    if x.is_floating_point() or not readable(x):
        return
    x = x.long()
    wrong = (x != ignore_index) & ((x < 0) | (x >= classes))
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"target[{', '.join(map(str, place))}] is {int(x[place])}; "
            f"it must be in [0, {classes}) or ignore_index ({ignore_index})"
        )


def fraction(name: str, x: float | Tensor, like: Tensor) -> float | Tensor:
    """Checks and returns a float in (0, 1], or a 0-dim float tensor on the device of ``like``, converted to float64."""
    if isinstance(x, Tensor):
        ordinary(name, x)
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
    return isinstance(x, int | float | numbers.Real) and not isinstance(x, bool)  # numpy.float32 is not a float


def one_of(name: str, x: str, allowed: tuple[str, ...]) -> None:
    if x not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {x!r}")


def constant(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(f"{name} must not require a gradient: it gets none")


def ignored(x: int, group: dist.ProcessGroup | None) -> None:
    """Checks the arguments ``ignore_index`` and ``group``."""
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"ignore_index must be an int, got {type(x).__name__}")
    if not -(2**63) <= x < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, got {x}")
    process_group(group)


def process_group(group: dist.ProcessGroup | None, name: str = "group") -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name} must be a torch.distributed process group or None, got {type(group).__name__}")


def split_keep(x: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """A checked fraction as two arguments of a kernel: a number, and the tensor that replaces it or None."""
    if isinstance(x, Tensor):
        return 1.0, x
    if torch.compiler.is_compiling():  # a number would be a constant of the graph, and a schedule would recompile
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
    """Checks for a number, not NaN, in [low, high]; ``open_low`` excludes low, ``open_high`` excludes high."""
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
