"""How the work is cut: elements a program, elements a block of its loop, warps.

No kernel is autotuned at run time: an operation in place cannot be run twice. Benchmarks try other sizes, and tests set smaller ones so
that tiny tensors cross every border: :func:`tuned`, :func:`tune`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

__all__ = ["CONFIGS", "FINISH_BLOCK", "FINISH_DOTS_BLOCK", "Config", "tune", "tuned"]

_WANTED_CHUNKS = 2048  # of a call: about as many programs as 132 processors hold of a norm, sixteen each
_LEAST_CHUNK = 4096  # elements, two of most blocks: a chunk is found by three loads that wait for each other


@dataclass(frozen=True)
class Config:
    """Of one kernel. ``chunk``, the most elements of one, is a multiple of ``block``; both are multiples of 8 elements (16 bytes of a
    16-bit type), and ``block`` is a power of two. ``num_warps`` is of 32 threads, wherever a warp has more (AMD's have 64) there are fewer.
    ``words``: elements that share a counter of random numbers, each in a run of its own."""

    chunk: int
    block: int
    num_warps: int = 4
    words: int = 1

    @property
    def mixed_block(self) -> int:
        """Elements a block where sizes of elements differ: four a thread and run. With the eight of a 16-byte access of a 16-bit type,
        each store of float32 would go through shared memory, with two barriers, and registers would cost occupancy."""
        return min(self.block, self.num_warps * 32 * 4 * self.words)

    def chunk_of(self, numel: int) -> int:
        """Elements a chunk of lists of ``numel`` elements in all: halved while there would be too few of them to keep a device busy.

        By the sizes alone, whatever the device: the bits of a norm depend on it.
        """
        chunk = self.chunk
        while chunk > _LEAST_CHUNK and numel < chunk * _WANTED_CHUNKS:
            chunk //= 2
        return chunk


# A block of 2048 and four warps: 16 elements a thread, so four 16-byte loads of float32 (two of a 16-bit type) in flight for each operand.
# sgd has three operands, adamw four, and direction, dots and combine three sums: half of that, or registers would cost occupancy. Chunks of
# 16384 make 6,000 programs of 10^8 elements (eleven waves on 132 processors with four programs each) and keep the finishing stage of the
# norm below 1 % of it.
CONFIGS = {
    "norm": Config(16384, 2048),
    "perturb": Config(16384, 2048),
    "copy": Config(16384, 2048),
    "sgd": Config(16384, 1024),
    "adamw": Config(16384, 1024),
    "steps": Config(1, 1),  # counters of one element: only their addresses are of interest
    "direction": Config(16384, 1024),
    "centralize": Config(16384, 2048, num_warps=8),  # three sums, as direction; twice the warps, so that half a block holds a slice
    "dots": Config(16384, 1024),
    "combine": Config(16384, 1024),
    "random": Config(16384, 4096, words=4),  # 1024 counters of four elements: eight a thread; half of it a multiple of a random tile (1024)
}

FINISH_BLOCK = 512  # sums of chunks that the finishing stage of a norm takes at a time: with 1024 programs would need more registers
FINISH_DOTS_BLOCK = 256  # the same of inner products: three sums, in float64


def tune(kernel: str, **sizes: int) -> None:
    """Sets fields of a kernel's :class:`Config` for the rest of the process."""
    CONFIGS[kernel] = replace(CONFIGS[kernel], **sizes)


@contextmanager
def tuned(kernel: str, **sizes: int) -> Iterator[None]:
    """As :func:`tune`, until the block ends."""
    before = CONFIGS[kernel]
    tune(kernel, **sizes)
    try:
        yield
    finally:
        CONFIGS[kernel] = before
