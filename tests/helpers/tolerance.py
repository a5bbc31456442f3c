"""Derived bounds: see the derivation in :mod:`sam_kernels.validation.tolerance`."""

from sam_kernels.validation.bounds import bounds_of
from sam_kernels.validation.tolerance import Arithmetic, Rounded, norm_bound, ulp

__all__ = ["Arithmetic", "Rounded", "bounds_of", "norm_bound", "ulp"]
