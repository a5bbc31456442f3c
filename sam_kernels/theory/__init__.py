"""What is proved about SAM: step sizes and bounds of Unified SAM, and which schedules converge. Plain functions of numbers."""

from sam_kernels.theory._admissible import admissible
from sam_kernels.theory._moments import expected_residual_of_moments
from sam_kernels.theory._reshuffling import reshuffling_bound, reshuffling_floor, reshuffling_steps
from sam_kernels.theory._unified import (
    descent_step,
    expected_residual,
    nonconvex_bound,
    nonconvex_steps,
    pl_bound,
    pl_constant_steps,
    pl_decreasing_steps,
    pl_floor,
    pl_largest_rho,
    residual_constant,
    sampled_smoothness,
)
from sam_kernels.theory._verdict import Admissible, Rates

__all__ = [
    "Admissible",
    "Rates",
    "admissible",
    "descent_step",
    "expected_residual",
    "expected_residual_of_moments",
    "nonconvex_bound",
    "nonconvex_steps",
    "pl_bound",
    "pl_constant_steps",
    "pl_decreasing_steps",
    "pl_floor",
    "pl_largest_rho",
    "reshuffling_bound",
    "reshuffling_floor",
    "reshuffling_steps",
    "residual_constant",
    "sampled_smoothness",
]
