"""Linear layers, and whatever has been unfolded into one."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels import _dispatch
from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels._validate import check_flag
from sam_kernels.functional._library import operation
from sam_kernels.functional.per_sample._checks import backend_for, check_how, check_on, check_output, check_shape

__all__ = ["linear_method", "linear_square_norms_"]


def linear_method(tokens: int, in_features: int, out_features: int, device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """``"gram"`` or ``"direct"``: what ``method="auto"`` does for such a layer with this device's kernels."""
    method: str = _dispatch.select_per_sample(device_type, [dtype]).linear_method(tokens, in_features, out_features)
    return method


@operation(written=("square_norms", "products"))
def linear_square_norms_(
    square_norms: Tensor,  # (M,) float64
    inputs: Tensor,  # (M, T, d)
    grad_outputs: Tensor,  # (M, T, p)
    products: Tensor | None = None,  # (M, p, d) float32, float64 where an operand is float64
    *,
    bias: bool = False,
    method: str = "auto",
    precision: str = "ieee",
) -> None:
    """Adds |G'A|^2, the squared norm of each group's weight gradient, to ``square_norms``. Never stores a (p, d) gradient.

    With ``bias`` also |sum over t of g_t|^2, the squared norm of the bias's gradient: as of inputs with a 1 behind the last feature. The
    Gram form has it for nothing, from (AA')_st + 1; beside the direct form it is one more read of G.

    ``method="gram"``: the sum over s, t of (AA')_st (GG')_st, from the symmetric halves of both: T^2 (d + p) flops a group.
    ``method="direct"``: the gradient's tiles, each squared in registers and dropped: 2 T d p flops a group. With ``products`` the tiles are
    stored there too, M p d elements written: a weighted gradient is then a weighted sum of them.
    ``method="auto"`` takes the one with less to do (:func:`linear_method`).
    ``precision`` of float32 operands on a device with tensor cores: ``"ieee"`` float32, or cut to ``"tf32"`` or
    rounded to ``"bf16"`` first.

    Sums of T or d float32 products lose about the square root of their number in ulp; a group whose gradient is much smaller than its
    terms |a||g| loses that many digits more by the Gram form. Reads A and G: M T (d + p) s bytes. Goodfellow, arXiv 1510.01799.
    """
    op = "linear_square_norms_"
    check_shape(op, "grad_outputs", grad_outputs, 3, "(groups, tokens, out_features)")
    check_shape(op, "inputs", inputs, 3, "(groups, tokens, in_features)")
    m, tokens, out_features = grad_outputs.shape
    if inputs.shape[:2] != (m, tokens):
        raise ValueError(
            f"{op}: inputs has shape {tuple(inputs.shape)}, grad_outputs {tuple(grad_outputs.shape)}: groups and tokens differ"
        )
    check_output(op, "square_norms", square_norms, (m,), torch.float64)
    if products is not None:
        check_output(op, "products", products, (m, out_features, inputs.shape[2]), arithmetic_dtype((inputs, grad_outputs)))
    check_how(op, method, precision, products)
    check_flag(op, "bias", bias)
    check_on(op, grad_outputs.device, {"square_norms": square_norms, "inputs": inputs, "products": products})
    if 0 in grad_outputs.shape or (0 in inputs.shape and not bias):
        if products is not None:
            products.zero_()
        return
    backend = backend_for(grad_outputs, inputs)
    if method == "auto":
        method = "direct" if products is not None else backend.linear_method(tokens, inputs.shape[2], out_features)
    inputs, grad_outputs = inputs.contiguous(), grad_outputs.contiguous()
    is_fused = bias and method == "gram" and inputs.shape[2] > 0
    if inputs.shape[2] > 0:
        backend.linear_square_norms_(square_norms, inputs, grad_outputs, products, bias=is_fused, method=method, precision=precision)
    if bias and not is_fused:
        wide = grad_outputs.double() if inputs.dtype is torch.float64 else grad_outputs
        sums = wide.new_empty((m, out_features), dtype=arithmetic_dtype((wide,)))
        backend.affine_grads_(None, sums, None, wide.unsqueeze(3))
        one = sums.new_ones(1).expand(m).view(m, 1, 1).contiguous()
        backend.linear_square_norms_(square_norms, one, sums.unsqueeze(1), None, bias=False, method="gram", precision="ieee")
