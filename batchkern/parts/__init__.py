"""The strategies as parts for anyone's loop, of which those of the trainer are made, too.

Samplers and a loader that keeps a pass an epoch; passive batches and their head; virtual samples; rates.
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
