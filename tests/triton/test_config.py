"""Sizes of chunks and blocks: what the kernels rely on, and no run of one of them shows where it does not hold."""

from __future__ import annotations

import pytest

from sam_kernels.backends.triton._config import CONFIGS, FINISH_BLOCK, FINISH_DOTS_BLOCK


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("kernel", sorted(CONFIGS.keys() - {"steps"}))  # counters of one element
def test_chunks_and_blocks_keep_16_bytes_together(kernel: str) -> None:
    config = CONFIGS[kernel]
    assert _is_power_of_two(config.block)
    assert config.block % 8 == 0  # 16 bytes of a 16-bit type
    assert config.chunk % config.block == 0
    assert config.mixed_block % 8 == 0
    for numel in (1, 4096, 10**6, 10**8):
        assert config.chunk_of(numel) % config.block == 0


def test_blocks_of_the_finishing_stages_are_powers_of_two() -> None:
    assert all(map(_is_power_of_two, (FINISH_BLOCK, FINISH_DOTS_BLOCK)))
