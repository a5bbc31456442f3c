"""Compare lists of results with exact values and bounds: the worst element, its place and its error in ulp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sam_kernels.validation.tolerance import ulp

__all__ = ["Worst", "compare", "failure", "same_bits"]

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class Worst:
    """The element of a list that used most of its bound."""

    name: str = ""  # the list
    index: int = 0  # in the list
    element: int = 0  # in the tensor, in C order
    error: float = 0.0  # ulp of the stored type, at the larger of the result and what it was computed from
    bound: float = 0.0  # ulp
    relative: float = 0.0  # error over the larger of the result and what it was computed from
    actual: float = 0.0
    expected: float = 0.0
    passed: bool = True
    reason: str = ""

    def __str__(self) -> str:
        where = f"{self.name}[{self.index}]"
        if self.reason:
            return f"{where}: {self.reason}"
        error = f"{self.error:.3g} ulp off, {self.bound:.3g} allowed"
        return f"{where} element {self.element}: {self.actual!r}, expected {self.expected!r} ({error})"

    def badness(self) -> tuple[bool, float]:
        """A key that orders by severity: failures with a reason, other failures, then the part of the bound that was used."""
        if self.reason:
            return not self.passed, math.inf
        # + 0.5: else an element stored exactly where its bound ends says the most
        return not self.passed, self.error / (self.bound + 0.5)


def failure(name: str, reason: str, index: int = 0) -> Worst:
    """Return a failure that no number describes."""
    return Worst(name, index, passed=False, reason=reason)


def same_bits(a: Tensor, b: Tensor) -> Tensor:  # bool, the shape of a and b
    """Elements with the same bits. A NaN equals every NaN: IEEE 754 leaves open which one an operation gives."""
    kind = _BITS[a.element_size()]
    return (a.contiguous().view(kind) == b.contiguous().view(kind)) | (a.isnan() & b.isnan())


def compare(
    name: str,
    actual: Sequence[Tensor | None],  # n tensors
    expected: Sequence[Tensor | None],  # n float64 tensors
    bounds: Sequence[Tensor],  # n float64 tensors (numel,); 0: bit for bit
    starts: Sequence[Tensor | None],  # n tensors or None: what the results were computed from
) -> Worst:
    """Return the worst element. A result passes where it lies between the roundings of expected - bound and expected + bound."""
    if len(actual) != len(expected):
        return failure(name, f"{len(actual)} tensors, expected {len(expected)}")
    by_dtype: dict[torch.dtype, list[tuple[Tensor, ...]]] = {}
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if (a is None) != (e is None):
            return failure(name, f"is {'None' if a is None else 'a tensor'}, expected {'None' if e is None else 'one'}", i)
        if a is not None and e is not None and a.numel():
            start = torch.zeros_like(e) if (given := starts[i]) is None else given.to(torch.float64)
            by_dtype.setdefault(a.dtype, []).append(
                (torch.full((a.numel(),), i), a.reshape(-1), e.reshape(-1), bounds[i], start.reshape(-1))
            )
    worst = Worst(name)
    for dtype, rows in by_dtype.items():
        owners, *flat = (torch.cat(column) for column in zip(*rows, strict=True))
        found = _worst_element(*flat, dtype=dtype)
        index = int(owners[found[0]])
        element = found[0] - int((owners < index).sum())
        worst = max(worst, Worst(name, index, element, *found[1:]), key=Worst.badness)
    return worst


def _worst_element(
    actual: Tensor,  # (N,)
    expected: Tensor,  # (N,) float64
    bound: Tensor,  # (N,) float64
    start: Tensor,  # (N,) float64
    *,
    dtype: torch.dtype,
) -> tuple[int, float, float, float, float, float, bool]:  # position, error, bound, relative error, actual, expected, passed
    low, high = (expected - bound).to(dtype), (expected + bound).to(dtype)
    inside = (low <= actual) & (actual <= high)
    exact = (bound == 0) | ~expected.isfinite()
    passed = torch.where(exact, same_bits(actual, expected.to(dtype)), inside | bound.isinf())
    size = torch.maximum(expected.abs().nan_to_num(posinf=0.0), start.abs().nan_to_num(posinf=0.0))
    unit = ulp(size, dtype)
    wide = actual.to(torch.float64)
    error = torch.where(wide == expected, 0.0, (wide - expected).abs() / unit).nan_to_num(posinf=torch.inf, nan=torch.inf)
    allowed = torch.maximum((low.to(torch.float64) - expected).abs(), (high.to(torch.float64) - expected).abs()) / unit
    unchecked = bound.isinf() | exact & passed
    used = torch.where(passed, torch.where(unchecked, 0.0, (error / (allowed + 0.5)).nan_to_num()), 1e300 + error)
    i = int(used.argmax())
    if bool(passed[i]) and bool(unchecked[i]):
        return i, 0.0, 0.0, 0.0, wide[i].item(), expected[i].item(), True
    found, bounded = error[i].item(), 0.0 if bool(exact[i]) else allowed[i].item()
    relative = found if found in (0.0, math.inf) else (abs(wide[i] - expected[i]) / size[i]).item()
    return i, found, bounded, relative, wide[i].item(), expected[i].item(), bool(passed[i])
