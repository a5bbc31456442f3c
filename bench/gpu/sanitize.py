"""A small run of the triton kernels, to be made under ``compute-sanitizer``: every kernel, sizes and addresses that end within a block."""

from __future__ import annotations

import shutil
import sys

import torch

from sam_kernels._dispatch import use_backend
from sam_kernels.cli._check import build, run

__all__ = ["command", "verdict"]

CALLS = (
    ("grad_norm", "adaptive"),
    ("grad_norms", "plain"),
    ("perturb_", "adaptive_eta"),
    ("perturb_", "from_old"),
    ("perturb_", "friendly_rounding"),
    ("random_perturb_", "normal"),
    ("direction_norm_", "friendly_first"),
    ("direction_norm_", "vasso_adaptive"),
    ("restore_", "restore"),
    ("sgd_step_", "clip_grad_scale"),
    ("sgd_step_", "found_inf_old"),
    ("adamw_step_", "clip_grad_scale"),
)
CASES = ("odd_sizes", "unaligned_views", "chunk_edges")
ERRORS_FOUND = 77  # the tool's exit code


def command() -> tuple[str, ...] | None:
    """None where there is no such tool."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return None
    options = ("--tool", "memcheck", "--target-processes", "application-only", "--error-exitcode", str(ERRORS_FOUND), "--print-limit", "20")
    return (tool, *options, sys.executable, "-m", "bench.gpu.sanitize")


def verdict(code: int | None, output: str) -> tuple[str, bool]:
    """What it came to, and whether that is an error of ours: a tool that refuses the device or takes too long found none."""
    if code is None:
        return "cut off: nothing was found until then", False
    if "ERROR SUMMARY: 0 errors" in output and code == 0:
        return "clean", False
    if code == ERRORS_FOUND and "Invalid __" in output:
        return "memory errors: see the log", True
    last = output.strip().splitlines()[-1] if output.strip() else "no output"
    return f"the tool did not work here (exit code {code}): {last[:120]}", False


def main() -> None:
    with use_backend("triton"):
        for op, option in CALLS:
            for dtype, case in zip(("float32", "bfloat16", "float32"), CASES, strict=True):
                run(build(op, case, dtype, option).clone("cuda"))
                torch.cuda.synchronize()
    print(f"{len(CALLS) * len(CASES)} calls")


if __name__ == "__main__":
    main()
