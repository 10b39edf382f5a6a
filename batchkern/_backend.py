"""Which implementation serves an operation on a device: a kernel, else the plain-PyTorch reference.

``batchkern._C`` holds the schemas and the kernels in C++ and CUDA C++; ``batchkern.triton`` adds those in Triton.
Importing batchkern never fails because one of them is missing or was built for another torch: the operations then run
their references, and ``batchkern info`` says why. On a GPU, where that costs most, a warning says it too.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from batchkern import triton
from batchkern.reference import within_transform as within_transform

OPS = (
    "cross_entropy",
    "trimmed_cross_entropy",
    "trimmed_mean",
    "select_rows",
    "linear_cross_entropy",
    "linear_trimmed_cross_entropy",
    "augment_latent",
    "soft_label_kl",
    "rank_batches",
)
DEVICES = ("cpu", "cuda")
MADE_OF = {
    "select_rows": "trimmed_mean",
    "linear_cross_entropy": "cross_entropy_losses",
    "linear_trimmed_cross_entropy": "cross_entropy_losses",
}
"""The operator that has the kernel, where it has another name. The linear ones are made of it and torch's matmul."""


def _import_extension() -> tuple[ModuleType | None, str]:
    """``batchkern._C``, or why it cannot be used."""
    try:
        # Not `from batchkern import _C`, which would report a missing one as a circular import.
        module = importlib.import_module("batchkern._C")
    except ImportError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return None, f"batchkern._C could not be imported ({reason}): install batchkern again"
    built, running = (version.split(".")[:2] for version in (module.build_facts()["torch"], torch.__version__))
    if built != running:
        pair = f"batchkern._C was built for torch {'.'.join(built)}, and this is torch {torch.__version__}"
        return None, f"{pair}: install batchkern again"
    return module, ""


extension, extension_error = _import_extension()
are_plain: Callable[[tuple[Any, ...], dict[str, Any]], bool] = getattr(extension, "are_plain", lambda *_: False)
"""Whether nothing is to be looked at before a call: see ``ops/_public.py``. False may mean that it is not known."""

in_memory: Callable[[Tensor], bool] = getattr(extension, "in_memory", lambda _: True)
"""Whether the storage of a tensor holds all of its elements. Without the module, which looks, it is said to."""


def large_empty(rows: int, columns: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """``(rows, columns)`` on the device of ``like``, uninitialised; on a CPU in memory that is used again, as
    csrc/cpu/memory.h says."""
    if extension is None or not like.is_cpu or type(like) not in (Tensor, torch.nn.Parameter):  # a fake tensor, say
        return torch.empty(rows, columns, dtype=dtype, device=like.device)
    found: Tensor = extension.large_empty(rows, columns, dtype)
    return found


def _torch_without_cuda() -> str:
    return "" if torch.version.cuda else f"torch {torch.__version__} was built without CUDA"


def _register_triton() -> str:
    """Adds the Triton kernels to the operators, or says why there are none."""
    if without_cuda := _torch_without_cuda():
        return without_cuda
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: install it"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler when it runs, and found neither CC nor gcc nor clang: install one"
    triton.register()
    return ""


triton_error = extension_error or _register_triton()


def _find_kernels() -> set[tuple[str, str]]:
    """The operations and device types for which the loaded libraries registered a kernel."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if extension is None:
        return set()
    return {
        (op, device) for op in OPS for device in DEVICES if has(f"batchkern::{MADE_OF.get(op, op)}", device.upper())
    }


_kernels = _find_kernels()
_supported: dict[tuple[str, int], bool] = {}
"""By operation and index of a CUDA device: whether the kernel runs there."""


def has_kernel(op: str, x: Tensor) -> bool:
    """Whether ``op`` has a kernel for tensors like ``x``. There are none for float64, nor within the transforms of
    ``torch.func`` and ``torch.jit.trace``: there the reference serves."""
    if x.dtype == torch.float64 or within_transform():
        return False
    # x.device.type makes two objects; this is asked in every call.
    if x.is_cpu:
        return (op, "cpu") in _kernels
    if not x.is_cuda:
        return False
    index = x.device.index or 0
    if torch.compiler.is_compiling():  # or a new entry in the dictionary would have it trace again
        return _find_out(op, index)
    known = _supported.get((op, index))
    return _find_out(op, index) if known is None else known


_warned = False


def _find_out(op: str, index: int) -> bool:
    """Whether this CUDA device can run the kernel of ``op``. The first time that it cannot, a warning says why."""
    if torch.compiler.is_compiling() or not torch.cuda.is_available():  # there, tensors are fake
        return (op, "cuda") in _kernels
    status = _status(op, "cuda", index)
    _supported[op, index] = status.backend == "kernel"
    global _warned
    if status.backend == "reference" and status.why not in (NO_KERNEL, _torch_without_cuda()) and not _warned:
        _warned = True
        warnings.warn(
            f"batchkern.{op} has no kernel for cuda:{index} and runs as plain PyTorch, slower and often in more "
            f"memory. {status.why}. This is said once, for all operations; `batchkern info` lists them.",
            stacklevel=5,  # whoever called the operation
        )
    return _supported[op, index]


# While the compiler traces it calls this function, as it would one decorated by torch.compiler.assume_constant_result,
# which takes a second to import. A compiler that does not would trace it, and find is_compiling().
_find_out._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _problem(op: str, index: int) -> str:
    """Why this CUDA device cannot run the kernel, and what would help; empty where it can."""
    major, minor = torch.cuda.get_device_capability(index)
    where = f"{_made_of(op)}, and this device is {major}.{minor}"
    if op in triton.OPS:
        return "" if (major, minor) >= triton.LEAST_CAPABILITY else f"{where}: it needs 8.0"
    remedy = f"set TORCH_CUDA_ARCH_LIST={major}.{minor} and install batchkern again"
    if not built_for((major, minor)):
        return f"{where}: {remedy}"
    answer = _driver_problem(index)
    return f"{where}, whose driver says '{answer}': update the driver, or {remedy}" if answer else ""


@functools.cache
def _driver_problem(index: int) -> str:
    """Why the driver cannot load the CUDA C++ kernels on this device, in its own words; empty where it can.

    A driver that is older than the nvcc of the build compiles none of its PTX.
    """
    answer: str = extension.cuda_problem(index) if extension is not None else ""
    return answer.rstrip(".")


def built_for(capability: tuple[int, int]) -> bool:
    """Whether the CUDA C++ kernels run on a device of this compute capability: (9, 0).

    Machine code serves the minor versions above its own; PTX, which the driver compiles, every version above its own.
    """
    for name in _architectures():
        number, _, ptx = name.partition("+")
        major, minor = (int(part) for part in number.split("."))
        if (major == capability[0] and minor <= capability[1]) or (ptx and (major, minor) <= capability):
            return True
    return False


def _architectures() -> list[str]:
    return [] if extension is None else list(extension.build_facts()["cuda_architectures"])


def operator(op: str) -> Callable[..., Any]:
    """The operator ``batchkern::op``, with all its arguments by place, for calls of a few microseconds.

    Both ways lead through PyTorch's dispatcher. The bound one takes 1 to 3 us less, of some 10 that a small call
    takes; the compiler can trace only PyTorch's own.
    """
    if torch.compiler.is_compiling():
        traced: Callable[..., Any] = getattr(torch.ops.batchkern, op).default
        return traced
    bound: Callable[..., Any] = getattr(extension, op)
    return bound


@dataclass(frozen=True)
class Status:
    op: str
    device: str
    backend: str
    """``"kernel"`` or ``"reference"``."""
    why: str


def status() -> list[Status]:
    """The backend of every operation on every device type, and why."""
    return [_status(op, device) for op in OPS for device in DEVICES]


NO_KERNEL = "this release has no kernel for it"


def _made_of(op: str) -> str:
    return _triton_version() if op in triton.OPS else f"CUDA C++ for {', '.join(_architectures())}"


def _triton_version() -> str:
    try:
        return f"Triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:  # there are distributions of other names
        return "Triton"


def _status(op: str, device: str, index: int | None = None) -> Status:
    if extension is None:
        return Status(op, device, "reference", extension_error)
    if device == "cpu" and (op, device) in _kernels:
        return Status(op, device, "kernel", f"C++, {extension.instruction_set()}")
    if device == "cuda" and (op, device) in _kernels:
        if not torch.cuda.is_available():
            return Status(op, device, "kernel", f"{_made_of(op)}; no CUDA device is visible to this torch")
        problem = _problem(op, torch.cuda.current_device() if index is None else index)
        return Status(op, device, "reference", problem) if problem else Status(op, device, "kernel", _made_of(op))
    if device == "cuda" and op in triton.OPS and triton_error:
        return Status(op, device, "reference", triton_error)
    if device == "cuda" and op not in triton.OPS and not extension.build_facts()["cuda"]:
        why = "batchkern._C was built without CUDA: install an nvcc, as README says, and batchkern again"
        return Status(op, device, "reference", _torch_without_cuda() or why)
    return Status(op, device, "reference", NO_KERNEL)
