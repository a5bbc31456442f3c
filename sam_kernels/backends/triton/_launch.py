"""Launching a kernel, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from sam_kernels.backends.triton._device import is_recording, keep, on
from sam_kernels.backends.triton._requirements import IS_INTERPRETED

__all__ = ["launch", "options_of", "single", "warps_of", "written"]

# Not for the interpreter, which compiles nothing, nor for AMD's devices, where Triton looks at more of a tensor than is looked at here.
_KEEPS_COMPILED = not IS_INTERPRETED and torch.version.hip is None
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}  # beside it, the order of the constants


def warps_of(num_warps: int, warp_size: int) -> int:
    """Warps of ``warp_size`` threads that have as many as ``num_warps`` of 32: elements a thread, and so widths of accesses, stay."""
    return max(1, num_warps * 32 // warp_size)


@cache
def _warp_size(device: torch.device) -> int:
    size: int = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" and torch.version.hip else 32
    return size


def options_of(num_warps: int, device: torch.device) -> dict[str, Any]:
    """What every kernel is compiled with.

    No multiplication and addition is fused unless the kernel says so: the same formula then has the same bits as on the CPU, and a pass
    bound by memory does not notice. (Triton's own default has changed between versions.)
    """
    # The interpreter has neither warps nor a compiler.
    return {} if IS_INTERPRETED else {"num_warps": warps_of(num_warps, _warp_size(device)), "enable_fp_fusion": False}


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Runs ``programs`` programs of a kernel on the current stream of ``device``; nothing for none.

    What a kernel was compiled to is kept here by everything that Triton specialises on, and launched as it is: binding arguments and
    finding the compiled kernel anew costs Triton 20 to 40 µs a launch.
    """
    if programs == 0:
        return
    with on(device):
        if is_recording(device):
            keep(*args)
        if not _KEEPS_COMPILED:
            kernel[(programs,)](*args, **constants, **options_of(num_warps, device))
            return
        key = (kernel.fn, device, num_warps, *map(_kind_of, args), *map(_constant_of, constants.items()))
        known = _compiled.get(key)
        if known is None:
            compiled = kernel[(programs,)](*args, **constants, **options_of(num_warps, device))
            if isinstance(compiled, CompiledKernel):
                _compiled[key] = compiled, tuple(kernel.arg_names[len(args) :])
        else:
            compiled, names = known
            compiled[programs, 1, 1](*args, *[constants[name] for name in names])


def _kind_of(arg: Any) -> Any:
    """What Triton looks at of an argument: the type of a pointer and whether it is a multiple of 16 bytes; of an integer, its width and
    whether it is 1 or a multiple of 16."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int) and not isinstance(arg, bool):
        return arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31, arg < 2**63
    return type(arg)


def _constant_of(item: tuple[str, Any]) -> tuple[str, Any]:
    name, value = item
    if isinstance(value, tuple):  # of dtypes, or None: Triton's own hash of a dtype is slow
        return name, tuple([None if dtype is None else dtype.name for dtype in value])
    return item


def single(scalar: Tensor | None) -> Tensor | None:
    """A number that a kernel reads, as float32: others are rare, and each type would compile a kernel of its own."""
    return scalar if scalar is None or scalar.dtype is torch.float32 else scalar.to(torch.float32)


def written(params: Sequence[Tensor]) -> None:
    """Tells autograd, so that a backward pass through a graph from before the write is an error and not a wrong gradient."""
    torch.autograd.graph.increment_version(params)
