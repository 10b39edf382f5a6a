"""The operations: one module each, with the public function, its checks and its docstring."""

from batchkern.ops.augment_latent import augment_latent
from batchkern.ops.cross_entropy import Rows, cross_entropy
from batchkern.ops.linear_cross_entropy import linear_cross_entropy
from batchkern.ops.linear_trimmed_cross_entropy import LinearTrimmedCrossEntropyLoss, linear_trimmed_cross_entropy
from batchkern.ops.rank_batches import BatchLedger, rank_batches
from batchkern.ops.soft_label_kl import soft_label_kl
from batchkern.ops.trimmed_cross_entropy import TrimmedCrossEntropyLoss, trimmed_cross_entropy
from batchkern.ops.trimmed_mean import select_rows, trimmed_mean

__all__ = [
    "BatchLedger",
    "LinearTrimmedCrossEntropyLoss",
    "Rows",
    "TrimmedCrossEntropyLoss",
    "augment_latent",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_trimmed_cross_entropy",
    "rank_batches",
    "select_rows",
    "soft_label_kl",
    "trimmed_cross_entropy",
    "trimmed_mean",
]
