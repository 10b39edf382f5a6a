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

extension: ModuleType | None
extension_error = ""
try:
    # Not `from batchkern import _C`, which would report a missing one as a circular import.
    extension = importlib.import_module("batchkern._C")
except ImportError as error:
    extension = None
    extension_error = (str(error) or type(error).__name__).splitlines()[0]

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
        return Status(op, device, "reference", f"batchkern._C could not be imported: {extension_error}")
    if device == "cuda" and not torch.cuda.is_available():
        return Status(op, device, "reference", "no CUDA device is visible to this torch")
    return Status(op, device, "reference", "this release has no kernel for it")
