"""Bounds of the operations per sample: running error analysis of sums of products, in any order, fused or not.

With u the unit roundoff of the arithmetic and h its smallest subnormal, a sum of n products lies within n u' of the sum of their absolute
values, u' = u / (1 - n u), and n h. A product of operands rounded first (``precision``), each by up to r, is off by 2 r + r^2 more.

* Products P = G'A, formed: e = (T u' + 2 r + r^2) |G|'|A| + T h. Their squares, N = p d of them: 2 |P| e + e^2 each, and (N + 1) u' of
  the sum of (|P| + e)^2.
* The Gram form, K = |A||A|' and L = |G||G|' elementwise: the sums of d and of p products are off by e_K and e_L, as above, their products
  by K e_L + L e_K + e_K e_L, and the T^2 of them by (T^2 + 1) u' of the sum of (K + e_K)(L + e_L). The bound is relative to the terms, not
  to the norm: where they cancel, the digits are lost.

The float64 reference errs alike, and a value that leaves the range of the arithmetic has no bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sam_kernels._unfold import unfolded
from sam_kernels.reference.per_sample import embedding_sample_grads
from sam_kernels.validation.per_sample.cases import Call, arithmetic_of

__all__ = ["bounds_of"]

_ROUNDED_TO = {"ieee": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-8}  # tf32: tensor cores may cut the last bits off


def bounds_of(call: Call) -> dict[str, Tensor]:
    """Return the bounds of each tensor that is written, in its shape."""
    sums = _Sums(arithmetic_of(call), _ROUNDED_TO[call.keywords.get("precision", "ieee")])
    tensors: dict[str, Any] = call.double().tensors
    g = tensors["grad_outputs"].abs()
    if call.op == "affine_grads_":
        terms = {"bias_grads": g} if tensors["normalized"] is None else {"bias_grads": g, "weight_grads": g * tensors["normalized"].abs()}
        n = g.shape[1] * g.shape[3]
        return {name: sums.inside(sums.of(n, terms[name].sum((1, 3)))) for name in call.written}
    if call.op == "embedding_square_norms_":
        ids, padding = tensors["indices"], call.keywords.get("padding_idx")
        rows = int(ids.max()) + 1
        exact = embedding_sample_grads(ids, tensors["grad_outputs"], rows, padding)
        error = sums.of(g.shape[1], embedding_sample_grads(ids, g, rows, padding))
        return {"square_norms": sums.inside(sums.squares(exact, error))}
    a, g, split = tensors["inputs"], tensors["grad_outputs"], 1
    m = len(tensors["square_norms"])
    if call.op == "conv_square_norms_":
        conv = {name: call.keywords[name] for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
        split = conv["groups"]
        a, g = unfolded(a, g, m, **conv)
    error = sums.of(g.shape[1], g.abs().mT @ a.abs(), rounded=True)
    formed = error
    if call.keywords.get("bias", False):  # a 1 behind the last feature
        a = torch.cat([a, torch.ones_like(a[:, :, :1])], 2)
        error = sums.of(g.shape[1], g.abs().mT @ a.abs(), rounded=True)
    direct = sums.squares(g.mT @ a, error)
    k, l = (each.abs() @ each.abs().mT for each in (a, g))  # noqa: E741 - the letters of the formula above
    e_k, e_l = sums.of(a.shape[2], k, rounded=True), sums.of(g.shape[2], l, rounded=True)
    tokens = a.shape[1]
    gram = (k * e_l + l * e_k + e_k * e_l).sum((1, 2)) + sums.of(tokens**2 + 1, ((k + e_k) * (l + e_l)).sum((1, 2)))
    method = "direct" if "products" in call.written else call.keywords.get("method", "auto")
    square = {"direct": direct, "gram": gram, "auto": torch.maximum(direct, gram)}[method]
    found = {"square_norms": sums.inside(square).view(m, split).sum(1)}
    if "products" in call.written:
        found["products"] = sums.inside(formed).reshape(tensors["products"].shape)
    return found


class _Sums:
    """Bounds of sums in one arithmetic."""

    def __init__(self, arithmetic: torch.dtype, rounded_to: float) -> None:
        info = torch.finfo(arithmetic)
        self._u = info.eps / 2 + 2.0**-53  # the reference's own
        self._h = info.smallest_normal * info.eps
        self._largest = info.max
        self._operands = 0.0 if arithmetic is torch.float64 else 2 * rounded_to + rounded_to**2

    def of(self, terms: int, magnitude: Tensor, *, rounded: bool = False) -> Tensor:
        """The bound of a sum of ``terms`` numbers whose absolute values sum to ``magnitude``."""
        each = terms * self._u / (1 - terms * self._u) + (self._operands if rounded else 0.0)
        return each * magnitude + terms * self._h

    def squares(self, exact: Tensor, error: Tensor) -> Tensor:  # (M, ...) -> (M,)
        exact, error = exact.abs().flatten(1), error.flatten(1)
        return (2 * exact * error + error.square()).sum(1) + self.of(exact.shape[1] + 1, (exact + error).square().sum(1))

    def inside(self, bound: Tensor) -> Tensor:
        """No bound where a sum on the way may have left the range: the bound is at least u times the largest number on the way."""
        return torch.where(bound / self._u <= self._largest, bound, torch.inf)
