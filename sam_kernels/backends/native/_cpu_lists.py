"""The compiled module of the CPU kernels, and its lists."""

from __future__ import annotations

from sam_kernels.backends.native._lists import Lists

try:
    from sam_kernels import _cpu
except ImportError as error:
    raise ImportError(f"the compiled module sam_kernels._cpu cannot be imported ({error}); reinstall with a C++ compiler") from error

__all__ = ["_cpu", "_lists"]

_lists = Lists(_cpu)
