"""Described inputs as data, and the calls they describe."""

from sam_kernels.validation.cases import CASES, DTYPES, MIXED_NARROW, ROLES, Row, dtypes_for, guards_intact, make_tensor, rows_of
from sam_kernels.validation.check import Problem, build, check, combinations, concerns, run
from sam_kernels.validation.options import OPTIONS

__all__ = ["CASES", "DTYPES", "MIXED_NARROW", "OPTIONS", "ROLES", "Problem", "Row"]
__all__ += ["build", "check", "combinations", "concerns", "dtypes_for", "guards_intact", "make_tensor", "rows_of", "run"]
