"""The table of docs/kernels.md about the CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence

from bench.machine_code.cuda import ARCHITECTURES, Kernel, toolkit
from bench.machine_code.cuda_rules import resident_threads, violations

__all__ = ["COMMAND", "PART", "table"]

COMMAND = "python -m bench.machine_code --cuda --write docs/kernels.md"
PART = "machine code of CUDA"
_STORAGE = ("fp32", "bf16", "fp16", "mixed", "fp64", "")
_HEADINGS = ("kernel", "storage", "16-byte loads + stores, loop by loop", "bits", *ARCHITECTURES)


def _shapes(kernel: Kernel) -> str:
    found = sorted({(loop.loads[128], loop.stores[128]) for loop in kernel.wide_loops})
    return ", ".join(f"{loads} + {stores}" for loads, stores in found)


def _row(kernels: Sequence[Kernel]) -> list[str]:
    """kernels: of one operation and storage, for all architectures and sizes of tables."""
    shown = kernels[0]
    uniform = shown.storage in ("fp32", "bf16", "fp16")
    widths = sorted({bits for kernel in kernels for loop in kernel.wide_loops for bits in loop.loads | loop.stores}, reverse=True)
    cells = []
    for arch in ARCHITECTURES:
        found = sorted({(kernel.registers, resident_threads(kernel)) for kernel in kernels if kernel.arch == arch})
        cells.append(", ".join(f"{registers} → {threads}" for registers, threads in found) or "–")
    shapes = _shapes(shown) if uniform else "–"
    return [f"`{shown.op}`", shown.storage or "–", shapes, ", ".join(map(str, widths)) or "–", *cells]


def table(kernels: Sequence[Kernel]) -> str:
    wrong = [text for kernel in kernels for text in violations(kernel)]
    verdict = "Every rule holds." if not wrong else "Broken:\n\n" + "\n".join(f"* {text}" for text in wrong)
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.op, kernel.storage), []).append(kernel)
    rows = [_row(found) for _, found in sorted(groups.items(), key=lambda item: (item[0][0], _STORAGE.index(item[0][1])))]
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|---|---|---|---|" + "---:|" * len(ARCHITECTURES)]
    parts = [
        f"nvcc {toolkit()[1]}, {len(kernels)} kernels. {verdict}",
        "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]),
    ]
    return "\n\n".join(parts) + "\n"
