"""Products of tiles: what an operand is rounded to, and which units multiply."""

from __future__ import annotations

import triton
import triton.language as tl

from sam_kernels.backends.triton._blocks import convert
from sam_kernels.backends.triton._requirements import IS_INTERPRETED

__all__ = ["dot"]

# The interpreter multiplies the bits of bfloat16 as if they were integers: there operands are widened again once they are rounded.
_WIDENED = tl.constexpr(IS_INTERPRETED)


@triton.jit
def _rounded(x, KIND: tl.constexpr):
    if KIND == "bf16":
        x = convert(x, tl.bfloat16)
    elif KIND != "fp16":
        x = convert(x, tl.float32)
    if _WIDENED:
        x = convert(x, tl.float32)
    return x


@triton.jit
def dot(x, y, sums, KIND: tl.constexpr):
    """sums + x y, accumulated in float32. KIND: one of ``_config.KINDS``."""
    PRECISION: tl.constexpr = "tf32" if KIND == "tf32" else "ieee"
    return tl.dot(_rounded(x, KIND), _rounded(y, KIND), sums, input_precision=PRECISION)
