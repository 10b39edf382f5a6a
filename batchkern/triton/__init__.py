"""The GPU kernels that are written in Triton, registered with the operators of ``batchkern._C``.

A kernel's module, and Triton itself, are imported when it is first called.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

KERNELS = {
    "augment_latent": "augment_latent",
    "augment_latent_backward": "augment_latent",
    "soft_label_kl": "soft_label_kl",
    "scale_gradient_": "soft_label_kl",
}
"""The module of each operator's launcher, which has the operator's name."""
OPS = frozenset(KERNELS.values())
LEAST_CAPABILITY = (8, 0)

_library = torch.library.Library("batchkern", "IMPL")


def register() -> None:
    for operator in KERNELS:
        _library.impl(
            operator, lambda *args, _operator=operator, **options: launcher(_operator)(*args, **options), "CUDA"
        )


@functools.cache
def launcher(operator: str) -> Callable[..., Any]:
    launch: Callable[..., Any] = getattr(importlib.import_module(f"batchkern.triton.{KERNELS[operator]}"), operator)
    return launch
