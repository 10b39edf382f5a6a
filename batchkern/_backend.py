"""Which implementation serves an operation on a device: a kernel, else the plain-PyTorch reference.

``batchkern._C`` holds the schemas and kernels. Importing batchkern never fails because it is missing or was built for
another torch: every operation then runs its reference, and ``batchkern info`` says why.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

OPS = (
    "trimmed_cross_entropy",
    "trimmed_mean",
    "linear_trimmed_cross_entropy",
    "augment_latent",
    "soft_label_kl",
    "rank_batches",
)
DEVICES = ("cpu", "cuda")


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


def _find_kernels() -> set[tuple[str, str]]:
    """The operations and device types for which the loaded libraries registered a kernel."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if extension is None:
        return set()
    return {(op, device) for op in OPS for device in DEVICES if has(f"batchkern::{op}", device.upper())}


_kernels = _find_kernels()


def has_kernel(op: str, x: Tensor) -> bool:
    """Whether ``op`` has a kernel for tensors like ``x``. There are none for float64, which the reference serves."""
    # x.device.type makes two objects; this is asked in every call.
    return (op, "cpu" if x.is_cpu else x.device.type) in _kernels and x.dtype != torch.float64


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


def _status(op: str, device: str) -> Status:
    if extension is not None and (op, device) in _kernels:
        return Status(op, device, "kernel", f"C++, {extension.cpu_level()}" if device == "cpu" else "CUDA or Triton")
    if extension is None:
        return Status(op, device, "reference", extension_error)
    if device == "cuda" and not torch.cuda.is_available():
        return Status(op, device, "reference", "no CUDA device is visible to this torch")
    return Status(op, device, "reference", "this release has no kernel for it")
