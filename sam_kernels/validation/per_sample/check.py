"""One operation per sample on one backend against the float64 reference. As :mod:`sam_kernels.validation.check`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sam_kernels import _dispatch
from sam_kernels._dispatch import use_backend
from sam_kernels.functional import per_sample
from sam_kernels.reference import per_sample as reference
from sam_kernels.validation.cases import guards_intact
from sam_kernels.validation.check import AUTOMATIC
from sam_kernels.validation.compare import Worst, compare
from sam_kernels.validation.per_sample.bounds import bounds_of
from sam_kernels.validation.per_sample.cases import arithmetic_of, build

__all__ = ["check_per_sample", "has_per_sample"]


def has_per_sample(backend: str, device: str = "cpu") -> bool:
    """Whether a backend has these operations for the device."""
    with use_backend(None if backend == AUTOMATIC else backend):
        try:
            _dispatch.select_per_sample(torch.device(device).type)
        except RuntimeError:
            return False
    return True


def check_per_sample(
    op: str, backends: Sequence[str], dtype: str, case: str, option: str, seed: int = 0, device: str = "cpu"
) -> dict[str, Worst]:
    """For each backend the worst element of what the operation could have written, inputs and surrounding memory included."""
    before = build(op, case, dtype, option, seed)
    bounds = bounds_of(before)
    exact = before.double()
    exact.run(reference)
    if "square_norms" in bounds:  # added up in float64, with what was there before
        total: Any = exact.tensors["square_norms"]
        bounds["square_norms"] += (before.keywords.get("groups", 1) + 2) * 2.0**-53 * total.abs().nan_to_num()
    # Sums are float64, whatever they are of: they are judged in the arithmetic's ulp.
    arithmetic = arithmetic_of(before)
    found = {}
    for backend in backends:
        there = before.on(device)
        with use_backend(None if backend == AUTOMATIC else backend):
            there.run(per_sample)
        result = there.on("cpu")
        worst = Worst()
        for name, tensor in result.tensors.items():
            if tensor is None:
                continue
            if not guards_intact(tensor):
                worst = Worst(name, passed=False, reason="memory outside the tensor was written")
                break
            expected = exact.tensors[name]
            if name not in before.written:
                if torch.equal(tensor.nan_to_num(), before.tensors[name].nan_to_num()):  # type: ignore[union-attr]  # it is there
                    continue
                worst = Worst(name, passed=False, reason="an input was written")  # and what else is wrong follows from it
                break
            actual = tensor.to(arithmetic) if name == "square_norms" else tensor
            worst = max(worst, compare(name, [actual], [expected], [bounds[name].reshape(-1)], [before.tensors[name]]), key=Worst.badness)
        found[backend] = worst
    return found
