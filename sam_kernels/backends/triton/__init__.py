"""Triton kernels: one launch an operation and dtype, on NVIDIA and AMD devices; under ``TRITON_INTERPRET=1``, slowly, on the CPU.

The package can be imported where triton is missing: ``BACKEND`` then has the reason, and no operations. Arithmetic is float32; there are no
kernels for float64.
"""

import importlib

import torch

from sam_kernels._backend import Backend, implementations
from sam_kernels.backends.triton._lists import are_locals_of, current_grads, current_local_grads, is_current, trust
from sam_kernels.backends.triton._requirements import IS_INTERPRETED, REASON_MISSING, VERSION

__all__ = ["BACKEND"]


def _describe() -> str:
    return f"triton {VERSION}, {'interpreted' if IS_INTERPRETED else 'compiled for each device on first use'}"


BACKEND = Backend(
    name="triton",
    operations={} if REASON_MISSING else implementations(vars(importlib.import_module("sam_kernels.backends.triton._operations"))),
    trust=trust,
    current_grads=current_grads,
    is_current=is_current,
    current_local_grads=current_local_grads,
    are_locals_of=are_locals_of,
    describe=_describe,
    # AMD's devices are "cuda" to torch as well. The interpreter reads and writes the memory of CPU tensors.
    device_types=frozenset({"cpu" if IS_INTERPRETED else "cuda"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    is_automatic=not IS_INTERPRETED,  # the interpreter is for those who ask
    knows_skips=False,  # that would mean to wait for the device
    refuses_no_memory=True,
    reason_missing=REASON_MISSING,
)
