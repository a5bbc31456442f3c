"""Kernels without fused multiply-adds, in the order of csrc/common/formulas.h: the bits of the compiled CPU kernels.

Where scalars are exact in both; the others are checked against the reference.
"""

from functools import partial

import pytest
import torch

from sam_kernels._dispatch import reason_missing, use_backend
from sam_kernels.validation.cases import MIXED_NARROW
from tests.helpers.backends import all_calls, calls_in_pairs
from tests.helpers.bits import RANDOM, assert_same_perturbation, compare_written
from tests.helpers.exact import EXACT_OPS, with_exact_scalars

DTYPES = ("float32", "bfloat16", "float16", MIXED_NARROW)
OURS, THEIRS = partial(use_backend, "triton"), partial(use_backend, "native")


@pytest.fixture(autouse=True)
def _needs_the_cpu_kernels() -> None:
    if (reason := reason_missing("native")) is not None:
        pytest.skip(f"backend native: {reason}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", EXACT_OPS)
def test_same_bits_as_the_cpu_kernels(op: str, dtype: str, is_full: bool) -> None:
    """But for which NaN a NaN becomes, which is open, and for a first step skipped, which leaves zeros on a device.

    Without --full in calls that hold every pair of a dtype, a case and a keyword set.
    """
    choose = all_calls if is_full else calls_in_pairs
    calls = choose(op, DTYPES, ("nan", "inf", "many_tiny"), ("found_inf_first",))[dtype]
    assert compare_written(op, dtype, calls, OURS, THEIRS, with_exact_scalars) >= 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distribution", RANDOM)
def test_random_numbers_across_blocks_and_chunks(distribution: str, dtype: torch.dtype) -> None:
    """Chunks of 4,096 elements here, blocks of 2,048 without a mask and 1,024 with one."""
    assert_same_perturbation(distribution, dtype, (9000, 4096, 4098, 2047), OURS, THEIRS)
