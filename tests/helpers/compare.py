"""Comparison of bits, with names and indices."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["assert_same_bits", "bits"]


def assert_same_bits(name: str, actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Bit for bit, a NaN's payload and the sign of a zero included."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), f"{name}[{i}] is {a}, expected {e}"
        if a is not None and e is not None:
            assert a.dtype is e.dtype, f"{name}[{i}] is {a.dtype}, expected {e.dtype}"
            assert bits(a).equal(bits(e)), f"{name}[{i}]: {int((bits(a) != bits(e)).sum())} bytes differ"


def bits(tensor: Tensor) -> Tensor:  # (bytes,) uint8
    """The memory of a tensor, in C order."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)
