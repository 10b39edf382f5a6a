"""The strategies as parts for anyone's loop: samplers, and a loader that keeps a pass an epoch."""

from batchkern.parts.samplers import EpochBatchSampler, HardBatchSampler, RandomBatchSampler, WholeEpochs
from batchkern.parts.subsets import StepwiseLR, SubsetSampler

__all__ = ["EpochBatchSampler", "HardBatchSampler", "RandomBatchSampler", "StepwiseLR", "SubsetSampler", "WholeEpochs"]
