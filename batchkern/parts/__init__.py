"""The strategies as parts for anyone's loop: samplers, and a loader that keeps a pass an epoch."""

from batchkern.parts.samplers import EpochBatchSampler, HardBatchSampler, RandomBatchSampler, WholeEpochs

__all__ = ["EpochBatchSampler", "HardBatchSampler", "RandomBatchSampler", "WholeEpochs"]
