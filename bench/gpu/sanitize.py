"""A small run of the kernels, to be made under ``compute-sanitizer``: every kernel, sizes and addresses that end within a block.

memcheck looks for accesses out of bounds, racecheck for threads that meet in shared memory without a barrier, initcheck for reads of
what nobody wrote.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass

import torch

from sam_kernels._dispatch import reason_missing, use_backend
from sam_kernels.functional import per_sample, sharpness_sample, sharpness_weights
from sam_kernels.validation.check import build
from sam_kernels.validation.problem import run

__all__ = ["ERRORS_FOUND", "TOOLS", "Tool", "command", "verdict"]

CALLS = (
    ("grad_norm", "adaptive"),
    ("grad_norms", "plain"),
    ("perturb_", "adaptive_eta"),
    ("perturb_", "from_old"),
    ("perturb_", "friendly_rounding"),
    ("random_perturb_", "normal"),
    ("centralize_", "adaptive"),
    ("direction_norm_", "friendly_first"),
    ("direction_norm_", "vasso_adaptive"),
    ("grad_dots", "origins"),
    ("combine_", "into_rights"),
    ("combine_", "found_inf"),
    ("restore_", "restore"),
    ("sgd_step_", "clip_grad_scale"),
    ("sgd_step_", "found_inf_old"),
    ("adamw_step_", "clip_grad_scale"),
)
CASES = (("odd_sizes", "float32"), ("unaligned_views", "bfloat16"), ("chunk_edges", "float32"))
SLICES = (("slices", "float32"), ("unaligned_slices", "bfloat16"), ("long_slices", "float32"))  # in place of these
ERRORS_FOUND = 77  # the tool's exit code


@dataclass(frozen=True)
class Tool:
    """``finding``: what it says of an error in a kernel. ``kernels``: of whose, where those of torch are no concern of ours."""

    finding: str
    clean: str
    options: tuple[str, ...] = ()
    kernels: str = ""


OURS = r"sam::cuda|sam4cuda|\bat _\w+_kernel"  # CUDA's, with or without their names made readable, and Triton's
TOOLS = {  # in the order they run
    "memcheck": Tool("Invalid __", "ERROR SUMMARY: 0 errors", ("--report-api-errors", "no")),
    "racecheck": Tool("Error: Race reported between", "0 hazards displayed", kernels=OURS),
    "initcheck": Tool("Uninitialized __global__ memory read", "ERROR SUMMARY: 0 errors", kernels=OURS),
}


def command(tool: str) -> tuple[str, ...] | None:
    """None where there is no such tool."""
    path = shutil.which("compute-sanitizer")
    if path is None:
        return None
    options = ("--target-processes", "application-only", "--error-exitcode", str(ERRORS_FOUND), "--print-limit", "20")
    return (path, "--tool", tool, *options, *TOOLS[tool].options, sys.executable, "-m", "bench.gpu.sanitize")


def verdict(name: str, code: int | None, output: str) -> tuple[str, bool]:
    """What it came to, and whether that is an error of ours: a tool that refuses the device or takes too long found none."""
    tool = TOOLS[name]
    if _findings(tool, output):
        return "errors: see the log", True
    if code is None:
        return "cut off: nothing was found until then", False
    if tool.clean in output and code == 0:
        return "clean", False
    if tool.finding in output:
        return "errors in other kernels than ours: see the log", False
    last = output.strip().splitlines()[-1] if output.strip() else "no output"
    return f"the tool did not work here (exit code {code}): {last[:120]}", False


def _findings(tool: Tool, output: str) -> bool:
    """Of kernels that are ours: named in the line of a finding or the one below it."""
    lines = output.splitlines()
    return any(tool.finding in line and re.search(tool.kernels, " ".join(lines[i : i + 2])) for i, line in enumerate(lines))


def _per_sample(dtype: torch.dtype) -> None:
    """Every kernel of the norms per sample, with sizes that end within a tile."""
    norms, ids = torch.zeros(3, dtype=torch.float64, device="cuda"), torch.arange(60, device="cuda").view(3, 20) % 7
    for tokens, precision in ((1, "ieee"), (20, "tf32"), (70, "ieee")):
        a, g = torch.ones(3, tokens, 40, device="cuda", dtype=dtype), torch.ones(3, tokens, 33, device="cuda", dtype=dtype)
        products = torch.zeros(3, 33, 40, device="cuda")
        for bias in (False, True):
            per_sample.linear_square_norms_(norms, a, g, bias=bias, method="gram", precision=precision)
        per_sample.linear_square_norms_(norms, a, g, products, method="direct", precision=precision)
    for shape in ((3, 600, 33, 1), (3, 2, 5, 49)):
        x, sums = torch.ones(shape, device="cuda", dtype=dtype), torch.zeros(2, shape[0], shape[2], device="cuda")
        per_sample.affine_grads_(sums[0], sums[1], x, x)
    per_sample.embedding_square_norms_(norms, ids, torch.ones(3, 20, 33, device="cuda", dtype=dtype), padding_idx=2)
    torch.cuda.synchronize()


def _sharpness(dtype: torch.dtype) -> None:
    """Weights and draws, with sizes that end within a block."""
    for count in (5, 600):
        norms = torch.ones(count, device="cuda", dtype=dtype)
        sharpness_weights(norms, beta=1.0)
        for replacement in (True, False):
            sharpness_sample(norms, 5, beta=1.0, replacement=replacement, seed=1)
    torch.cuda.synchronize()


def main() -> None:
    for backend in ("native", "triton"):
        if (reason := reason_missing(backend, "cuda")) is not None:
            print(f"left out: backend {backend}: {reason}")
            continue
        with use_backend(backend):
            for op, option in CALLS:
                for case, dtype in SLICES if op == "centralize_" else CASES:
                    run(build(op, case, dtype, option).clone("cuda"))
                    torch.cuda.synchronize()
            for dtype in (torch.float32, torch.float64):
                _sharpness(dtype)
            for dtype in (torch.float32, torch.bfloat16) if backend == "triton" else ():
                _per_sample(dtype)
        print(f"{backend}: {len(CALLS) * len(CASES)} calls", flush=True)


if __name__ == "__main__":
    main()
