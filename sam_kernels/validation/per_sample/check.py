"""One operation per sample on some backends against the float64 reference, as :mod:`sam_kernels.validation.check`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_kernels.functional import per_sample
from sam_kernels.reference import per_sample as reference
from sam_kernels.validation.backends import using
from sam_kernels.validation.cases import guards_intact
from sam_kernels.validation.compare import Worst, compare, failure
from sam_kernels.validation.per_sample.bounds import bounds_of
from sam_kernels.validation.per_sample.cases import Call, arithmetic_of, build

__all__ = ["check_per_sample"]


def check_per_sample(
    op: str, backends: Sequence[str], dtype: str, case: str, option: str, seed: int = 0, device: str = "cpu"
) -> dict[str, Worst]:
    """Return, for each backend, the worst element of all that the operation could have written: inputs and surrounding memory included."""
    before = build(op, case, dtype, option, seed)
    bounds = bounds_of(before)
    exact = before.double()
    exact.run(reference)
    if "square_norms" in bounds:  # added to the number that was there before, in float64
        total: Any = exact.tensors["square_norms"]
        bounds["square_norms"] += (before.keywords.get("groups", 1) + 2) * 2.0**-53 * total.abs().nan_to_num()
    found = {}
    for backend in backends:
        there = before.on(device)
        with using(backend):
            there.run(per_sample)
        found[backend] = _worst(before, there.on("cpu"), exact, bounds)
    return found


def _worst(before: Call, result: Call, exact: Call, bounds: dict[str, Tensor]) -> Worst:
    worst = Worst()
    for name, tensor in result.tensors.items():
        if tensor is None:
            continue
        if not guards_intact(tensor):
            return failure(name, "memory outside the tensor was written")
        start = before.tensors[name]
        if name not in before.written:
            if not torch.equal(tensor.nan_to_num(), start.nan_to_num()):  # type: ignore[union-attr]  # it is there
                return failure(name, "an input was written")  # other errors follow from this one
            continue
        # Sums are float64 whatever their terms are: their errors are in ulp of the arithmetic.
        actual = tensor.to(arithmetic_of(before)) if name == "square_norms" else tensor
        worst = max(worst, compare(name, [actual], [exact.tensors[name]], [bounds[name].reshape(-1)], [start]), key=Worst.badness)
    return worst
