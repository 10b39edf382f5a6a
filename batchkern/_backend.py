"""Which implementation serves an operation on a device: a registered kernel, else the plain-PyTorch reference.

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

from batchkern import reference

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
_kernels: dict[tuple[str, str], Callable[..., Any]] = {}


def register_kernel(op: str, device: str, function: Callable[..., Any]) -> None:
    """Make ``function`` serve ``op`` on device type ``device``; same signature as ``reference.<op>``."""
    _kernels[op, device] = function


def implementation(op: str, device: torch.device) -> Callable[..., Any]:
    """What computes ``op`` for tensors on ``device``."""
    kernel: Callable[..., Any] | None = _kernels.get((op, device.type))
    return getattr(reference, op) if kernel is None else kernel


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
    if (op, device) in _kernels:
        return Status(op, device, "kernel", "")
    if extension is None:
        return Status(op, device, "reference", extension_error)
    if device == "cuda" and not torch.cuda.is_available():
        return Status(op, device, "reference", "no CUDA device is visible to this torch")
    return Status(op, device, "reference", "this release has no kernel for it")
