"""The dtypes of a backend, the classes of its operations, and the calls that they are compared by."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from sam_kernels import _dispatch, operations
from sam_kernels._backend import Backend
from sam_kernels.operations import Operation
from sam_kernels.validation.backends import backend_of
from sam_kernels.validation.check import combinations
from tests.helpers.pairwise import covering_pairs

__all__ = ["OPERATIONS", "Calls", "all_calls", "calls_in_pairs", "replace_backend", "require_dtype", "widest"]

Calls = dict[str, list[tuple[str, str]]]  # dtype -> (case, keyword set) of each call

OPERATIONS: dict[str, type[Operation]] = {op.name: op for op in operations.OPERATIONS}


def replace_backend(patch: pytest.MonkeyPatch, path: str, found: Backend | str) -> None:
    """The dispatcher finds ``found``, a backend or why there is none, under ``path``; what it chose before is forgotten."""
    patch.setitem(_dispatch._loaded, path, found)
    patch.setattr(_dispatch, "_preferred", {})


def require_dtype(name: str, dtype: torch.dtype) -> None:
    """Skips the test where a backend has no kernels for a dtype."""
    supported = backend_of(name).dtypes
    if supported is not None and dtype not in supported:
        pytest.skip(f"backend {name} has no kernels for {dtype}")


def widest(name: str) -> torch.dtype:
    """float64 where the backend has it."""
    supported = backend_of(name).dtypes
    return torch.float64 if supported is None or torch.float64 in supported else torch.float32


@cache
def all_calls(op: str, dtypes: tuple[str, ...], cases_left_out: tuple[str, ...] = (), options_left_out: tuple[str, ...] = ()) -> Calls:
    return {
        dtype: [call for call in combinations(op, dtype) if call[0] not in cases_left_out and call[1] not in options_left_out]
        for dtype in dtypes
    }


@cache
def calls_in_pairs(op: str, dtypes: tuple[str, ...], cases_left_out: tuple[str, ...] = (), options_left_out: tuple[str, ...] = ()) -> Calls:
    """Few calls in which every pair of a dtype, a case and a keyword set occurs that occurs in all calls."""
    calls = all_calls(op, dtypes, cases_left_out, options_left_out)
    rows = [{"dtype": dtype, "case": case, "option": option} for dtype in dtypes for case, option in calls[dtype]]
    found: Calls = {dtype: [] for dtype in dtypes}
    for i in covering_pairs(rows):
        found[rows[i]["dtype"]].append((rows[i]["case"], rows[i]["option"]))
    return found
