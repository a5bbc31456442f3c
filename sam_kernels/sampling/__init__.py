"""Arbitrary sampling: samplers whose draws carry the weights that make the weighted mean of losses an unbiased estimate."""

from sam_kernels.sampling._weighted import WeightedDataset, WeightedIndex
from sam_kernels.sampling.adaptive import AdaptiveImportanceSampler
from sam_kernels.sampling.importance import ImportanceBatchSampler, ImportanceSampler
from sam_kernels.sampling.subsets import IndependentBatchSampler, TauNiceBatchSampler

__all__ = [
    "AdaptiveImportanceSampler",
    "ImportanceBatchSampler",
    "ImportanceSampler",
    "IndependentBatchSampler",
    "TauNiceBatchSampler",
    "WeightedDataset",
    "WeightedIndex",
]
