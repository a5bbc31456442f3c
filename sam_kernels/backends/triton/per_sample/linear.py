"""Linear layers: which of the two forms, and the layers of one position, which need neither.

Specification: ``sam_kernels.reference.per_sample.linear_square_norms_``. One position a group: |g a'|^2 = |a|^2 |g|^2, with a
bias (|a|^2 + 1) |g|^2: a pass over both, one program a group, M (d + p) s bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton._blocks import load_float
from sam_kernels.backends.triton.per_sample._config import TILE_ELEMENTS
from sam_kernels.backends.triton.per_sample._launch import launch
from sam_kernels.backends.triton.per_sample.direct import direct_square_norms_
from sam_kernels.backends.triton.per_sample.gram import gram_square_norms_

__all__ = ["linear_method", "linear_square_norms_"]

_DIAGONAL = 64  # positions: half of the tiles on the diagonal is computed twice


@triton.jit
def _squares(row, features, BLOCK_SIZE: tl.constexpr):
    lanes = tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros([BLOCK_SIZE], tl.float32)
    for block in range(0, features, BLOCK_SIZE):
        x = load_float(row, block + lanes, features, True)
        sums = tl.fma(x, x, sums)
    return tl.sum(sums)


@triton.jit
def _one_position_kernel(
    square_norms,  # (M,) float64
    inputs,  # (M, d)
    grads,  # (M, p)
    in_features,
    out_features,
    bias,  # float32, 0 or 1
    INPUTS_BLOCK: tl.constexpr,
    GRADS_BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    a = _squares(inputs + group * in_features, in_features, INPUTS_BLOCK) + bias
    g = _squares(grads + group * out_features, out_features, GRADS_BLOCK)
    tl.store(square_norms + group, tl.load(square_norms + group) + a.to(tl.float64) * g.to(tl.float64))


def linear_method(tokens: int, in_features: int, out_features: int) -> str:
    """The one with fewer flops: T (T + 64) (d + p) against 2 T d p. That both run equally fast per flop is assumed, not measured."""
    return "gram" if tokens == 1 or (tokens + _DIAGONAL) * (in_features + out_features) <= 2 * in_features * out_features else "direct"


def linear_square_norms_(
    square_norms: Tensor,  # (M,) float64
    inputs: Tensor,  # (M, T, d)
    grad_outputs: Tensor,  # (M, T, p)
    products: Tensor | None,  # (M, p, d) float32
    *,
    bias: bool,
    method: str,
    precision: str,
) -> None:
    """See :func:`sam_kernels.functional.per_sample.linear_square_norms_`. ``bias``: in the Gram form alone.

    One position a group has no method, and no rounding."""
    m, tokens, in_features = inputs.shape
    out_features = grad_outputs.shape[2]
    if tokens == 1 and products is None:
        blocks = [min(TILE_ELEMENTS, triton.next_power_of_2(size)) for size in (in_features, out_features)]
        launch(
            _one_position_kernel,
            m,
            inputs.device,
            square_norms,
            inputs,
            grad_outputs,
            in_features,
            out_features,
            float(bias),
            INPUTS_BLOCK=blocks[0],
            GRADS_BLOCK=blocks[1],
        )
    elif method == "gram":
        gram_square_norms_(square_norms, inputs, grad_outputs, bias=bias, precision=precision)
    else:
        direct_square_norms_(square_norms, inputs, grad_outputs, products, precision)
