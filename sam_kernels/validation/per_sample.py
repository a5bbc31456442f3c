"""The operations per sample: inputs as data (odd shapes, magnitudes, layouts and keyword sets), and bounds by running error analysis.

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

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sam_kernels._unfold import output_sizes, unfolded
from sam_kernels.reference.per_sample import embedding_sample_grads
from sam_kernels.validation.backends import dtypes_of, has_per_sample
from sam_kernels.validation.cases import DTYPES, make_tensor, seed_of
from sam_kernels.validation.family import Family
from sam_kernels.validation.options import PER_SAMPLE_OPTIONS
from sam_kernels.validation.problem import Problem
from sam_kernels.validation.roundings import Roundings

__all__ = ["PerSample", "bounds_of", "written"]


@dataclass(frozen=True)
class Shape:
    """Sizes, by operation: (M, T, d, p); (M, samples of a group, in, out channels); (M, S, C, L); (M, T, D, rows)."""

    sizes: tuple[int, ...]
    conv: dict[str, Any] = field(default_factory=dict)
    positions: tuple[int, ...] = ()


def _conv(sizes: tuple[int, ...], positions: tuple[int, ...], kernel: tuple[int, ...], **options: Any) -> Shape:
    dims = len(kernel)
    defaults = {"stride": (1,) * dims, "padding": (0,) * dims, "dilation": (1,) * dims, "groups": 1}
    return Shape(sizes, {"kernel_size": kernel, **defaults, **options}, positions)


_SHAPES: dict[str, dict[str, Shape]] = {
    "linear_square_norms_": {
        "single": Shape((1, 1, 1, 1)),
        "one_token": Shape((5, 1, 17, 33)),
        "odd": Shape((3, 7, 5, 9)),
        "long": Shape((2, 131, 3, 5)),
        "wide": Shape((2, 3, 65, 130)),
        "tile_edges": Shape((2, 65, 64, 63)),
        "empty": Shape((2, 0, 3, 5)),
    },
    "conv_square_norms_": {
        "single": _conv((1, 1, 1, 1), (1,), (1,)),
        "line": _conv((3, 2, 4, 6), (11,), (3,), stride=(2,), padding=(1,), groups=2),
        "odd": _conv((3, 1, 3, 5), (7, 6), (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        "depthwise": _conv((2, 2, 4, 8), (5, 5), (3, 3), padding=(1, 1), groups=4),
        "pointwise": _conv((2, 1, 17, 9), (4, 3), (1, 1)),
        "volume": _conv((2, 1, 2, 3), (3, 4, 3), (2, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1)),
    },
    "affine_grads_": {
        "single": Shape((1, 1, 1, 1)),
        "rows": Shape((3, 7, 33, 1)),
        "planes": Shape((3, 1, 5, 67)),
        "odd": Shape((2, 3, 5, 7)),
        "long": Shape((2, 130, 3, 1)),
        "wide": Shape((2, 2, 300, 1)),
    },
    "embedding_square_norms_": {
        "single": Shape((1, 1, 1, 3)),
        "odd": Shape((3, 7, 5, 4)),
        "distinct": Shape((2, 5, 17, 1000)),
        "repeated": Shape((2, 65, 3, 2)),
    },
}
# Cases about the numbers, or about the layout; their shape is "odd".
_ABOUT = ("huge", "tiny", "nan", "zeros", "unaligned", "transposed", "strided")
_ROUNDED_TO = {"ieee": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-8}  # tf32: tensor cores may cut the last bits off
_STARTS = 0.25  # square_norms before: what is added must not replace it


class PerSample(Family):
    options = PER_SAMPLE_OPTIONS

    def cases(self, op: str) -> tuple[str, ...]:
        return (*_SHAPES[op], *_ABOUT)

    def dtypes_of(self, backend: str, device: str) -> list[str]:
        return dtypes_of(backend, device) if has_per_sample(backend, device) else []

    def build(self, op: str, case: str, dtype: str, option: str, seed: int = 0) -> Problem:
        tensors, keywords = _arguments(op, case, dtype, option, seed)
        return Problem(op, {name: [tensor] for name, tensor in tensors.items()}, keywords)

    def bounds(self, before: Problem, exact: Problem, roundings: Roundings) -> dict[str, list[Tensor]]:
        bounds = bounds_of(before)
        if "square_norms" in bounds:  # added to the number that was there before, in float64
            total = exact.tensor("square_norms")
            bounds["square_norms"] += (before.kwargs.get("groups", 1) + 2) * 2.0**-53 * total.abs().nan_to_num()
        return {name: [bound.reshape(-1)] for name, bound in bounds.items()}

    def in_arithmetic(self, after: Problem, name: str) -> list[Tensor | None]:
        """Sums are float64 whatever their terms are: their errors are in ulp of the arithmetic."""
        return [after.tensor(name).to(_arithmetic_of(after))] if name == "square_norms" else after.lists[name]


def _arithmetic_of(problem: Problem) -> torch.dtype:
    """Return float64 where an operand is float64, otherwise float32."""
    operands = [problem.lists.get(name, [None])[0] for name in ("inputs", "normalized", "grad_outputs")]
    return torch.float64 if any(t is not None and t.dtype is torch.float64 for t in operands) else torch.float32


def written(problem: Problem) -> list[str]:
    """Return the names of the outputs that are given."""
    names = ("square_norms", "products", "weight_grads", "bias_grads")
    return [name for name in names if name in problem.lists and problem.lists[name][0] is not None]


def _dtypes(dtype: str, case: str) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the input and of the gradient."""
    kind = DTYPES.get(dtype)
    if kind is not None:
        return kind, kind
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    pairs = [(f32, bf16), (bf16, f16), (f16, f32)] + ([(f64, f32), (bf16, f64)] if dtype == "mixed" else [])
    return pairs[seed_of(case) % len(pairs)]


def _arguments(op: str, case: str, dtype: str, option: str, seed: int) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed_of(seed, op, case, dtype, option))
    shape = _SHAPES[op].get(case, _SHAPES[op]["odd"])
    first, second = _dtypes(dtype, case)
    keywords = {**PER_SAMPLE_OPTIONS[op][option], **shape.conv}
    given = keywords.pop("given", ())

    def values(kind: torch.dtype, *sizes: int, special: bool = False) -> Tensor:
        numbers = torch.randn(sizes, generator=generator, dtype=torch.float64)
        narrow = float(torch.finfo(kind).max) ** 0.25 / 8
        scale = {"huge": min(1e9, narrow), "tiny": max(1e-12, float(torch.finfo(kind).smallest_normal)), "zeros": 0.0}.get(case, 1.0)
        numbers *= scale
        if case == "nan" and special:
            numbers[0].view(-1)[0] = math.nan
        layout = case if case in ("unaligned", "transposed", "strided") else "contiguous"
        return make_tensor(numbers, kind, layout)

    def output(kind: torch.dtype, *sizes: int) -> Tensor:
        return make_tensor(torch.full(sizes, math.nan, dtype=torch.float64), kind, "contiguous")

    a, b, c, d = shape.sizes
    arithmetic = torch.float64 if torch.float64 in (first, second) else torch.float32
    tensors: dict[str, Tensor | None] = {}
    if op == "affine_grads_":
        arithmetic = arithmetic if "weight_grads" in given else (torch.float64 if second is torch.float64 else torch.float32)
        tensors = {name: output(arithmetic, a, c) if name in given else None for name in ("weight_grads", "bias_grads")}
        tensors["normalized"] = values(first, a, b, c, d) if "weight_grads" in given else None
        tensors["grad_outputs"] = values(second, a, b, c, d, special=True)
        return tensors, keywords
    tensors["square_norms"] = make_tensor(
        torch.full((a,), 0.0 if case in ("tiny", "huge") else _STARTS, dtype=torch.float64), torch.float64, "contiguous"
    )
    if op == "embedding_square_norms_":
        tensors["indices"] = torch.randint(0, d, (a, b), generator=generator, dtype=torch.int32 if case == "strided" else torch.int64)
        tensors["grad_outputs"] = values(second, a, b, c, special=True)
        return tensors, keywords
    if op == "linear_square_norms_":
        tensors["inputs"], tensors["grad_outputs"] = values(first, a, b, c), values(second, a, b, d, special=True)
        weight: tuple[int, ...] = (d, c)
    else:
        sizes = [shape.conv[name] for name in ("kernel_size", "stride", "padding", "dilation")]
        tensors["inputs"] = values(first, a * b, c, *shape.positions)
        tensors["grad_outputs"] = values(second, a * b, d, *output_sizes(shape.positions, *sizes), special=True)
        weight = (d, c // shape.conv["groups"], *shape.conv["kernel_size"])
    if "products" in given:
        tensors["products"] = output(arithmetic, a, *weight)
    return tensors, keywords


def bounds_of(problem: Problem) -> dict[str, Tensor]:
    """Return the bounds of each tensor that is written, in its shape."""
    sums = _Sums(_arithmetic_of(problem), _ROUNDED_TO[problem.kwargs.get("precision", "ieee")])
    tensors: dict[str, Any] = {name: tensor for name, (tensor,) in problem.double().lists.items()}
    g = tensors["grad_outputs"].abs()
    if problem.op == "affine_grads_":
        terms = {"bias_grads": g} if tensors["normalized"] is None else {"bias_grads": g, "weight_grads": g * tensors["normalized"].abs()}
        n = g.shape[1] * g.shape[3]
        return {name: sums.inside(sums.of(n, terms[name].sum((1, 3)))) for name in written(problem)}
    if problem.op == "embedding_square_norms_":
        ids, padding = tensors["indices"], problem.kwargs.get("padding_idx")
        rows = int(ids.max()) + 1
        exact = embedding_sample_grads(ids, tensors["grad_outputs"], rows, padding)
        error = sums.of(g.shape[1], embedding_sample_grads(ids, g, rows, padding))
        return {"square_norms": sums.inside(sums.squares(exact, error))}
    a, g, split = tensors["inputs"], tensors["grad_outputs"], 1
    m = len(tensors["square_norms"])
    if problem.op == "conv_square_norms_":
        conv = {name: problem.kwargs[name] for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
        split = conv["groups"]
        a, g = unfolded(a, g, m, **conv)
    error = sums.of(g.shape[1], g.abs().mT @ a.abs(), rounded=True)
    formed = error
    if problem.kwargs.get("bias", False):  # a 1 behind the last feature
        a = torch.cat([a, torch.ones_like(a[:, :, :1])], 2)
        error = sums.of(g.shape[1], g.abs().mT @ a.abs(), rounded=True)
    direct = sums.squares(g.mT @ a, error)
    k, l = (each.abs() @ each.abs().mT for each in (a, g))  # noqa: E741 - the letters of the formula above
    e_k, e_l = sums.of(a.shape[2], k, rounded=True), sums.of(g.shape[2], l, rounded=True)
    tokens = a.shape[1]
    gram = (k * e_l + l * e_k + e_k * e_l).sum((1, 2)) + sums.of(tokens**2 + 1, ((k + e_k) * (l + e_l)).sum((1, 2)))
    method = "direct" if "products" in written(problem) else problem.kwargs.get("method", "auto")
    square = {"direct": direct, "gram": gram, "auto": torch.maximum(direct, gram)}[method]
    found = {"square_norms": sums.inside(square).view(m, split).sum(1)}
    if "products" in written(problem):
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
