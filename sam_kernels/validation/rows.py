"""Tables of checks: a row for each operation, backend and dtype, with the worst element of all its cases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from sam_kernels.validation.backends import dtypes_of, has_per_sample
from sam_kernels.validation.cases import DTYPES, MIXED_NARROW
from sam_kernels.validation.check import check
from sam_kernels.validation.compare import Worst, failure
from sam_kernels.validation.options import OPTIONS, combinations
from sam_kernels.validation.per_sample.cases import PER_SAMPLE_OPTIONS
from sam_kernels.validation.per_sample.cases import combinations as per_sample_combinations
from sam_kernels.validation.per_sample.check import check_per_sample
from sam_kernels.validation.sharpness.cases import SHARPNESS_DTYPES, SHARPNESS_OPTIONS
from sam_kernels.validation.sharpness.cases import combinations as sharpness_combinations
from sam_kernels.validation.sharpness.check import check_sharpness

__all__ = ["OPERATIONS", "ValidationRow", "validate_rows"]


@dataclass(frozen=True)
class Family:
    """Operations that share their cases, their check and the backends that have them."""

    ops: Collection[str]
    combinations: Callable[[str, str], Iterator[tuple[str, str]]]  # operation, dtype -> (case, keyword set)
    check: Callable[..., dict[str, Worst]]
    dtypes_of: Callable[[str, str], Collection[str]]  # backend, device -> dtypes


def _per_sample_dtypes(backend: str, device: str) -> list[str]:
    return dtypes_of(backend, device) if has_per_sample(backend, device) else []


FAMILIES = (
    Family(OPTIONS, combinations, check, dtypes_of),
    Family(PER_SAMPLE_OPTIONS, per_sample_combinations, check_per_sample, _per_sample_dtypes),
    Family(SHARPNESS_OPTIONS, sharpness_combinations, check_sharpness, lambda backend, device: SHARPNESS_DTYPES),
)
OPERATIONS = tuple(op for family in FAMILIES for op in family.ops)


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
        family = next(family for family in FAMILIES if op in family.ops)
        taken = {backend: family.dtypes_of(backend, device) for backend in backends}
        for dtype in dtypes:
            takers = [backend for backend in backends if dtype in taken[backend]]
            if takers:
                yield from _validate_op(family, op, dtype, takers, seed, device)


def _validate_op(family: Family, op: str, dtype: str, backends: Sequence[str], seed: int, device: str) -> Iterator[ValidationRow]:
    worst = dict.fromkeys(backends, Worst())
    where = dict.fromkeys(backends, ("", ""))
    count = 0
    for case, option in family.combinations(op, dtype):
        count += 1
        for backend, found in _guarded(partial(family.check, op, backends, dtype, case, option, seed, device), backends).items():
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
