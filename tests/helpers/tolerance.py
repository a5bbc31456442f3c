"""Derived bounds: see the derivation in :mod:`sam_kernels.cli._tolerance`."""

from sam_kernels.cli._bounds import bounds_of
from sam_kernels.cli._tolerance import Arithmetic, Rounded, norm_bound, ulp

__all__ = ["Arithmetic", "Rounded", "bounds_of", "norm_bound", "ulp"]
