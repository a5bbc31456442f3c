"""Every operation, dtype, case and keyword set on every backend against the float64 reference.

One test an operation and dtype: it goes through its calls, with --full some hundred, and reports each that is wrong by backend, case,
keyword set, list, index and element. Without --full every case meets every keyword set in one dtype, and each of both every dtype.
Beyond values it holds that data pointers stay, inputs and what is not due are bit-identical, and no memory around or between the
elements is touched; outputs hold NaN before the call.
"""

from collections.abc import Sequence

import pytest

from sam_kernels.validation.backends import backend_of
from sam_kernels.validation.cases import DTYPES, MIXED_NARROW, dtypes_for
from sam_kernels.validation.check import check
from sam_kernels.validation.options import OPTIONS
from tests.helpers.backends import all_calls, calls_in_pairs

ALL_DTYPES = (*DTYPES, MIXED_NARROW)


def dtypes_of(backend: str) -> tuple[str, ...]:
    return tuple(dtypes_for(backend_of(backend).dtypes))


def calls(op: str, dtype: str, backends: Sequence[str], is_full: bool) -> dict[tuple[str, str], list[str]]:
    """(case, keyword set) -> the backends to be called."""
    found: dict[tuple[str, str], list[str]] = {}
    for backend in backends:
        for call in (all_calls if is_full else calls_in_pairs)(op, dtypes_of(backend))[dtype]:
            found.setdefault(call, []).append(backend)
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("op", OPTIONS)
def test_matches_the_reference(backends: list[str], is_full: bool, op: str, dtype: str) -> None:
    chosen = [name for name in backends if dtype in dtypes_of(name)]
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
    found = [choose(op, dtypes_of(backend)) for choose in (calls_in_pairs, all_calls)]
    chosen, every = ([(dtype, *call) for dtype in calls_of for call in calls_of[dtype]] for calls_of in found)
    for axes in ((0, 1), (0, 2), (1, 2)):
        assert {tuple(call[axis] for axis in axes) for call in chosen} == {tuple(call[axis] for axis in axes) for call in every}
    assert len(chosen) < len(every) or len(OPTIONS[op]) == 1
