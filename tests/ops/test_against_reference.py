"""Every operation, dtype, case and keyword set on every backend against the float64 reference.

One test an operation and dtype: it goes through its calls, with --full some hundred, and reports each that is wrong by backend, case,
keyword set, list, index and element. Without --full every case meets every keyword set in one dtype, and each of both every dtype.
Beyond values it holds that data pointers stay, inputs and what is not due are bit-identical, and no memory around or between the
elements is touched; outputs hold NaN before the call.
"""

from collections.abc import Sequence
from functools import cache

import pytest

from sam_kernels.validation.backends import backend_of
from sam_kernels.validation.cases import DTYPES, MIXED_NARROW, dtypes_for
from sam_kernels.validation.check import check, combinations
from sam_kernels.validation.options import OPTIONS
from tests.helpers.pairwise import covering_pairs

ALL_DTYPES = (*DTYPES, MIXED_NARROW)


@cache
def calls_in_pairs(op: str, backend: str) -> dict[str, list[tuple[str, str]]]:
    """For each dtype of a backend (case, keyword set) of few calls in which every pair of a case, a keyword set and a dtype occurs."""
    rows = [(dtype, case, option) for dtype in dtypes_for(backend_of(backend).dtypes) for case, option in combinations(op, dtype)]
    found: dict[str, list[tuple[str, str]]] = {}
    for i in covering_pairs([{"dtype": dtype, "case": case, "option": option} for dtype, case, option in rows]):
        found.setdefault(rows[i][0], []).append(rows[i][1:])
    return found


def calls(op: str, dtype: str, backends: Sequence[str], is_full: bool) -> dict[tuple[str, str], list[str]]:
    """(case, keyword set) -> the backends to be called."""
    found: dict[tuple[str, str], list[str]] = {}
    for backend in backends:
        for call in combinations(op, dtype) if is_full else calls_in_pairs(op, backend)[dtype]:
            found.setdefault(call, []).append(backend)
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("op", OPTIONS)
def test_matches_the_reference(backends: list[str], is_full: bool, op: str, dtype: str) -> None:
    chosen = [name for name in backends if dtype in dtypes_for(backend_of(name).dtypes)]
    if not chosen:
        pytest.skip(f"{', '.join(backends)}: no kernels for {dtype}, or covered by another")
    wrong = [
        f"{backend}, case {case}, option {option}: {worst}"
        for (case, option), called in calls(op, dtype, chosen, is_full).items()
        for backend, worst in check(op, called, dtype, case, option).items()
        if not worst.passed
    ]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("op", OPTIONS)
def test_pairs_leave_no_case_and_no_keyword_set_out(backend: str, op: str) -> None:
    chosen = [(dtype, *call) for dtype, calls_of in calls_in_pairs(op, backend).items() for call in calls_of]
    every = [(dtype, *call) for dtype in dtypes_for(backend_of(backend).dtypes) for call in combinations(op, dtype)]
    for axes in ((0, 1), (0, 2), (1, 2)):
        assert {tuple(call[axis] for axis in axes) for call in chosen} == {tuple(call[axis] for axis in axes) for call in every}
    assert len(chosen) < len(every) or len(OPTIONS[op]) == 1
