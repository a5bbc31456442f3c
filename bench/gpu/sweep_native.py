"""What a sweep varies of the CUDA kernels: elements a chunk, and blocks that a processor is given. Nothing is compiled for it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.gpu.sweep import NUMEL

__all__ = ["BACKEND", "Choice", "choices", "compile_all", "default_of", "reason_missing", "using"]

BACKEND = "native"
CHUNKS = (8192, 16384, 32768, 65536, 131072)
BLOCKS = (0, 2, 4, 8)  # 0: as many as it has room for
_DEFAULT_BLOCKS = 0


@dataclass(frozen=True)
class Choice:
    chunk_size: int
    blocks_per_processor: int

    def __str__(self) -> str:
        return f"{self.chunk_size // 1024}k/{self.blocks_per_processor or 'all'}"


def _module() -> Any:
    """Imported late: it may not have been built."""
    return importlib.import_module("sam_kernels.backends.native.cuda")._cuda


def reason_missing() -> str | None:
    try:
        _module()
    except ImportError as error:
        return str(error)
    return None


def choices(kernel: str) -> list[Choice]:
    return [Choice(chunk, blocks) for chunk in CHUNKS for blocks in BLOCKS]


def default_of(kernel: str) -> Choice:
    return Choice(_module().usual_chunk_size([NUMEL]), _DEFAULT_BLOCKS)


@contextmanager
def using(kernel: str, choice: Choice) -> Iterator[None]:
    """While open, every kernel's work is cut so."""
    if choice != default_of(kernel):
        _module().set_cut(chunk_size=choice.chunk_size, blocks_per_processor=choice.blocks_per_processor)
    try:
        yield
    finally:
        _module().set_cut()  # chunks that shrink with the list


def compile_all(dtypes: Sequence[str], seconds: float) -> None:
    """They are."""
