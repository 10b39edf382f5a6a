"""Which implementation serves an operation on a device: a kernel, else the plain-PyTorch reference.

``batchkern._C`` holds the schemas and the kernels in C++ and CUDA C++; ``batchkern.triton`` adds those in Triton.
Importing batchkern never fails because one of them is missing or was built for another torch: the operations then run
their references, and ``batchkern info`` says why.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from batchkern import triton

OPS = (
    "trimmed_cross_entropy",
    "trimmed_mean",
    "linear_trimmed_cross_entropy",
    "augment_latent",
    "soft_label_kl",
    "rank_batches",
)
DEVICES = ("cpu", "cuda")
MADE_OF = {"linear_trimmed_cross_entropy": "cross_entropy_losses"}
"""The operator that has the kernel, where it has another name: of these losses and torch's matmul it is made."""


def _import_extension() -> tuple[ModuleType | None, str]:
    """``batchkern._C``, or why it cannot be used."""
    try:
        # Not `from batchkern import _C`, which would report a missing one as a circular import.
        module = importlib.import_module("batchkern._C")
    except ImportError as error:
        return None, f"batchkern._C could not be imported: {(str(error) or type(error).__name__).splitlines()[0]}"
    built, running = (version.partition("+")[0] for version in (module.build_facts()["torch"], torch.__version__))
    if built != running:
        return None, f"batchkern._C was built for torch {built}, and this is torch {running}: install batchkern again"
    return module, ""


extension, extension_error = _import_extension()


def _register_triton() -> str:
    """Adds the Triton kernels to the operators, or says why there are none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler when it runs, and found neither CC nor gcc nor clang"
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
    """Whether ``op`` has a kernel for tensors like ``x``. There are none for float64, which the reference serves."""
    # x.device.type makes two objects; this is asked in every call.
    if x.is_cpu:
        return (op, "cpu") in _kernels and x.dtype != torch.float64
    return (op, x.device.type) in _kernels and x.dtype != torch.float64 and (not x.is_cuda or _runs_on(op, x.device))


def _runs_on(op: str, device: torch.device) -> bool:
    """Whether this CUDA device can run the kernel. The compiler, which cannot ask it, takes that for granted."""
    index = device.index if device.index is not None else 0
    if (op, index) not in _supported and not torch.compiler.is_compiling():
        if not torch.cuda.is_available():  # fake tensors
            return True
        _supported[op, index] = _serves(op, torch.cuda.get_device_capability(index))
    return _supported.get((op, index), True)


def _serves(op: str, capability: tuple[int, int]) -> bool:
    return capability >= triton.LEAST_CAPABILITY if op in triton.OPS else built_for(capability)


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


def call(op: str) -> Callable[..., Any]:
    """The operator ``batchkern::op``, with all its arguments by place.

    Both ways lead through PyTorch's dispatcher. The bound one takes 1 to 3 us less, of some 10 that a small call
    takes; the compiler can trace only PyTorch's own.
    """
    if torch.compiler.is_compiling():
        operator: Callable[..., Any] = getattr(torch.ops.batchkern, op).default
        return operator
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


def _triton_version() -> str:
    try:
        return f"Triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:  # there are distributions of other names
        return "Triton"


def _status(op: str, device: str) -> Status:
    if extension is None:
        return Status(op, device, "reference", extension_error)
    if device == "cpu" and (op, device) in _kernels:
        return Status(op, device, "kernel", f"C++, {extension.cpu_level()}")
    if device == "cuda" and (op, device) in _kernels:
        if op in triton.OPS:
            built, remedy = _triton_version(), "it needs 8.0"
        else:
            built = f"CUDA C++ for {', '.join(_architectures())}"
            remedy = "set TORCH_CUDA_ARCH_LIST and install batchkern again"
        if not torch.cuda.is_available():
            return Status(op, device, "kernel", f"{built}; no CUDA device is visible to this torch")
        capability = torch.cuda.get_device_capability()
        if _serves(op, capability):
            return Status(op, device, "kernel", built)
        where = f"this device is {capability[0]}.{capability[1]}"
        return Status(op, device, "reference", f"{built}, and {where}: {remedy}")
    if device == "cuda" and op in triton.OPS and triton_error:
        return Status(op, device, "reference", triton_error)
    if device == "cuda" and op not in triton.OPS and not extension.build_facts()["cuda"]:
        return Status(op, device, "reference", "batchkern._C was built without CUDA")
    return Status(op, device, "reference", "this release has no kernel for it")
