"""One operation on gradient norms on some backends against the float64 reference, as :mod:`sam_kernels.validation.check`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels import functional, reference
from sam_kernels.validation.backends import using
from sam_kernels.validation.cases import guards_intact
from sam_kernels.validation.compare import Worst, compare, failure
from sam_kernels.validation.sharpness.cases import Call, build, weight_bounds

__all__ = ["check_sharpness"]


def check_sharpness(
    op: str, backends: Sequence[str], dtype: str, case: str, option: str, seed: int = 0, device: str = "cpu"
) -> dict[str, Worst]:
    """Return, for each backend, a failure or the weight that used most of its bound.

    Indices are compared one by one: no case is so close to a boundary that they might differ (tests/cli/test_validate_sharpness.py).
    """
    before = build(op, case, dtype, option, seed)
    exact = before.double().run(reference)
    found = {}
    for backend in backends:
        there = before.on(device)
        with using(backend):
            results = [tensor.to("cpu") for tensor in there.run(functional)]
        found[backend] = _input(before, there.on("cpu").norms) or _indices(before, results, exact) or _weights(before, results, exact)
    return found


def _input(before: Call, norms: Tensor) -> Worst | None:
    if not guards_intact(norms):
        return failure("norms", "memory outside the tensor was written")
    if not torch.equal(norms.nan_to_num(), before.norms.nan_to_num()):
        return failure("norms", "an input was written")
    return None


def _indices(before: Call, results: Sequence[Tensor], exact: Sequence[Tensor]) -> Worst | None:
    if len(exact) == 1:
        return None
    drawn, expected = results[0], exact[0]
    if drawn.dtype is not torch.int64 or drawn.shape != expected.shape:
        return failure("indices", f"{drawn.dtype} of shape {tuple(drawn.shape)}")
    if before.norms.isfinite().all():
        wrong = (drawn != expected).nonzero().flatten()
        if wrong.numel():
            j = int(wrong[0])
            reason = f"{wrong.numel()} of {drawn.numel()} differ, draw {j} is {int(drawn[j])}, expected {int(expected[j])}"
            return failure("indices", reason)
    elif not ((drawn >= 0) & (drawn < len(before.norms))).all():
        return failure("indices", "out of range")
    elif not before.keywords["replacement"] and len(set(drawn.tolist())) < len(drawn):
        return failure("indices", "drawn twice")
    return None


def _weights(before: Call, results: Sequence[Tensor], exact: Sequence[Tensor]) -> Worst:
    weights, expected = results[-1], exact[-1]
    if weights.dtype is not before.norms.dtype or weights.shape != expected.shape:
        return failure("weights", f"{weights.dtype} of shape {tuple(weights.shape)}")
    bounds = weight_bounds(before.double(), exact[0] if len(exact) > 1 else None, expected)
    return compare("weights", [weights], [expected], [bounds], [None])
