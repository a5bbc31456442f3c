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
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if (a is None) != (e is None):
            return failure(name, f"is {'None' if a is None else 'a tensor'}, expected {'None' if e is None else 'one'}", i)
        if a is not None:
            by_dtype.setdefault(a.dtype, []).append(i)
    worst = Worst(name)
    for dtype, indices in by_dtype.items():
        flat_actual = _flat(actual, indices)
        if flat_actual.numel():
            flat_starts = _flat(_or_zeros(starts, expected), indices).to(torch.float64)
            found = _worst_element(flat_actual, _flat(expected, indices), torch.cat([bounds[i] for i in indices]), flat_starts, dtype)
            index, element = _locate(found[0], [_numel(actual[i]) for i in indices])
            candidate = Worst(name, indices[index], element, *found[1:])
            worst = max(worst, candidate, key=Worst.badness)
    return worst


def _worst_element(
    actual: Tensor,  # (N,)
    expected: Tensor,  # (N,) float64
    bound: Tensor,  # (N,) float64
    start: Tensor,  # (N,) float64
    dtype: torch.dtype,
) -> tuple[int, float, float, float, float, bool]:  # position, error, bound, actual, expected, passed
    low, high = (expected - bound).to(dtype), (expected + bound).to(dtype)
    inside = (low <= actual) & (actual <= high)
    exact = (bound == 0) | ~expected.isfinite()
    passed = torch.where(exact, same_bits(actual, expected.to(dtype)), inside | bound.isinf())
    unit = ulp(torch.maximum(expected.abs().nan_to_num(posinf=0.0), start.abs().nan_to_num(posinf=0.0)), dtype)
    wide = actual.to(torch.float64)
    error = torch.where(wide == expected, 0.0, (wide - expected).abs() / unit).nan_to_num(posinf=torch.inf, nan=torch.inf)
    allowed = torch.maximum((low.to(torch.float64) - expected).abs(), (high.to(torch.float64) - expected).abs()) / unit
    unchecked = bound.isinf() | exact & passed
    used = torch.where(passed, torch.where(unchecked, 0.0, (error / (allowed + 0.5)).nan_to_num()), 1e300 + error)
    i = int(used.argmax())
    if bool(passed[i]) and bool(unchecked[i]):
        return i, 0.0, 0.0, wide[i].item(), expected[i].item(), True
    return i, error[i].item(), 0.0 if bool(exact[i]) else allowed[i].item(), wide[i].item(), expected[i].item(), bool(passed[i])


def _flat(tensors: Sequence[Tensor | None], indices: Sequence[int]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in (tensors[i] for i in indices) if tensor is not None])


def _or_zeros(starts: Sequence[Tensor | None], like: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [torch.zeros_like(e) if start is None and e is not None else start for start, e in zip(starts, like, strict=True)]


def _numel(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def _locate(position: int, numels: Sequence[int]) -> tuple[int, int]:
    """Return the tensor, and the element in it, at a position of their concatenation."""
    for i, numel in enumerate(numels):
        if position < numel:
            return i, position
        position -= numel
    raise IndexError(position)
