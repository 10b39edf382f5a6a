"""The GPU kernels that are written in Triton, registered with the operators of ``batchkern._C``.

A kernel's module, and Triton itself, are imported when it is first called.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

OPS = ("augment_latent", "soft_label_kl")
KERNELS = {
    "augment_latent": "augment_latent",
    "augment_latent_backward": "augment_latent",
    "soft_label_kl": "soft_label_kl",
}
"""The module of each operator's launcher, which has the operator's name."""
LEAST_CAPABILITY = (8, 0)

_library = torch.library.Library("batchkern", "IMPL")


def register() -> None:
    for operator, module in KERNELS.items():
        _library.impl(operator, _launcher(operator, module), "CUDA")


def _launcher(operator: str, module: str) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f"batchkern.triton.{module}"), operator)(*args, **options)

    return call
