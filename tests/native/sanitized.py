"""Runs tests on the module that `make sanitize` built: python tests/native/sanitized.py FOLDER [pytest arguments].

First it makes sure that the sanitizers see: a read past the end and a misaligned one, planted in calls of the module itself, must each end
the process with the sanitizer's report. Otherwise green tests would say nothing.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# A tensor of the caller's own making: the module asks a tensor for its pointer and size, so one can lie. malloc is the sanitizer's.
LIAR = """
import ctypes
import torch, sam_kernels.backends.native
from sam_kernels import _cpu
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
class Lying:
    dtype, is_contiguous = torch.float32, lambda self: True
    def __init__(self, numel, extra=0):
        self.numel = lambda: numel
        self.pointer = libc.malloc(ctypes.c_size_t(4 * 64 + 4)) + extra
        self.data_ptr = lambda: self.pointer
    def __getattr__(self, name):  # whatever else the module may ask
        return lambda *args: 1
def norm(tensor):
    _cpu.grad_norms(grads=_cpu.TensorList([tensor]), params=None, group_sizes=[1], adaptive=False, eta=0.0, threads=1)
"""
PLANTED = {
    "nothing": ("norm(Lying(64))", ""),
    "a read past the end": ("norm(Lying(66))", "heap-buffer-overflow"),
    "a misaligned read": ("norm(Lying(64, extra=1))", "misaligned address"),
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
    from sam_kernels import _cpu

    for module in (sam_kernels, _cpu):  # and from now on in sys.modules: no test can import another
        if not Path(module.__file__).is_relative_to(folder):
            sys.exit(f"{module.__name__} is {module.__file__}, not in {folder}")
    check_the_sanitizers_see(folder)
    import pytest

    return int(pytest.main([*arguments]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
