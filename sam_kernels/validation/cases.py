"""Described inputs: lists of parameters as data, and the tensors they describe.

Every tensor lies inside a larger allocation filled with NaN: :func:`guards_intact` finds a write outside of the tensor or between its
elements, and a read from there turns the result into NaN.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = [
    "CASES",
    "DTYPES",
    "LAYOUT_CASES",
    "MIXED_NARROW",
    "ROLES",
    "Row",
    "copy_of",
    "dtypes_for",
    "guards_intact",
    "make_tensor",
    "rows_of",
    "seed_of",
    "uniform",
]

ROLES = ("params", "grads", "old_params", "state")
GUARD = 16  # elements on each side: 32 bytes of a 16-bit type, and a multiple of 64 bytes for the others, so that alignment stays
CHUNK = 65536  # kChunkSize of csrc/common/work_list.h
HUGE = 4e18  # its square still fits float32 and bfloat16
TINY = 1e-38  # the products with it are subnormal in float32 and bfloat16

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES: dict[str, torch.dtype | None] = {"float32": f32, "float64": f64, "bfloat16": bf16, "float16": f16, "mixed": None}
MIXED_NARROW = "mixed without float64"


@dataclass(frozen=True)
class Row:
    """One parameter with its gradient and state. ``dtypes`` and ``layouts`` are by role; a role not named has the first one's."""

    shape: tuple[int, ...]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    magnitude: float = 1.0  # of the gradient
    param_magnitude: float = 1.0
    special: float | None = None  # put into every third element of the gradient
    state_magnitude: float | None = None  # of the averages; None: the gradient's

    def layout(self, role: str) -> str:
        return self.layouts.get(role, self.layouts.get("all", "contiguous"))


def uniform(*shapes: tuple[int, ...], **layouts: str) -> Callable[[torch.dtype], list[Row]]:
    return lambda dtype: [Row(shape, dict.fromkeys(ROLES, dtype), layouts) for shape in shapes]


def _magnitudes(
    grad: float, param: float = 1.0, special: float | None = None, state: float | None = None
) -> Callable[[torch.dtype], list[Row]]:
    def rows(dtype: torch.dtype) -> list[Row]:
        limit = float(torch.finfo(dtype).max) ** 0.5 / 8  # float16: 32
        smallest = float(torch.finfo(dtype).smallest_normal)
        sizes = (grad, param, grad if state is None else state)
        grad_size, param_size, state_size = (max(min(size, limit), smallest) if size else 0.0 for size in sizes)
        shapes = [(257,), (1000,), (3, 5)]
        return [Row(shape, dict.fromkeys(ROLES, dtype), {}, grad_size, param_size, special, state_size) for shape in shapes]

    return rows


def _mixed_layouts(dtype: torch.dtype) -> list[Row]:
    """Rows whose tensors do not lie in the same order."""
    dtypes = dict.fromkeys(ROLES, dtype)
    image = (2, 3, 5, 7)
    return [
        Row(image, dtypes, {"params": "channels_last"}),
        Row(image, dtypes, {"all": "channels_last", "grads": "contiguous"}),
        Row(image, dtypes, {"old_params": "channels_last", "grads": "strided"}),
        Row((33, 17), dtypes, {"params": "transposed", "state": "strided"}),
        Row((33, 17), dtypes, {"all": "transposed", "state": "contiguous"}),
        Row((6, 4, 1, 1), dtypes, {"params": "channels_last"}),
        Row((9,), dtypes, {"params": "strided", "grads": "unaligned"}),
    ]


CASES: dict[str, Callable[[torch.dtype], list[Row]]] = {
    "single": uniform((128,)),
    "odd_sizes": uniform(*((n,) for n in (1, 7, 255, 256, 257))),
    "chunk_edges": uniform((CHUNK - 1,), (CHUNK,), (CHUNK + 1,)),
    "many_tiny": uniform(*[(3,)] * 1000),
    "empty_in_middle": uniform((5,), (0,), (3, 0, 2), (7,), (0,), ()),
    "unaligned_views": uniform((4,), (63,), (1025,), all="unaligned"),
    "transposed": uniform((33, 17), (5, 1), (2, 3, 4), all="transposed"),
    "strided": uniform((33, 17), (301,), all="strided"),
    "channels_last": uniform((2, 3, 5, 7), (4, 1, 3, 3), all="channels_last"),
    "mixed_layouts": _mixed_layouts,
    "expanded_grads": lambda dtype: [Row((33, 17), dict.fromkeys(ROLES, dtype), {"grads": "expanded"})],
    "slices": uniform((1, 257), (9, 1), (64, 1, 3, 3), (2, 3, 2, 2, 2), (70, 31), (300, 64), (5, 33), (3, 256), (4, 1030)),
    "unaligned_slices": uniform((5, 64), (3, 300), all="unaligned"),
    "long_slices": uniform((1, 200_000), (2, CHUNK + 1), (4, 40_000)),
    "zero_grads": _magnitudes(0.0),
    "huge": _magnitudes(HUGE),
    "huge_params": _magnitudes(1.0, HUGE),
    "tiny": _magnitudes(TINY, TINY),
    "long_state": _magnitudes(1e-6, state=1e3),
    "nan": _magnitudes(1.0, special=math.nan),
    "inf": _magnitudes(1.0, special=math.inf),
}


# These cases vary where elements lie and how the work is cut. No keyword changes that: two keyword sets an operation are enough.
LAYOUT_CASES = (
    "single", "chunk_edges", "many_tiny", "empty_in_middle", "unaligned_views", "transposed", "strided", "channels_last",
)  # fmt: skip


def mixed_dtype(rows: list[Row]) -> list[Row]:
    """The rows with dtypes that differ between rows and within them: master weights, 16-bit gradients, 16-bit and float64 states."""
    combinations = (
        (f32, f32, f32, f32),
        (bf16, bf16, bf16, f32),
        (f16, f16, f16, f32),
        (f32, bf16, f32, f32),
        (f32, f16, f32, bf16),
        (bf16, f32, f32, f32),
        (f16, bf16, f32, f16),
        (f64, f64, f64, f64),
        (f64, f32, f64, f32),
        (f32, f64, f32, f32),
        (bf16, bf16, f64, bf16),
        (f32, f32, bf16, f64),
    )
    return _with_dtypes(rows, combinations)


def _with_dtypes(rows: list[Row], combinations: Sequence[tuple[torch.dtype, ...]]) -> list[Row]:
    return [
        replace(rows[i % len(rows)], dtypes=dict(zip(ROLES, combinations[i % len(combinations)], strict=True)))
        for i in range(max(len(rows), len(combinations)))
    ]


def rows_of(case: str, dtype: str) -> list[Row]:
    """The rows of a named case in a named dtype."""
    kind = DTYPES.get(dtype)
    if kind is not None:
        return CASES[case](kind)
    mixed = mixed_dtype(CASES[case](f16))
    if dtype != MIXED_NARROW:
        return mixed
    narrow = [tuple(row.dtypes[role] for role in ROLES) for row in mixed if f64 not in row.dtypes.values()]
    return _with_dtypes(CASES[case](f16), list(dict.fromkeys(narrow)))


def dtypes_for(supported: Collection[torch.dtype] | None) -> list[str]:
    """Return the names of the dtypes that a backend can be checked with. None: it supports all."""
    if supported is None:
        return list(DTYPES)
    return [*(name for name, kind in DTYPES.items() if kind in supported), MIXED_NARROW]


def seed_of(*names: object) -> int:
    """Return the same number for the same names in every process."""
    return zlib.crc32("/".join(map(str, names)).encode())


def _strides(shape: tuple[int, ...], layout: str) -> tuple[tuple[int, ...], int]:
    """Strides and storage offset of a layout."""
    strides = [math.prod([max(size, 1) for size in shape[i + 1 :]]) for i in range(len(shape))]
    if layout == "transposed":
        strides = [math.prod([max(size, 1) for size in shape[:i]]) for i in range(len(shape))]
    elif layout == "channels_last":
        strides = list(torch.empty(shape, memory_format=torch.channels_last).stride())
    elif layout == "strided":
        strides = [2 * stride for stride in strides]
    elif layout == "expanded":
        strides[0] = 0
    elif layout not in ("contiguous", "unaligned"):
        raise ValueError(f"unknown layout {layout!r}")
    return tuple(strides), 1 if layout == "unaligned" else 0


def make_tensor(values: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """``values``, of any shape, rounded to ``dtype`` and laid out inside a guarded allocation."""
    strides, offset = _strides(tuple(values.shape), layout)
    span = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) if values.numel() else 0
    storage = torch.full((span + offset + 2 * GUARD,), math.nan, dtype=dtype)
    tensor = storage.as_strided(values.shape, strides, GUARD + offset)
    if layout == "expanded":
        storage.as_strided(values[:1].shape, strides, GUARD + offset).copy_(values[:1])
    else:
        tensor.copy_(values)
    return tensor


def copy_of(tensor: Tensor, device: str, copies: dict[int, Tensor] | None = None) -> Tensor:
    """Return a copy of a tensor on ``device``, inside a copy of its allocation.

    ``copies`` holds the allocations that were copied before. Pass one for all tensors of a call: memory that they share stays shared.
    """
    copies = {} if copies is None else copies
    whole = tensor if tensor._base is None else tensor._base
    if whole._cdata not in copies:
        copies[whole._cdata] = whole.to(device, copy=True)
    copy = copies[whole._cdata]
    return copy if tensor._base is None else copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def guards_intact(tensor: Tensor) -> bool:
    """Return whether nothing was written around or between the elements of a tensor from :func:`make_tensor`."""
    storage = tensor._base
    if storage is None:
        return True
    outside = torch.ones(storage.shape, dtype=torch.bool)
    outside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    return bool(storage[outside].isnan().all())
