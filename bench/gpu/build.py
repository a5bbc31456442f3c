"""The native modules, for this device alone. ``python -m bench.gpu.build``: as phases do it, the CUDA kernels first, the rest without them.

A build that fails takes nothing along: the CPU's module is then built alone, and the Triton kernels need none.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from bench.gpu.phases import Phase

__all__ = ["SECONDS", "build_phases", "settings"]

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 110
TOOLS = ("setuptools", "pybind11", "ninja")


def _has_nvcc() -> bool:
    sys.path.append(str(ROOT / "csrc"))
    import cuda_toolkit

    return cuda_toolkit.find_nvcc(os.environ) is not None


def settings() -> dict[str, str]:
    """What setup.py is told: what the environment says, else the CUDA kernels where there are a compiler and a device for them."""
    found: dict[str, str] = {}
    if "SAM_KERNELS_BUILD" not in os.environ:
        found["SAM_KERNELS_BUILD"] = "cuda" if torch.cuda.is_available() and torch.version.hip is None and _has_nvcc() else "cpu"
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and torch.cuda.is_available():
        found["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    return found


def build_phases(say: Callable[[str], None]) -> list[Phase]:
    if absent := [name for name in TOOLS if importlib.util.find_spec(name) is None]:
        say(f"left out: building the native modules: no {', '.join(absent)}")
        return []
    told = settings()
    if told.get("SAM_KERNELS_BUILD") == "cpu":
        say("left out: building the CUDA kernels: no nvcc, or no device for them")
    return [Phase("build", (sys.executable, "-m", "bench.gpu.build"), SECONDS, told)]


def build(env: Mapping[str, str]) -> int:
    return subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=ROOT, env=env, check=False).returncode


def main() -> int:
    code = build(os.environ)
    if code != 0 and os.environ.get("SAM_KERNELS_BUILD") == "cuda":
        print("the CUDA kernels were not built: the rest goes on with Triton's", flush=True)
        build({**os.environ, "SAM_KERNELS_BUILD": "cpu"})
    return code


if __name__ == "__main__":
    raise SystemExit(main())
