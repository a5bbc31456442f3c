"""Kernels without fused multiply-adds, in the order of csrc/common/formulas.h: the bits of the compiled CPU kernels.

Where a scalar of the step (the perturbation's scale, the clip factor, Adam's bias corrections) is made in float32 on the device and in
float64 on the CPU, the two may differ in its last bit: those options are left out here and checked against the reference.
"""

import pytest

from sam_kernels._dispatch import reason_missing, use_backend
from tests.helpers.cases import MIXED_NARROW, OPTIONS, build, combinations, run
from tests.helpers.compare import assert_same_bits

INEXACT = {"eps", "unified", "nearly_sam", "sam", "adaptive", "adaptive_eta", "from_old", "from_old_adaptive"}


def exact_options(op: str) -> list[str]:
    return [name for name, kwargs in OPTIONS[op].items() if name not in INEXACT and not {"grad_scale", "max_norm"} & set(kwargs)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", MIXED_NARROW])
@pytest.mark.parametrize("op", ["perturb_", "restore_", "sgd_step_"])
def test_same_bits_as_the_cpu_kernels(op: str, dtype: str) -> None:
    if (reason := reason_missing("native")) is not None:
        pytest.skip(f"backend native: {reason}")
    options = exact_options(op)
    assert options
    for case, option in combinations(op, dtype):
        if option not in options or case in ("nan", "inf", "many_tiny") or option == "found_inf_first":
            continue
        problems = {name: build(op, case, dtype, option) for name in ("native", "triton")}
        for name, problem in problems.items():
            with use_backend(name):
                run(problem)
        for name, tensors in problems["native"].lists.items():
            assert_same_bits(f"case {case}, option {option}, {name}", problems["triton"].lists[name], tensors)
