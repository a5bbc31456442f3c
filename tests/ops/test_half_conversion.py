"""All 65,536 numbers of each 16-bit type, and every rounding to one that could go wrong."""

import pytest
import torch

from sam_kernels.validation.compare import same_bits
from tests.helpers.halves import VALUES, all_halves, deciding_floats, narrowed, widened

pytestmark = pytest.mark.usefixtures("wide_blocks")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@HALVES
def test_every_half_is_read_exactly(backend: str, dtype: torch.dtype) -> None:
    halves = all_halves(dtype)
    wrong = (~same_bits(widened(dtype), halves.to(torch.float32))).nonzero().flatten()
    assert wrong.numel() == 0, f"{wrong.numel()} of 65536, first {halves[wrong[0]]} (bits {wrong[0].item() - 32768})"


@HALVES
@pytest.mark.parametrize("path", VALUES)
def test_floats_are_rounded_to_nearest_even(backend: str, dtype: torch.dtype, path: str) -> None:
    floats = deciding_floats(dtype)
    wrong = (~same_bits(narrowed(dtype, path), floats.to(dtype))).nonzero().flatten()
    assert wrong.numel() == 0, f"{wrong.numel()} of {floats.numel()}, first {floats[wrong[0]]!r}"


@HALVES
def test_the_deciding_floats_decide(dtype: torch.dtype) -> None:
    """Truncation and rounding half away from zero both differ on them: the tests above can fail."""
    floats = deciding_floats(dtype)
    floats = floats[floats.isfinite() & (floats.abs() < torch.finfo(dtype).max)]
    nearest = floats.to(dtype)
    truncated = torch.where(nearest.to(torch.float32).abs() > floats.abs(), torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
    assert (truncated != nearest).sum() > 50_000
    ties = floats - torch.nextafter(nearest, torch.zeros_like(nearest)).to(torch.float32) == nearest.to(torch.float32) - floats
    assert ties.sum() > 10_000
