"""Triton's interpreter, fit for thousands of launches: small chunks, so that tiny tensors cross every border, and less waste."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sam_kernels.validation import cases
from tests.helpers import per_sample

__all__ = ["MANY", "is_interpreted", "prepare", "widen_blocks"]

# The interpreter's time is by programs and by blocks, hardly by elements.
CHUNK = 768
BLOCK = 256  # three blocks a chunk: a first one, one between, a last one
SLICES_BLOCK = 128  # the case slices has slices of exactly half of it, and longer ones
TILE = 1024  # of the random numbers
WIDE_BLOCK = 16_384  # for tests on many numbers
MANY = 40  # tensors of the case many_tiny: a launch of a thousand programs takes seconds here and shows nothing more
LONG = 330  # positions of a long line: the time of products of all positions is by its square
# Cases of every keyword set, about values: without their longest tensor
OF_MAGNITUDES = ("zero_grads", "huge", "huge_params", "tiny", "long_state")


def is_interpreted() -> bool:
    """Whether this process interprets kernels: TRITON_INTERPRET=1 and a triton that can be used."""
    try:
        from sam_kernels.backends.triton import _requirements
    except ImportError:
        return False
    return _requirements.REASON_MISSING is None and _requirements.IS_INTERPRETED


def prepare() -> None:
    """For the rest of the process."""
    from sam_kernels.backends.triton import _config

    for name, config in list(_config.CONFIGS.items()):
        if config.chunk > CHUNK:
            small = {"random": (4 * TILE, 2 * TILE), "centralize": (CHUNK, SLICES_BLOCK)}.get(name, (CHUNK, BLOCK))
            _config.tune(name, chunk=small[0], block=small[1])
    for name in OF_MAGNITUDES:
        cases.CASES[name] = _within_a_chunk(cases.CASES[name])
    cases.CASES["chunk_edges"] = cases.uniform((CHUNK - 1,), (CHUNK,), (CHUNK + 1,))
    cases.CASES["long_slices"] = cases.uniform((1, 3_000), (2, 2 * CHUNK + 1), (4, 1_200))
    cases.CASES["many_tiny"] = cases.uniform(*[(3,)] * MANY)
    per_sample.CONVOLUTIONS["1d_long"] = dataclasses.replace(per_sample.CONVOLUTIONS["1d_long"], sizes=(LONG,))
    _patch_once()
    _look_types_up_once()


def widen_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from sam_kernels.backends.triton import _config

    for name in ("perturb", "copy", "random"):
        monkeypatch.setitem(_config.CONFIGS, name, dataclasses.replace(_config.CONFIGS[name], chunk=4 * WIDE_BLOCK, block=WIDE_BLOCK))


def _within_a_chunk(rows: Callable[[torch.dtype], list[cases.Row]]) -> Callable[[torch.dtype], list[cases.Row]]:
    return lambda dtype: [row for row in rows(dtype) if math.prod(row.shape) <= CHUNK]


def _patch_once() -> None:
    """The interpreter replaces the functions of triton.language at every call of a device function and never takes them back there, which
    is two thirds of its time: once is enough in a process that only interprets."""
    from triton.runtime import interpreter

    replace: Callable[[Any], Any] = interpreter._patch_lang
    functions: set[Any] = set()
    done: set[frozenset[str]] = set()

    def replace_once(function: Any) -> Any:
        if function not in functions:
            functions.add(function)
            seen = frozenset(
                value.__name__
                for value in function.__globals__.values()
                if isinstance(value, types.ModuleType) and value.__name__.startswith("triton.language")
            )
            if seen not in done:
                replace(function)
                done.add(seen)
        return interpreter._LangPatchScope()

    if hasattr(interpreter, "_LangPatchScope"):  # not in every version: then slowly
        interpreter._patch_lang = replace_once


def _look_types_up_once() -> None:
    """The interpreter makes a table of all types whenever it looks one of them up in it."""
    from triton.runtime import interpreter

    look_up: Callable[[Any], Any] = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def look_up_once(kind: Any) -> Any:
        if kind.name not in known:
            known[kind.name] = look_up(kind)
        return known[kind.name]

    interpreter._get_np_dtype = look_up_once
