"""Gibbs weights of norms and draws from them: one launch each, float64 throughout, for norms in float32 and float64.

Every program reads all norms for itself: they are as many as a batch has samples and lie in the caches, so that nothing has to travel
from program to program.
"""

from sam_kernels.backends.triton.sharpness.sample import sharpness_sample
from sam_kernels.backends.triton.sharpness.weights import sharpness_weights

__all__ = ["sharpness_sample", "sharpness_weights"]
