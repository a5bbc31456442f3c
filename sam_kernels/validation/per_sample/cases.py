"""Inputs of the operations per sample, as data: odd shapes, magnitudes, layouts and keyword sets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sam_kernels._unfold import output_sizes
from sam_kernels.validation.cases import DTYPES, copy_of, make_tensor, seed_of

__all__ = ["PER_SAMPLE_OPTIONS", "Call", "arithmetic_of", "build", "combinations"]

Options = dict[str, dict[str, Any]]

# "given" are the outputs of a call, of an operation for which some may be None.
_PRODUCTS: Options = {
    "gram": {"method": "gram"},
    "direct": {"method": "direct"},
    "auto": {},
    "products": {"given": ("products",)},
    "gram_tf32": {"method": "gram", "precision": "tf32"},
    "direct_bf16": {"method": "direct", "precision": "bf16"},
    "products_tf32": {"given": ("products",), "method": "direct", "precision": "tf32"},
}
PER_SAMPLE_OPTIONS: dict[str, Options] = {
    "linear_square_norms_": {
        **_PRODUCTS,
        "gram_bias": {"method": "gram", "bias": True},
        "direct_bias": {"method": "direct", "bias": True},
    },
    "conv_square_norms_": _PRODUCTS,
    "affine_grads_": {
        "both": {"given": ("weight_grads", "bias_grads")},
        "weight": {"given": ("weight_grads",)},
        "bias": {"given": ("bias_grads",)},
    },
    "embedding_square_norms_": {"plain": {}, "padding": {"padding_idx": 1}},
}


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
_STARTS = 0.25  # square_norms before: what is added must not replace it


@dataclass
class Call:
    """One call of an operation: tensors by the names of its arguments, and keywords."""

    op: str
    tensors: dict[str, Tensor | None]
    keywords: dict[str, Any]

    @property
    def written(self) -> list[str]:
        names = ("square_norms", "products", "weight_grads", "bias_grads")
        return [name for name in names if self.tensors.get(name) is not None]

    def double(self) -> Call:
        return Call(
            self.op,
            {n: t.to(torch.float64, copy=True) if t is not None and t.is_floating_point() else t for n, t in self.tensors.items()},
            self.keywords,
        )

    def on(self, device: str) -> Call:
        """Return a copy, inside copies of the memory around its tensors."""
        copies = {name: None if tensor is None else copy_of(tensor, device) for name, tensor in self.tensors.items()}
        return Call(self.op, copies, self.keywords)

    def run(self, module: Any) -> None:
        getattr(module, self.op)(**self.tensors, **self.keywords)


def combinations(op: str, dtype: str) -> Iterator[tuple[str, str]]:
    """The (case, keyword set) pairs to check an operation with, in any dtype."""
    options = PER_SAMPLE_OPTIONS[op]
    for case in (*_SHAPES[op], *_ABOUT):
        yield from ((case, option) for option in options)


def arithmetic_of(call: Call) -> torch.dtype:
    """Return float64 where an operand is float64, otherwise float32."""
    operands = [call.tensors.get(name) for name in ("inputs", "normalized", "grad_outputs")]
    return torch.float64 if any(t is not None and t.dtype is torch.float64 for t in operands) else torch.float32


def _dtypes(dtype: str, case: str) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the input and of the gradient."""
    kind = DTYPES.get(dtype)
    if kind is not None:
        return kind, kind
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    pairs = [(f32, bf16), (bf16, f16), (f16, f32)] + ([(f64, f32), (bf16, f64)] if dtype == "mixed" else [])
    return pairs[seed_of(case) % len(pairs)]


def build(op: str, case: str, dtype: str, option: str, seed: int = 0) -> Call:
    """Return the call that a case, a dtype and a keyword set describe. Only written tensors, and all memory around, hold NaN."""
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
        return Call(op, tensors, keywords)
    tensors["square_norms"] = make_tensor(
        torch.full((a,), 0.0 if case in ("tiny", "huge") else _STARTS, dtype=torch.float64), torch.float64, "contiguous"
    )
    if op == "embedding_square_norms_":
        tensors["indices"] = torch.randint(0, d, (a, b), generator=generator, dtype=torch.int32 if case == "strided" else torch.int64)
        tensors["grad_outputs"] = values(second, a, b, c, special=True)
        return Call(op, tensors, keywords)
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
    return Call(op, tensors, keywords)
