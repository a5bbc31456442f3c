"""``python -m tests.helpers.digest``: a hash of the bits every operation writes on the native backend, one line a call.

Run in a process of its own for each SAM_KERNELS_ISA, which is read once. A NaN counts as the one NaN: which one an operation gives is open
in IEEE 754.
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

CASES = ("odd_sizes", "chunk_edges", "unaligned_views", "huge", "tiny", "nan")


def hash_of(tensor: Tensor) -> str:
    """Of the bits, every NaN taken as one."""
    flat = tensor.detach().reshape(-1).contiguous()
    flat = torch.where(flat.isnan(), torch.full_like(flat, torch.nan), flat)
    return hashlib.sha256(memoryview(flat.view(torch.uint8).numpy())).hexdigest()[:16]


def digests() -> Iterator[str]:
    for op in OPTIONS:
        for dtype in ("float32", "float64", "bfloat16", "float16", "mixed"):
            for case in (*CASES, *(ABOUT_SLICES if op == "centralize_" else ())):
                options = [option for option in OPTIONS[op] if concerns(op, option, dtype)]
                for option in options[:1] if case == "chunk_edges" else options:
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
        for line in digests():
            sys.stdout.write(line + "\n")
