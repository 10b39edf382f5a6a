"""The choice of the implementation of an operation on a device: a kernel, or else the plain-PyTorch reference.

``batchkern._C`` holds the schemas and the kernels in C++ and CUDA C++; ``batchkern.triton`` adds those in Triton.
Importing batchkern never fails because one of them is missing or was built for another torch: the operations then run
their references, and ``batchkern info`` shows the reason. On a GPU, where that costs most, there is a warning, too.
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
"""The operator with the kernel, if it has another name. The linear operations combine it with torch's matmul."""


def _import_extension() -> tuple[ModuleType | None, str]:
    """``batchkern._C`` and an empty text, or None and the reason why it cannot be used."""
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
"""Whether a call needs no further checks: see ``ops/_public.py``. False is also the answer if this is not known."""

in_memory: Callable[[Tensor], bool] = getattr(extension, "in_memory", lambda _: True)
"""Whether the storage of a tensor holds all of its elements. Always True without the extension module."""


def large_empty(rows: int, columns: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """An uninitialised ``(rows, columns)`` tensor on the device of ``like``; on a CPU its memory is reused, see
    csrc/cpu/memory.h."""
    if extension is None or not like.is_cpu or type(like) not in (Tensor, torch.nn.Parameter):  # such as a fake tensor
        return torch.empty(rows, columns, dtype=dtype, device=like.device)
    found: Tensor = extension.large_empty(rows, columns, dtype)
    return found


def _torch_without_cuda() -> str:
    return "" if torch.version.cuda else f"torch {torch.__version__} was built without CUDA"


def _register_triton() -> str:
    """Registers the Triton kernels; returns an empty text, or the reason why this is not possible."""
    if without_cuda := _torch_without_cuda():
        return without_cuda
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: install it"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler when it runs, but found none (CC, gcc or clang): install one"
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
"""For each operation and index of a CUDA device, whether the kernel runs there."""


def has_kernel(op: str, x: Tensor) -> bool:
    """Whether ``op`` has a kernel for tensors like ``x``. There are none for float64, or within the transforms of
    ``torch.func`` and ``torch.jit.trace``, which use the reference."""
    if x.dtype == torch.float64 or within_transform():
        return False
    # x.device.type creates two objects, which is slow, and this runs in every call.
    if x.is_cpu:
        return (op, "cpu") in _kernels
    if not x.is_cuda:
        return False
    index = x.device.index or 0
    if torch.compiler.is_compiling():  # a new entry in the dictionary would cause another trace
        return _find_out(op, index)
    known = _supported.get((op, index))
    return _find_out(op, index) if known is None else known


_warned = False


def _find_out(op: str, index: int) -> bool:
    """Whether this CUDA device can run the kernel of ``op``. The first time that it cannot, a warning gives the
    reason."""
    if torch.compiler.is_compiling() or not torch.cuda.is_available():  # tensors are then fake
        return (op, "cuda") in _kernels
    status = _status(op, "cuda", index)
    _supported[op, index] = status.backend == "kernel"
    global _warned
    if status.backend == "reference" and status.why not in (NO_KERNEL, _torch_without_cuda()) and not _warned:
        _warned = True
        warnings.warn(
            f"batchkern.{op} has no kernel for cuda:{index} and runs as plain PyTorch, slower and often in more "
            f"memory. {status.why}. This warning is shown once for all operations; `batchkern info` lists them.",
            stacklevel=5,  # the caller of the operation
        )
    return _supported[op, index]


# The compiler calls this function while tracing, as if it were decorated by torch.compiler.assume_constant_result,
# which takes a second to import. A compiler without this mark would trace the function, and take the is_compiling()
# branch.
_find_out._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _problem(op: str, index: int) -> str:
    """The reason why this CUDA device cannot run the kernel, and a remedy; empty if it can."""
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
    """The driver's error message when it loads the CUDA C++ kernels on this device; empty if it can load them.

    A driver that is older than the nvcc of the build cannot compile its PTX.
    """
    answer: str = extension.cuda_problem(index) if extension is not None else ""
    return answer.rstrip(".")


def built_for(capability: tuple[int, int]) -> bool:
    """Whether the CUDA C++ kernels run on a device of this compute capability, such as (9, 0).

    Machine code also runs on higher minor versions; PTX, which the driver compiles, runs on all higher versions.
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
    """The operator ``batchkern::op``, with positional arguments only, for calls of a few microseconds.

    Both variants use PyTorch's dispatcher. The bound one takes 1 to 3 us less, of about 10 us for a small call; the
    compiler can trace only PyTorch's own.
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
    """The backend of every operation on every device type, and the reason."""
    return [_status(op, device) for op in OPS for device in DEVICES]


NO_KERNEL = "this release has no kernel for it"


def _made_of(op: str) -> str:
    return _triton_version() if op in triton.OPS else f"CUDA C++ for {', '.join(_architectures())}"


def _triton_version() -> str:
    try:
        return f"Triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:  # the distribution may have another name
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
        why = "batchkern._C was built without CUDA: install an nvcc (see README), and then batchkern again"
        return Status(op, device, "reference", _torch_without_cuda() or why)
    return Status(op, device, "reference", NO_KERNEL)
