"""``python -m tests.helpers.digest [--full]``: a hash of the bits every operation writes on the native backend, one line a call.

Without ``--full`` the calls hold every pair of a dtype, a case and a keyword set of an operation. Run in a process of its own for each
SAM_KERNELS_ISA, which is read once. A NaN counts as the one NaN: which one an operation gives is open in IEEE 754.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from sam_kernels import _cpu
from sam_kernels._dispatch import use_backend
from sam_kernels.validation.check import build
from sam_kernels.validation.options import ABOUT_SLICES, OPTIONS, concerns
from sam_kernels.validation.problem import run
from tests.helpers.halves import VALUES, narrowed, widened
from tests.helpers.pairwise import covering_pairs

CASES = ("odd_sizes", "chunk_edges", "unaligned_views", "huge", "tiny", "nan")


def hash_of(tensor: Tensor) -> str:
    """Of the bits, every NaN taken as one."""
    flat = tensor.detach().reshape(-1).contiguous()
    flat = torch.where(flat.isnan(), torch.full_like(flat, torch.nan), flat)
    return hashlib.sha256(memoryview(flat.view(torch.uint8).numpy())).hexdigest()[:16]


def calls(op: str) -> list[tuple[str, str, str]]:
    """(dtype, case, keyword set) of every call of an operation."""
    found = []
    for dtype in ("float32", "float64", "bfloat16", "float16", "mixed"):
        for case in (*CASES, *(ABOUT_SLICES if op == "centralize_" else ())):
            options = [option for option in OPTIONS[op] if concerns(op, option, dtype)]
            found += [(dtype, case, option) for option in (options[:1] if case == "chunk_edges" else options)]
    return found


def in_pairs(calls: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [calls[i] for i in covering_pairs([dict(zip(("dtype", "case", "option"), call, strict=True)) for call in calls])]


def digests(is_full: bool) -> Iterator[str]:
    for op in OPTIONS:
        for dtype, case, option in calls(op) if is_full else in_pairs(calls(op)):
            problem = build(op, case, dtype, option)
            result = run(problem)
            results = [result] if isinstance(result, Tensor) else []
            written = results + [t for tensors in problem.lists.values() for t in tensors if t is not None]
            yield f"{op} {dtype} {case} {option} {hashlib.sha256(''.join(map(hash_of, written)).encode()).hexdigest()[:16]}"
    for dtype in (torch.bfloat16, torch.float16):
        yield f"widened {dtype} {hash_of(widened(dtype))}"
        for path in VALUES:
            yield f"narrowed {dtype} {path} {hash_of(narrowed(dtype, path))}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with use_backend("native"):
        print(_cpu.instruction_set())
        for line in digests("--full" in sys.argv[1:]):
            sys.stdout.write(line + "\n")
