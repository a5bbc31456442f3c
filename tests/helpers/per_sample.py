"""Cases of the operations per sample, shared by the tests of every backend, and how far a result may be from the float64 reference.

The bounds are of the two forms, for terms in any order: a sum of n products is off by at most n u of the sum of absolute products, u being
half a unit in the last place (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). What adds the terms of a norm in float64 adds
nothing to that; a backend that adds them in float32 is allowed ``SUMMED`` more roundings, as many as a tree of blocks has levels and lanes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sam_kernels import _dispatch
from sam_kernels._unfold import output_sizes, unfolded

__all__ = [
    "AFFINE",
    "CONVOLUTIONS",
    "DTYPES",
    "EMBEDDINGS",
    "LINEAR",
    "SHARP",
    "Convolution",
    "arithmetic",
    "guarded",
    "linear_bound",
    "require",
    "unit",
]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F32, F16), (F16, BF16), (F64, F32)]  # inputs, grad_outputs
SHARP = {F32: 5e-6, F64: 1e-12}  # relative, on random numbers: of the arithmetic
SUMMED = {"native": 2, "triton": 128, "foreach": 128}

# (groups, tokens, in_features, out_features): around the lengths of vectors, the edges of tiles, panels and blocks, more than one block
LINEAR = [
    (1, 1, 1, 1),
    (5, 1, 33, 7),
    (3, 2, 15, 16),
    (2, 7, 31, 13),
    (2, 14, 32, 14),
    (3, 15, 1, 33),
    (2, 24, 17, 65),
    (2, 25, 64, 31),
    (1, 31, 13, 257),
    (4, 32, 48, 32),
    (2, 33, 255, 1),
    (1, 65, 256, 24),
    (1, 128, 257, 129),
    (1, 255, 30, 23),
    (2, 257, 34, 49),
    (1, 289, 7, 300),
    (1, 513, 31, 33),
    (1, 9, 530, 270),
]


@dataclass(frozen=True)
class Convolution:
    groups_of_samples: int
    samples: int
    channels: tuple[int, int]
    sizes: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def options(self) -> dict[str, tuple[int, ...]]:
        return {"kernel_size": self.kernel_size, "stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def tensors(self, inputs: torch.dtype, grads: torch.dtype) -> tuple[Tensor, Tensor]:
        out = output_sizes(self.sizes, *self.options().values())
        return (
            torch.randn(self.samples, self.channels[0], *self.sizes).to(inputs),
            torch.randn(self.samples, self.channels[1], *out).to(grads),
        )

    def rows(self, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """As a linear layer: (groups of samples x groups of channels, tokens, features)."""
        return unfolded(inputs, grads, self.groups_of_samples, *self.options().values(), self.groups)


CONVOLUTIONS = {
    "3x3": Convolution(2, 2, (3, 8), (8, 8), (3, 3), (1, 1), (1, 1), (1, 1)),
    "wide_lines": Convolution(1, 1, (2, 5), (6, 67), (3, 3), (1, 1), (1, 1), (1, 1)),
    "several_blocks_of_positions": Convolution(1, 1, (2, 3), (23, 31), (3, 3), (1, 1), (1, 1), (1, 1)),
    "features_over_a_block": Convolution(2, 2, (31, 13), (4, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
    "strided": Convolution(2, 2, (5, 6), (9, 8), (3, 3), (2, 2), (1, 1), (1, 1)),
    "uneven_everything": Convolution(1, 4, (4, 6), (9, 7), (3, 2), (2, 1), (1, 2), (1, 2), 2),
    "micro_batches": Convolution(3, 6, (16, 17), (4, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
    "micro_batches_by_lines": Convolution(2, 4, (3, 4), (5, 18), (3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1": Convolution(2, 4, (16, 33), (5, 5), (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1_strided": Convolution(2, 2, (16, 8), (8, 8), (1, 1), (2, 2), (0, 0), (1, 1)),
    "1x1_padded": Convolution(2, 2, (3, 4), (4, 5), (1, 1), (1, 1), (1, 2), (1, 1)),
    "depthwise": Convolution(2, 2, (6, 6), (10, 10), (3, 3), (1, 1), (1, 1), (1, 1), 6),
    "channel_groups": Convolution(2, 4, (8, 12), (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "more_padding_than_kernel": Convolution(1, 2, (2, 3), (3, 3), (2, 2), (1, 1), (4, 3), (1, 1)),
    "nothing_but_padding_at_the_edge": Convolution(1, 1, (2, 3), (2, 20), (1, 3), (3, 1), (5, 9), (1, 4)),
    "1d": Convolution(2, 4, (4, 8), (30,), (5,), (2,), (3,), (2,)),
    "1d_long": Convolution(2, 2, (3, 2), (1300,), (7,), (1,), (3,), (1,), 1),
    "3d": Convolution(3, 3, (2, 4), (5, 6, 7), (3, 3, 2), (1, 2, 1), (1, 0, 1), (1, 1, 2)),
    "3d_wide": Convolution(1, 2, (2, 3), (4, 5, 20), (2, 3, 3), (1, 1, 1), (1, 1, 1), (2, 1, 1)),
    "box_larger_than_a_slab": Convolution(1, 1, (1, 2), (40, 40, 40), (2, 2, 2), (1, 1, 1), (0, 0, 0), (38, 38, 38)),
    "box_that_is_halved": Convolution(1, 1, (2, 2), (3, 17, 17), (2, 2, 2), (1, 1, 1), (0, 8, 8), (1, 15, 15)),
}

AFFINE = [  # (groups, S, channels, L)
    (1, 1, 1, 1),
    (3, 5, 7, 1),
    (1, 1000, 300, 1),
    (2, 33, 257, 1),
    (2, 3, 5, 49),
    (1, 4, 600, 7),
    (4, 1, 3, 1024),
    (1, 130, 2, 31),
    (2, 1, 65, 257),
]

EMBEDDINGS = [  # (groups, tokens, dim, vocabulary)
    (1, 1, 1, 1),
    (3, 50, 70, 10),
    (1, 600, 300, 20),
    (2, 513, 33, 3),
    (1, 700, 5, 1),
    (2, 257, 256, 3000),
]


def require(backend: str, *dtypes: torch.dtype) -> None:
    """Skips where a backend has none of the operations, or none for a dtype."""
    try:
        _dispatch.select_per_sample("cpu", set(dtypes))
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"{backend}: {error}")


def arithmetic(*dtypes: torch.dtype) -> torch.dtype:
    return F64 if F64 in dtypes else F32


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def guarded(shape: tuple[int, ...], dtype: torch.dtype, fill: float = math.nan) -> tuple[Tensor, Callable[[], None]]:
    """A contiguous tensor amid memory that nobody may write, and the check of it."""
    numel, around = math.prod(shape), 64
    memory = torch.full((numel + 2 * around,), -12345.0, dtype=dtype)
    inner = memory[around : around + numel]
    inner.fill_(fill)

    def check() -> None:
        outside = itertools.chain(memory[:around].tolist(), memory[around + numel :].tolist())
        assert all(value == -12345.0 for value in outside), "written out of bounds"

    return inner.view(shape), check


def linear_bound(backend: str, method: str, inputs: Tensor, grads: Tensor) -> Tensor:  # (M, T, d), (M, T, p) -> (M,)
    """How far |G'A|^2 may be off, from the operands as they are stored. Both forms: see the module's docstring."""
    u, added = unit(arithmetic(inputs.dtype, grads.dtype)), SUMMED[backend]
    a, g = inputs.double(), grads.double()
    exact = torch.finfo(torch.float64).eps * 64  # the reference's own error
    if method == "gram":
        terms = (a.abs() @ a.abs().mT * (g.abs() @ g.abs().mT)).sum((1, 2))
        return terms * ((a.shape[2] + g.shape[2] + added) * u * 1.01 + exact)
    product, size = (g.mT @ a).abs(), g.abs().mT @ a.abs()
    error = size * a.shape[1] * u * 1.01
    return (2 * product * error + error.square() + product.square() * added * u + size.square() * exact).sum((1, 2))
