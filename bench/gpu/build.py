"""The native modules for this device. ``python -m bench.gpu.build`` takes those that were carried here if they fit, otherwise it builds
them: the CUDA kernels for this device's architecture alone, the CPU's for one instruction set.

A build that fails takes nothing along: the CPU's module is then built alone, and the Triton kernels need none.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from bench.gpu import carry

__all__ = ["settings"]

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = "native is left out, the rest goes on with Triton's kernels"


def settings() -> dict[str, str]:
    """What setup.py is told: what the environment says, else the CUDA kernels where there are a compiler and a device for them."""
    found: dict[str, str] = {}
    if "SAM_KERNELS_BUILD" not in os.environ:
        found["SAM_KERNELS_BUILD"] = "cuda" if torch.cuda.is_available() and torch.version.hip is None and carry.has_nvcc() else "cpu"
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and torch.cuda.is_available():
        found["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    if "SAM_KERNELS_INSTRUCTION_SETS" not in os.environ:
        found["SAM_KERNELS_INSTRUCTION_SETS"] = "baseline"
    return found


def reason_to_build() -> str | None:
    """Why carried modules are not enough, None where they are."""
    if not torch.cuda.is_available():
        return "there is no device that they could be for"
    major, minor = torch.cuda.get_device_capability()
    return carry.reason_unfit(10 * major + minor)


def reason_not_to_build(env: Mapping[str, str]) -> str | None:
    """What is missing, and what to do about it."""
    if absent := [name for name in carry.TOOLS if importlib.util.find_spec(name) is None]:
        return f"no {', '.join(absent)}: pip install {' '.join(absent)}, or carry modules here (python -m bench.gpu.carry)"
    compiler = shlex.split(env.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler {compiler!r}: install one or set CXX, or carry modules here (python -m bench.gpu.carry)"
    return None


def build(env: Mapping[str, str]) -> int:
    return subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=ROOT, env=env, check=False).returncode


def main() -> int:
    if (unfit := reason_to_build()) is None:
        print(f"{' and '.join(carry.install())} were carried here and fit", flush=True)
        return 0
    print(f"carried modules are not used: {unfit}", flush=True)
    env = {**os.environ, **settings()}
    if (missing := reason_not_to_build(env)) is not None:
        print(f"nothing is built: {missing}; {WITHOUT}", flush=True)
        return 1
    if env["SAM_KERNELS_BUILD"] == "cpu" and torch.cuda.is_available():
        print(f"no nvcc: put it on PATH or set CUDA_HOME, or carry modules here (python -m bench.gpu.carry); {WITHOUT}", flush=True)
        return build(env) or 1
    code = build(env)
    if code != 0 and env["SAM_KERNELS_BUILD"] == "cuda":
        print(f"the CUDA kernels were not built, the compiler's words are above; {WITHOUT}", flush=True)
        build({**env, "SAM_KERNELS_BUILD": "cpu"})
    return code


if __name__ == "__main__":
    raise SystemExit(main())
