"""Kernels without fused multiply-adds, in the order of csrc/common/formulas.h: the bits of the compiled CPU kernels.

Where scalars are exact in both; the others are checked against the reference.
"""

import pytest

from sam_kernels._dispatch import reason_missing, use_backend
from tests.helpers.cases import MIXED_NARROW, build, combinations, run
from tests.helpers.compare import assert_same_bits
from tests.helpers.exact import EXACT_OPS, with_exact_scalars


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", MIXED_NARROW])
@pytest.mark.parametrize("op", EXACT_OPS)
def test_same_bits_as_the_cpu_kernels(op: str, dtype: str) -> None:
    if (reason := reason_missing("native")) is not None:
        pytest.skip(f"backend native: {reason}")
    compared = 0
    for case, option in combinations(op, dtype):
        if case in ("nan", "inf", "many_tiny") or option == "found_inf_first":
            continue  # which NaN a NaN becomes is open; a first step skipped leaves zeros on a device
        problems = {name: with_exact_scalars(build(op, case, dtype, option)) for name in ("native", "triton")}
        for name, problem in problems.items():
            with use_backend(name):
                run(problem)
        compared += 1
        for name, tensors in problems["native"].lists.items():
            assert_same_bits(f"case {case}, option {option}, {name}", problems["triton"].lists[name], tensors)
    assert compared >= 10
