"""The float32 roundings in the sums of each backend, counted from the way the backend cuts them.

foreach and the CPU kernels sum in float64 and have none. The CUDA kernels sum in float32 within a thread. The Triton kernels sum in float32
throughout; their inner products leave the chunks as float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sam_kernels._backend import Backend

__all__ = ["Roundings", "roundings_of"]

_KERNELS = {  # operation -> the kernel that sums
    "grad_norm": "norm",
    "grad_norms": "norm",
    "direction_norm_": "direction",
    "combine_": "combine",
    "grad_dots": "dots",
    "centralize_": "centralize",
}


@dataclass(frozen=True)
class Roundings:
    """The most float32 additions on the way of one number into its sum. None: the sum is float64."""

    terms: int | None = None  # of a term of the norm or of the inner products
    means: tuple[int, ...] | None = None  # of an element in the mean of its slice; one number a tensor


def roundings_of(
    backend: Backend,
    op: str,
    numels: Sequence[int],  # of the rows of one norm; other rows in the same call make its chunks larger, and fewer
    slice_sizes: Sequence[int] = (),  # of centralize_: 0 for a tensor that stays as it is
) -> Roundings:
    """Return the roundings of the sums of an operation on a backend. A backend without a rule here has none: the bound is the narrowest."""
    kernel = _KERNELS.get(op)
    if kernel is None:
        return Roundings()
    if backend.name == "triton":
        return _triton_centralize(numels, slice_sizes) if kernel == "centralize" else Roundings(_triton_terms(kernel, numels))
    if backend.name == "native.cuda" and kernel != "centralize":
        return Roundings(_cuda_terms(kernel, numels))
    return Roundings()


def _cuda_terms(kernel: str, numels: Sequence[int]) -> int:
    """A term is added within its thread, and with the terms of the same pack. Sums of threads and chunks are float64, and so are all sums
    of values that the same pass has written."""
    if kernel not in ("norm", "dots"):
        return 0
    from sam_kernels.backends.native.cuda import elements_per_thread  # not above: it imports the compiled kernels

    longest: int = elements_per_thread(max(numels, default=0))  # unaligned: all of a thread's elements in one sum
    return longest + 3


def _triton_terms(kernel: str, numels: Sequence[int]) -> int:
    """A term is added within its thread and through the tree over the block, the sum of a chunk likewise (of inner products in float64);
    then the kinds of sums are put together."""
    from sam_kernels.backends.triton._config import CONFIGS  # not above: it imports triton

    config = CONFIGS[kernel]
    block = config.block if kernel == "norm" else config.mixed_block // 2  # the smallest: of masked blocks in a row of several types
    chunks = sum(-(-numel // config.chunk_of(sum(numels))) for numel in numels)
    within = config.chunk // block + math.ceil(math.log2(config.block))
    return within + (0 if kernel == "dots" else _triton_across(chunks)) + 4


def _triton_across(chunks: int) -> int:
    """The sum of a chunk is added to those of other chunks within its thread, then through a tree."""
    from sam_kernels.backends.triton._config import FINISH_BLOCK

    return -(-chunks // FINISH_BLOCK) + math.ceil(math.log2(FINISH_BLOCK))


def _triton_centralize(numels: Sequence[int], slice_sizes: Sequence[int]) -> Roundings:
    """As :func:`_triton_terms`; an element is added to others of its thread, and through the tree over a block, for its mean as well."""
    from sam_kernels.backends.triton._config import CONFIGS
    from sam_kernels.backends.triton._slices import ALIGNED_ELEMENTS, columns_of, whole_slices

    config = CONFIGS["centralize"]
    chunk_size = config.chunk_of(sum(numels))
    means, terms, chunks = [0] * len(numels), 0, 0
    for i, (numel, size) in enumerate(zip(numels, slice_sizes, strict=True)):
        most = 0
        for block in {config.block, config.mixed_block}:
            columns, chunk = columns_of(size, block), whole_slices(size, block, chunk_size)
            most = max(most, -(-numel // chunk))
            if columns is None:  # blocks of the slice one after the other, half ones at the smallest; full ones and masked ones apart
                mean = within = -(-size // (block // 2)) + 1
            else:  # a thread has some of the slice: a thirty-second, or one access
                mean = max(columns // 32, ALIGNED_ELEMENTS)
                within = -(-chunk * columns // (max(size, 1) * block // 2)) + 1 if columns else -(-chunk // block)
            means[i] = max(means[i], mean + math.ceil(math.log2(block)))
            terms = max(terms, within + math.ceil(math.log2(block)))
        chunks += most
    return Roundings(terms + _triton_across(chunks) + 4, tuple(means))
