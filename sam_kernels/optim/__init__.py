"""Optimizers: thin wrappers over :mod:`sam_kernels.functional`."""

from sam_kernels.optim.presets import USAM, UnifiedSAM
from sam_kernels.optim.rwsam import RWSAM
from sam_kernels.optim.sam import SAM

__all__ = ["RWSAM", "SAM", "USAM", "UnifiedSAM"]
