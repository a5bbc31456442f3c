"""Problems whose scalars are the same number in float32, however they are computed.

Some scalars of a step (the perturbation's scale, 1 / grad_scale, the clip factor, Adam's bias corrections) are made in float32 on the
device and in float64 on the CPU, and may differ in their last bit.
"""

from __future__ import annotations

from sam_kernels.validation.problem import Problem

__all__ = ["EXACT_OPS", "with_exact_scalars"]

EXACT_OPS = ("perturb_", "random_perturb_", "restore_", "sgd_step_", "direction_norm_", "combine_")  # not Adam's


def with_exact_scalars(problem: Problem) -> Problem:
    """The problem itself, no norm and no division taking part in it any more."""
    if problem.op == "perturb_":
        problem.kwargs["lambd"] = 0.0
    for name in ("grad_scale", "max_norm"):
        problem.kwargs.pop(name, None)
    return problem
