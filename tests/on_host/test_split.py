"""How lists of tensors are cut into launches and chunks (csrc/cuda/split.h, multi_tensor.cuh). No memory is touched."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch

from sam_kernels import _cuda_on_host
from sam_kernels.backends.native import cuda
from sam_kernels.operations import GradNorms, Operands

SPLITS = {"small": _cuda_on_host.SmallSplit, "large": _cuda_on_host.LargeSplit}
BYTES = {"small": 4096, "large": 32764}
ROLES = 4  # of the tables: sgd's
MOST_CHUNKS = 2**31 - 1

sizes_of_tables = pytest.mark.parametrize("size", SPLITS)


def chunks_of(numel: int, chunk_size: int) -> int:
    return -(-numel // chunk_size)


def located(split: Any) -> list[tuple[int, int, int]]:
    """(row, first element, elements) of every chunk, in the order of launches."""
    return [split.locate(launch, chunk) for launch, chunks in enumerate(split.chunks()) for chunk in range(chunks)]


def expected(numels: Sequence[int], chunk_size: int) -> list[tuple[int, int, int]]:
    return [(row, begin, min(chunk_size, numel - begin)) for row, numel in enumerate(numels) for begin in range(0, numel, chunk_size)]


def random_sizes(generator: random.Random, count: int, largest: int) -> list[int]:
    """Of all magnitudes, every fourth empty."""
    return [0 if generator.random() < 0.25 else min(int(2 ** generator.uniform(0, largest)), 2**largest) for _ in range(count)]


@sizes_of_tables
def test_every_element_is_in_one_chunk_in_order(size: str) -> None:
    generator = random.Random(1)
    capacity = SPLITS[size].CAPACITY
    for trial in range(60):
        chunk_size = generator.choice([1024, 2048, 65536])
        count = generator.choice([0, 1, 2, capacity - 1, capacity, capacity + 1, 2 * capacity, generator.randrange(3 * capacity)])
        numels = random_sizes(generator, count, 14)
        if trial % 10 == 0:
            numels = [*numels, chunk_size - 1, chunk_size, chunk_size + 1, 0]
        assert located(SPLITS[size](numels, chunk_size)) == expected(numels, chunk_size)


@sizes_of_tables
@pytest.mark.parametrize("numels", [[], [0], [0] * 1000, [0, 5, 0], [5, 0], [0, 5]], ids=repr)
def test_empty_tensors_have_no_chunk(size: str, numels: list[int]) -> None:
    split = SPLITS[size](numels, 1024)
    assert len(split.chunks()) == (1 if any(numels) else 0)
    assert located(split) == expected(numels, 1024)


def assert_borders(split: Any, numels: Sequence[int], chunk_size: int) -> None:
    """Of lists too large to enumerate: the first, the second and the last chunks of each row, and that the numbers of chunks add up."""
    chunks = split.chunks()
    assert all(0 < count <= MOST_CHUNKS for count in chunks)
    assert sum(chunks) == sum(chunks_of(numel, chunk_size) for numel in numels)
    ends = list(accumulate(chunks))  # of launches, in chunks of the list
    first = 0  # chunk of the row
    for row, numel in enumerate(numels):
        count = chunks_of(numel, chunk_size)
        for of_row in {of_row for of_row in (0, 1, count // 2, count - 2, count - 1) if 0 <= of_row < count}:
            launch = bisect.bisect_right(ends, first + of_row)
            before = ends[launch - 1] if launch else 0
            begin = of_row * chunk_size
            assert split.locate(launch, first + of_row - before) == (row, begin, min(chunk_size, numel - begin))
        if count:  # no row is cut by a launch
            assert bisect.bisect_right(ends, first) == bisect.bisect_right(ends, first + count - 1)
        first += count


@sizes_of_tables
@pytest.mark.parametrize("count", [3, 1_000, 100_000])
def test_huge_lists(size: str, count: int) -> None:
    numels = random_sizes(random.Random(count), count, 36)
    split = SPLITS[size](numels, 65536)
    assert_borders(split, numels, 65536)
    filled, capacity = sum(numel > 0 for numel in numels), SPLITS[size].CAPACITY
    assert len(split.chunks()) >= chunks_of(filled, capacity)


@sizes_of_tables
def test_a_launch_is_full_before_the_next(size: str) -> None:
    """One launch whatever the number of tensors, up to as many as its arguments hold."""
    capacity = SPLITS[size].CAPACITY
    for count in (1, 2, capacity // 2, capacity - 1, capacity):
        assert SPLITS[size]([3] * count, 1024).chunks() == [count]
        assert SPLITS[size]([3, 0] * count, 1024).chunks() == [count]  # empty ones take no place
    assert SPLITS[size]([3] * (capacity + 1), 1024).chunks() == [capacity, 1]
    assert SPLITS[size]([3] * (5 * capacity), 1024).chunks() == [capacity] * 5


@sizes_of_tables
def test_chunks_of_a_launch_are_counted_in_31_bits(size: str) -> None:
    """As soon as a tensor would take a launch beyond, it begins another."""
    most = MOST_CHUNKS * 1024
    for numels, counts in (
        ([most], [MOST_CHUNKS]),
        ([most, 1], [MOST_CHUNKS, 1]),
        ([1, most], [1, MOST_CHUNKS]),
        ([most - 1024, 1024], [MOST_CHUNKS]),
        ([most - 1024, 1025], [MOST_CHUNKS - 1, 2]),
        ([2**36] * 70, [2**26 * 31, 2**26 * 31, 2**26 * 8]),
    ):
        split = SPLITS[size](numels, 1024)
        assert split.chunks() == counts
        assert_borders(split, numels, 1024)


@sizes_of_tables
def test_a_tensor_of_more_chunks_is_refused(size: str) -> None:
    with pytest.raises(ValueError, match=r"a tensor of more than 2\^31 chunks"):
        SPLITS[size]([5, MOST_CHUNKS * 1024 + 1], 1024)


@sizes_of_tables
def test_a_table_and_the_options_fit_into_the_arguments(size: str) -> None:
    """And no row more would. (What the kernels' arguments come to: tests/cuda/test_machine_code.py.)"""
    row = ROLES * (8 + 1) + 8 + 4 + 4  # addresses and types; elements, chunks, tag
    options, rest = 320, 16
    capacity = SPLITS[size].CAPACITY
    assert row * capacity + options + rest <= BYTES[size] < row * (capacity + 1) + options + rest


# --- how large chunks are ---

RESNET_50, GPT_2 = 25_557_032, 124_439_808
FULL = 2048 * 65536  # elements that make as many chunks as are wanted of the largest size


@pytest.mark.parametrize(
    ("numel", "size"),
    [(0, 8192), (3000, 8192), (11_689_512, 8192), (RESNET_50, 8192), (GPT_2, 32768), (FULL - 1, 32768), (FULL, 65536), (10**9, 65536)],
)
def test_chunks_shrink_where_they_would_be_few(numel: int, size: int) -> None:
    """Not below 8,192 elements, and the same whatever tensors the elements belong to."""
    usual = _cuda_on_host.usual_chunk_size
    assert usual([numel]) == usual([1, 0, numel - 1] if numel else [0]) == size
    assert usual([numel // 1000] * 1000 + [numel % 1000]) == size
    assert size == 8192 or numel // size >= 2048


def test_the_bits_of_a_norm_are_those_of_the_chunks_that_its_list_has() -> None:
    """Of one kind of rows or several, with sums as many as chunks. (A sweep may set others, which give other bits.)"""
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(size, generator=generator) for size in (90_000, 8193, 5, 70_000)]
    lists = [grads, [grad if i % 2 else grad.bfloat16() for i, grad in enumerate(grads)]]

    def norms() -> list[float]:
        return [float(cuda.grad_norms(GradNorms(group_sizes=[4]), Operands({"grads": grads}, range(4)))) for grads in lists]

    usual, count = norms(), _cuda_on_host.count_sums(cuda._lists.describe(grads))
    assert count == 11 + 2 + 1 + 9
    try:
        _cuda_on_host.set_cut(chunk_size=8192)
        assert norms() == usual
        _cuda_on_host.set_cut(chunk_size=65536)
        assert _cuda_on_host.count_sums(cuda._lists.describe(grads)) == 2 + 1 + 1 + 2
        for norm, other in zip(norms(), usual, strict=True):
            assert norm == pytest.approx(other, rel=1e-6)
    finally:
        _cuda_on_host.set_cut()
    assert norms() == usual
