"""Random calls on backends against the float64 reference, each reproduced by its seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sam_kernels.validation.backends import AUTOMATIC, backend_of, has_per_sample
from sam_kernels.validation.check import check_call
from sam_kernels.validation.compare import Worst, failure
from sam_kernels.validation.options import PER_SAMPLE_OPTIONS, SHARPNESS_OPTIONS
from sam_kernels.validation.problem import Problem
from sam_kernels.validation.random_calls import random_call

__all__ = ["Finding", "fuzz_one"]

_ANY_DTYPE = ("state_steps", "square_norms", "indices")  # lists that no backend's dtypes are about


@dataclass(frozen=True)
class Finding:
    """A call whose result is out of its bound, or which raised."""

    seed: int  # of the call
    op: str
    backend: str
    worst: str  # list, index, element and values in words


def fuzz_one(seed: int, backends: Sequence[str], ops: Sequence[str], device: str = "cpu") -> tuple[list[Finding], int]:
    """Check the call of a seed on those of ``backends`` that have kernels for it. Return the findings and the number of checks."""
    call = random_call(seed, ops)
    takers = [backend for backend in backends if _takes(backend, call, device)]
    try:
        found = check_call(call, takers, device)
    except Exception:
        found = {backend: _checked_alone(seed, backend, ops, device) for backend in takers}
    return [Finding(seed, call.op, backend, str(worst)) for backend, worst in found.items() if not worst.passed], len(takers)


def _checked_alone(seed: int, backend: str, ops: Sequence[str], device: str) -> Worst:
    """An exception is a finding of the backend that raises it."""
    try:
        return check_call(random_call(seed, ops), [backend], device)[backend]
    except Exception as error:
        return failure("call", f"raised {type(error).__name__}: {error}")


def _takes(backend: str, call: Problem, device: str) -> bool:
    """Whether a backend has kernels for the operation and all its dtypes."""
    if call.op in PER_SAMPLE_OPTIONS and not has_per_sample(backend, device):
        return False
    if backend == AUTOMATIC or call.op in SHARPNESS_OPTIONS:
        return True
    supported = backend_of(backend, device).dtypes
    used = {t.dtype for name, given in call.lists.items() if name not in _ANY_DTYPE for t in given if t is not None}
    return supported is None or used <= set(supported)
