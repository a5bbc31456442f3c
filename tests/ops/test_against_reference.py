"""Every operation, dtype, case and keyword set on every backend against the float64 reference.

One test an operation and dtype: it goes through some hundred calls and reports each that is wrong by backend, case, keyword set, list,
index and element. Beyond values it holds that data pointers stay, inputs and what is not due are bit-identical, and no memory around or
between the elements is touched; outputs hold NaN before the call.
"""

import pytest

from sam_kernels.validation.backends import backend_of
from sam_kernels.validation.cases import DTYPES, MIXED_NARROW, dtypes_for
from sam_kernels.validation.check import check
from sam_kernels.validation.options import OPTIONS, combinations


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [*DTYPES, MIXED_NARROW])
@pytest.mark.parametrize("op", OPTIONS)
def test_matches_the_reference(backends: list[str], op: str, dtype: str) -> None:
    chosen = [name for name in backends if dtype in dtypes_for(backend_of(name).dtypes)]
    if not chosen:
        pytest.skip(f"{', '.join(backends)}: no kernels for {dtype}, or covered by another")
    wrong = [
        f"{backend}, case {case}, option {option}: {worst}"
        for case, option in combinations(op, dtype)
        for backend, worst in check(op, chosen, dtype, case, option).items()
        if not worst.passed
    ]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])
