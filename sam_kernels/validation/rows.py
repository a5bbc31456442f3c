"""Tables of checks: a row for each operation, backend and dtype, with the worst element of all its cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from sam_kernels.validation.cases import DTYPES, MIXED_NARROW
from sam_kernels.validation.check import FAMILIES, check, combinations
from sam_kernels.validation.compare import Worst, failure

__all__ = ["OPERATIONS", "ValidationRow", "validate_rows"]

OPERATIONS = tuple(FAMILIES)


@dataclass(frozen=True)
class ValidationRow:
    """One operation on one backend in one dtype."""

    op: str
    backend: str
    dtype: str
    cases: int
    error_ulp: float  # of the element that used most of its bound, in ulp of the type it is stored in
    bound_ulp: float
    passed: bool
    case: str  # where that element is
    option: str
    worst: str  # the same in words: case, keyword set, list, index, element, values


def validate_rows(
    backends: Sequence[str],
    ops: Sequence[str] = OPERATIONS,
    *,
    seed: int = 0,
    dtypes: Sequence[str] = (*DTYPES, MIXED_NARROW),
    device: str = "cpu",
) -> Iterator[ValidationRow]:
    """Yield a row for each operation, dtype and backend with kernels for both. A wrong result or an exception makes a failed row."""
    for op in ops:
        taken = {backend: FAMILIES[op].dtypes_of(backend, device) for backend in backends}
        for dtype in dtypes:
            takers = [backend for backend in backends if dtype in taken[backend]]
            if takers:
                yield from _validate_op(op, dtype, takers, seed, device)


def _validate_op(op: str, dtype: str, backends: Sequence[str], seed: int, device: str) -> Iterator[ValidationRow]:
    worst = dict.fromkeys(backends, Worst())
    where = dict.fromkeys(backends, ("", ""))
    count = 0
    for case, option in combinations(op, dtype):
        count += 1
        for backend, found in _guarded(partial(check, op, backends, dtype, case, option, seed, device), backends).items():
            if where[backend] == ("", "") or found.badness() > worst[backend].badness():
                worst[backend], where[backend] = found, (case, option)
    for backend in backends:
        yield _row(op, backend, dtype, count, worst[backend], *where[backend])


def _row(op: str, backend: str, dtype: str, cases: int, worst: Worst, case: str, option: str) -> ValidationRow:
    words = f"case {case}, option {option}, {worst}"
    return ValidationRow(op, backend, dtype, cases, worst.error, worst.bound, worst.passed, case, option, words)


def _guarded(call: Callable[[], dict[str, Worst]], backends: Sequence[str]) -> dict[str, Worst]:
    """An exception is a finding like any other: the remaining operations are checked all the same."""
    try:
        return call()
    except Exception as error:
        return dict.fromkeys(backends, failure("call", f"raised {type(error).__name__}: {error}"))
