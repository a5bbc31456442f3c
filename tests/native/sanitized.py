"""Runs tests on a module that `make sanitize` built: python tests/native/sanitized.py FOLDER [pytest arguments].

The CPU's kernels, or with SAM_KERNELS_CUDA_ON_HOST=1 CUDA's, compiled for the host.

First it makes sure that the sanitizers see: a read past the end and a misaligned one, planted in calls of the module itself, must each end
the process with the sanitizer's report. Otherwise green tests would say nothing.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

# Tensors over memory that the sanitizer's malloc gave, 64 elements of it: torch is told how many there are, and believes it.
LIAR = """
import ctypes
import torch
from sam_kernels import functional, use_backend
use_backend("native")
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def lying(numel, shift=0):
    memory = (ctypes.c_char * (4 * numel)).from_address(libc.malloc(ctypes.c_size_t(4 * 64)) + shift)
    return torch.frombuffer(memory, dtype=torch.float32)
def norm(tensor):
    functional.grad_norm([tensor])
"""
PLANTED = {
    "nothing": ("norm(lying(64))", ""),
    "a read past the end": ("norm(lying(65))", "heap-buffer-overflow"),
    "a misaligned read": ("norm(lying(63, shift=1))", "misaligned address"),
}


def check_the_sanitizers_see(folder: str) -> None:
    for name, (code, words) in PLANTED.items():
        first = f"import sys; sys.path[0] = {folder!r}\n"  # in place of the current folder
        run = subprocess.run([sys.executable, "-c", first + LIAR + code], capture_output=True, text=True)
        if (words and (run.returncode == 0 or words not in run.stderr)) or (not words and run.returncode != 0):
            sys.exit(f"planted {name}: expected {words or 'success'!r}, exit status {run.returncode}\n{run.stderr[-4000:]}")
        print(f"planted {name}: {'reported' if words else 'passed'}")


def main(folder: str, *arguments: str) -> int:
    sys.path.insert(0, folder)
    import sam_kernels
    from sam_kernels.backends.native import CUDA_ON_HOST

    compiled = importlib.import_module("sam_kernels._cuda_on_host" if CUDA_ON_HOST else "sam_kernels._cpu")
    for module in (sam_kernels, compiled):  # and from now on in sys.modules: no test can import another
        if not Path(module.__file__).is_relative_to(folder):
            sys.exit(f"{module.__name__} is {module.__file__}, not in {folder}")
    check_the_sanitizers_see(folder)
    import pytest

    return int(pytest.main([*arguments]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
