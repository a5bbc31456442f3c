"""Random numbers that are a function of (seed, row, element), as ``csrc/common/random.h`` defines them, in int64 arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sam_kernels._tensor_list import is_dense_row
from sam_kernels.backends.foreach._rows import arithmetic_dtypes, exact, start, write
from sam_kernels.operations import Operands, RandomPerturb

__all__ = ["random_perturb_", "rounded_stochastically", "uniforms"]

LANES, WORDS = 256, 4  # a counter serves four elements, each run of 256 elements takes consecutive counters
PERTURBATION_STREAM, ROUNDING_STREAM, SAMPLING_STREAM = 0, 1, 2
_MASK = 0xFFFFFFFF
_BATCH = 1 << 18  # counters


def _products(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of 32-bit numbers' products, b in halves: an int64 cannot hold a whole product."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _MASK


def _philox(counter: Tensor, row: Tensor, stream: int, seed: int) -> list[Tensor]:  # four of counter's shape, int64 in [0, 2^32)
    c0, c1, c2, c3 = counter & _MASK, counter >> 32, row, torch.full_like(row, stream)
    key0, key1 = seed & _MASK, seed >> 32
    for _ in range(10):
        high0, low0 = _products(0xD2511F53, c0)
        high1, low1 = _products(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def uniforms(indices: Tensor, seed: int) -> Tensor:  # (n,) int64 -> (n,) float64 in (0, 1)
    """52 random bits and a half for each index, as ``csrc/common/sampling.h`` has them."""
    words = _philox(indices, torch.zeros_like(indices), SAMPLING_STREAM, seed)
    return ((words[0] << 20 | words[1] >> 12).double() + 0.5) * 2.0**-52


def _words(tensors: Sequence[Tensor], row_indices: Sequence[int], *, seed: int, stream: int) -> Iterator[Tensor]:
    """For each tensor the words of its elements: (tiles, 4, lanes) int64, of which the first ``numel`` in C order are meant."""
    batch: list[tuple[int, int, int]] = []  # tiles, lanes, row index: many small rows are one computation
    waiting = 0
    for tensor, index in zip(tensors, row_indices, strict=True):
        lanes = min(tensor.numel(), LANES)
        tiles = -(-tensor.numel() // (LANES * WORDS))
        if batch and waiting + tiles * lanes > _BATCH:
            yield from _words_of(batch, seed, stream, tensor.device)
            batch, waiting = [], 0
        batch.append((tiles, lanes, index))
        waiting += tiles * lanes
    if batch:
        yield from _words_of(batch, seed, stream, tensors[0].device)


def _words_of(batch: Sequence[tuple[int, int, int]], seed: int, stream: int, device: torch.device) -> Iterator[Tensor]:
    counters = torch.cat([torch.arange(tiles * lanes, device=device) for tiles, lanes, _ in batch])
    rows = torch.cat([torch.full((tiles * lanes,), index, device=device) for tiles, lanes, index in batch])
    split = [torch.split(c, [tiles * lanes for tiles, lanes, _ in batch]) for c in _philox(counters, rows, stream, seed)]
    for (tiles, lanes, _), *row in zip(batch, *split, strict=True):
        yield torch.stack([c.view(tiles, lanes) for c in row], dim=1)


def _in_memory_order(flat: Tensor, row: Sequence[Tensor]) -> Tensor:
    """One number an element, shaped as the row's tensors: in their memory order where it is one, otherwise in C order."""
    first = row[0]
    return flat[: first.numel()].as_strided(first.shape, first.stride()) if is_dense_row(row) else flat[: first.numel()].view(first.shape)


def _rademachers(word: Tensor) -> Tensor:
    return 1.0 - 2.0 * (word >> 31).to(torch.float32)


def _normals(word: Tensor) -> Tensor:
    """Box and Muller, in float64 and rounded once."""
    fraction = (word >> 8).to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log((fraction[:, 0::2] + 1.0) * 2.0**-24))
    angle = fraction[:, 1::2] * (2.0 * math.pi * 2.0**-24)
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=2).to(torch.float32)


def rounded_stochastically(
    results: Sequence[Tensor], rows: Sequence[Sequence[Tensor]], row_indices: Sequence[int], seed: int
) -> list[Tensor]:
    """The results whose row's first tensor, the parameter, is bfloat16 rounded to that, the others as they are."""
    rounded = list(results)
    chosen = [i for i, row in enumerate(rows) if row[0].dtype is torch.bfloat16]
    row_words = _words([rows[i][0] for i in chosen], [row_indices[i] for i in chosen], seed=seed, stream=ROUNDING_STREAM)
    for i, word in zip(chosen, row_words, strict=True):
        single = results[i].to(torch.float32)
        below = _in_memory_order((word.reshape(-1) >> 16).to(torch.int32), rows[i])
        cut = ((single.view(torch.int32) + below) & -0x10000).view(torch.float32)
        rounded[i] = torch.where(torch.isfinite(single), cut, single).to(torch.bfloat16)
    return rounded


def random_perturb_(op: RandomPerturb, lists: Operands) -> None:
    """See :class:`sam_kernels.operations.RandomPerturb`."""
    params, old_params = lists["params"], lists["old_params"]
    if not op.from_old:
        torch._foreach_copy_(list(old_params), list(params))
    results = start(params, old_params if op.from_old else None, arithmetic_dtypes(op, lists), None)
    scale = exact(op.scale)
    numbers_of = _normals if op.distribution == "normal" else _rademachers
    row_words = _words(params, lists.indices, seed=op.seed, stream=PERTURBATION_STREAM)
    for result, param, old_param, word in zip(results, params, old_params, row_words, strict=True):
        # z is exact in either arithmetic; scale z is rounded before it is added, as in the kernels.
        factor = scale.to(result.dtype) if isinstance(scale, Tensor) else scale
        result.add_(_in_memory_order(numbers_of(word).reshape(-1), [param, old_param]).to(result.dtype) * factor)
    write(params, results, None)
