"""Tables of checks: a row for each operation, backend and dtype, with the worst element of all its cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from sam_kernels.validation.cases import DTYPES, MIXED_NARROW
from sam_kernels.validation.check import FAMILIES, check, combinations
from sam_kernels.validation.compare import Worst, failure
from sam_kernels.validation.options import OPERATIONS

__all__ = ["ValidationRow", "count_rows", "validate_rows"]

# Three quarters of the time of a check of every case, by the processor's clock
LARGE_CASES, LONG_CASES = ("chunk_edges", "long_slices"), ("many_tiny",)


@dataclass(frozen=True)
class ValidationRow:
    """One operation on one backend in one dtype."""

    op: str
    backend: str
    dtype: str
    cases: int
    error_ulp: float  # of the element that used most of its bound, in ulp of the type it is stored in
    bound_ulp: float
    relative_error: float  # of that element, over the larger of the result and what it was computed from
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
    quick: bool = False,
) -> Iterator[ValidationRow]:
    """Yield a row for each operation, dtype and backend with kernels for both. A wrong result or an exception makes a failed row.

    ``quick``: the other cases and all keyword sets, but not each case with each set; of ``LARGE_CASES`` one dtype, and none of
    ``LONG_CASES``.
    """
    for op, dtype, takers in _groups(backends, ops, dtypes, device):
        pairs = combinations(op, dtype)
        yield from _validate_op(op, dtype, _covering(pairs, dtype) if quick else pairs, takers, seed, device)


def count_rows(backends: Sequence[str], ops: Sequence[str] = OPERATIONS, *, device: str = "cpu") -> int:
    """Return the number of rows that :func:`validate_rows` yields for all dtypes."""
    return sum(len(takers) for _, _, takers in _groups(backends, ops, (*DTYPES, MIXED_NARROW), device))


def _groups(backends: Sequence[str], ops: Sequence[str], dtypes: Sequence[str], device: str) -> Iterator[tuple[str, str, list[str]]]:
    """An operation, a dtype and the backends with kernels for both."""
    for op in ops:
        taken = {backend: FAMILIES[op].dtypes_of(backend, device) for backend in backends}
        for dtype in dtypes:
            takers = [backend for backend in backends if dtype in taken[backend]]
            if takers:
                yield op, dtype, takers


def _covering(pairs: Iterable[tuple[str, str]], dtype: str) -> Iterator[tuple[str, str]]:
    """The pairs in which a case or a keyword set occurs for the first time, without those that take long."""
    cases: set[str] = set()
    options: set[str] = set()
    for case, option in pairs:
        if case in LONG_CASES or (case in LARGE_CASES and dtype != "float32"):
            continue
        if case not in cases or option not in options:
            yield case, option
        cases.add(case)
        options.add(option)


def _validate_op(
    op: str, dtype: str, pairs: Iterable[tuple[str, str]], backends: Sequence[str], seed: int, device: str
) -> Iterator[ValidationRow]:
    worst = dict.fromkeys(backends, Worst())
    where = dict.fromkeys(backends, ("", ""))
    count = 0
    for case, option in pairs:
        count += 1
        for backend, found in _guarded(partial(check, op, backends, dtype, case, option, seed, device), backends).items():
            if where[backend] == ("", "") or found.badness() > worst[backend].badness():
                worst[backend], where[backend] = found, (case, option)
    for backend in backends:
        yield _row(op, backend, dtype, count, worst[backend], *where[backend])


def _row(op: str, backend: str, dtype: str, cases: int, worst: Worst, case: str, option: str) -> ValidationRow:
    words = f"case {case}, option {option}, {worst}"
    return ValidationRow(op, backend, dtype, cases, worst.error, worst.bound, worst.relative, worst.passed, case, option, words)


def _guarded(call: Callable[[], dict[str, Worst]], backends: Sequence[str]) -> dict[str, Worst]:
    """An exception is a finding like any other: the remaining operations are checked all the same."""
    try:
        return call()
    except Exception as error:
        return dict.fromkeys(backends, failure("call", f"raised {type(error).__name__}: {error}"))
