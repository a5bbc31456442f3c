"""Kernels without fused multiply-adds, in the order of csrc/common/formulas.h: the bits of the compiled CPU kernels.

Where scalars are exact in both; the others are checked against the reference.
"""

import pytest
import torch

from sam_kernels import functional
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distribution", ["rademacher", "normal", "rounding"])
def test_random_numbers_across_blocks_and_chunks(distribution: str, dtype: torch.dtype) -> None:
    """Chunks of 4,096 elements here, blocks of 2,048 without a mask and 1,024 with one; the third row begins askew."""
    if (reason := reason_missing("native")) is not None:
        pytest.skip(f"backend native: {reason}")
    start = [torch.randn(size).to(dtype) for size in (9000, 4096, 4098, 2047)]
    start[2] = start[2][1:]
    grads = [torch.randn(tensor.shape).to(dtype) for tensor in start]
    found = {}
    for name in ("native", "triton"):
        params, olds = [tensor.clone() for tensor in start], [torch.full_like(tensor, torch.nan) for tensor in start]
        params[2] = torch.cat([torch.zeros(1, dtype=dtype), start[2]])[1:]
        with use_backend(name):
            if distribution == "rounding":
                functional.perturb_(params, grads, olds, torch.tensor(1.0), rho=0.01, lambd=0.0, rounding_seed=2**40 + 7)
            else:
                functional.random_perturb_(params, olds, seed=2**63 + 5, scale=0.01, distribution=distribution)
        assert_same_bits("old_params", olds, start)
        found[name] = params
    assert_same_bits("params", found["triton"], found["native"])
    assert not torch.equal(found["native"][0], start[0])
