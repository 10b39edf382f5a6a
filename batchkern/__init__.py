"""Operations for training with selected mini-batches, and five published strategies that use them."""

from importlib import import_module
from typing import Any

from batchkern import _start  # noqa: F401  # must come before the import of torch
from batchkern._version import __version__
from batchkern.basis import Hadamard, random_basis
from batchkern.causal_lm import CausalLMPatch, ExcessLoss, patch_causal_lm
from batchkern.ops import (
    BatchLedger,
    LinearTrimmedCrossEntropyLoss,
    Rows,
    TrimmedCrossEntropyLoss,
    augment_latent,
    cross_entropy,
    linear_cross_entropy,
    linear_trimmed_cross_entropy,
    rank_batches,
    select_rows,
    soft_label_kl,
    trimmed_cross_entropy,
    trimmed_mean,
)

__all__ = [
    "BatchLedger",
    "CausalLMPatch",
    "ExcessLoss",
    "Hadamard",
    "LinearTrimmedCrossEntropyLoss",
    "Rows",
    "TrimmedCrossEntropyLoss",
    "__version__",
    "augment_latent",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_trimmed_cross_entropy",
    "load_model",
    "patch_causal_lm",
    "random_basis",
    "rank_batches",
    "select_rows",
    "soft_label_kl",
    "trimmed_cross_entropy",
    "trimmed_mean",
]


def __getattr__(name: str) -> Any:
    """Imports ``load_model`` on first use, since the operations do not need it."""
    if name == "load_model":
        return import_module("batchkern.trained").load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
