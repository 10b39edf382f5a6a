"""The parts of the strategies, for your own training loop; the strategies of the trainer are built from them, too.

Samplers, a loader whose pass is one epoch, passive batches and their head, virtual samples, learning rates.
"""

from batchkern.ops import TrimmedCrossEntropyLoss
from batchkern.parts.batch_loss import BatchLoss
from batchkern.parts.passive import SecondHead, inject, is_passive
from batchkern.parts.samplers import EpochBatchSampler, HardBatchSampler, RandomBatchSampler, WholeEpochs
from batchkern.parts.subsets import StepwiseLR, SubsetSampler
from batchkern.parts.virtual_samples import VirtualSamples

__all__ = [
    "BatchLoss",
    "EpochBatchSampler",
    "HardBatchSampler",
    "RandomBatchSampler",
    "SecondHead",
    "StepwiseLR",
    "SubsetSampler",
    "TrimmedCrossEntropyLoss",
    "VirtualSamples",
    "WholeEpochs",
    "inject",
    "is_passive",
]
