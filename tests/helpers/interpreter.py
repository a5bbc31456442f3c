"""Triton's interpreter, fit for thousands of launches: small chunks, so that tiny tensors cross every border, and less waste."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from sam_kernels.validation import cases

__all__ = ["is_interpreted", "prepare"]

CHUNK = 512
BLOCK = 128  # four blocks a chunk
TILE = 1024  # of the random numbers
MANY = 100  # tensors of the case many_tiny: a launch of a thousand programs takes seconds here and shows nothing more


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
            small = (4 * TILE, 2 * TILE) if name == "random" else (CHUNK, BLOCK)
            _config.tune(name, chunk=small[0], block=small[1])
    cases.CASES["chunk_edges"] = cases.uniform((CHUNK - 1,), (CHUNK,), (CHUNK + 1,))
    cases.CASES["long_slices"] = cases.uniform((1, 3_000), (2, 2 * CHUNK + 1), (4, 1_200))
    cases.CASES["many_tiny"] = cases.uniform(*[(3,)] * MANY)
    _patch_once()


def _patch_once() -> None:
    """The interpreter replaces the functions of triton.language at every call of a device function and never takes them back there, which
    is two thirds of its time: once is enough in a process that only interprets."""
    from triton.runtime import interpreter

    replace: Callable[[Any], Any] = interpreter._patch_lang
    done: set[frozenset[str]] = set()

    def replace_once(function: Any) -> Any:
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
