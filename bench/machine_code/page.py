"""The tables of docs/kernels.md about the Triton kernels: made of the code of every one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.machine_code.compiled import Code, compile_all
from bench.machine_code.launches import Variant, covering, recorded
from bench.machine_code.rules import violations
from bench.machine_code.targets import TARGETS

__all__ = ["COMMAND", "PART", "codes_of", "tables", "work_of"]

PART = "machine code"
COMMAND = "python -m bench.machine_code --write docs/kernels.md"
MAIN = "sm_90"  # the target that every variant is compiled for
_DTYPES = ("fp32", "bf16", "fp16", "mixed", "")


def codes_of(targets: Iterable[str], *, complete: bool = False) -> list[Code]:
    """The code of all variants on the main target, of some that cover everything on the others (``complete``: of all there too)."""
    return compile_all(work_of(targets, complete=complete))


def work_of(targets: Iterable[str], *, complete: bool = False) -> list[tuple[Variant, str, bool]]:
    """Variant, name of the target and whether to disassemble, of each of these codes."""
    variants = recorded()
    few = covering(variants)
    work: list[tuple[Variant, str, bool]] = []
    for target in targets:
        chosen = variants if complete or target == MAIN else few
        work += [(variant, target, target == MAIN and variant in few) for variant in chosen]
    return work


def _span(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}"


def _bytes(codes: Sequence[Code]) -> str:
    """Bytes an element of the loop that moves most, over the variants."""
    found = {code.bytes_per_element for code in codes if code.main_loops}
    return "–".join(f"{number:g}" for number in dict.fromkeys((min(found), max(found)))) if found else "–"


def _widths(codes: Sequence[Code], *, masked: bool) -> str:
    kinds = []
    for kind in ("load", "store"):
        found = sorted({bits for code in codes for bits in code.widths(kind, masked=masked)}, reverse=True)
        kinds.append(", ".join(map(str, found)) or "–")
    return kinds[0] if kinds[0] == kinds[1] else " / ".join(kinds)


def _row(kernel: str, dtype: str, codes: Sequence[Code]) -> list[str]:
    walks = codes[0].variant.walks_chunks
    is_amd = codes[0].target.backend == "hip"  # masks are branches there: what is narrow is not told from what is masked
    return [
        f"`{kernel}`",
        dtype or "–",
        str(len(codes)),
        _bytes(codes),
        _widths(codes, masked=False) if walks else "–",
        "–" if is_amd else _widths(codes, masked=True),
        _span(code.registers for code in codes),
        _span(code.scratch for code in codes),
        _span(code.shared for code in codes),
        _span(code.resident_threads for code in codes),
        "yes" if any(code.asks_for_fma for code in codes) else "no",
    ]


_HEADINGS = ("kernel", "storage", "variants", "bytes an element", "bits", "bits, masked", "registers", "local", "shared", "threads", "fma")


def _table(codes: Sequence[Code]) -> str:
    groups: dict[tuple[str, str], list[Code]] = {}
    for code in codes:
        groups.setdefault((code.variant.kernel, code.variant.dtype), []).append(code)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], _DTYPES.index(item[0][1])))
    rows = [_row(kernel, dtype, found) for (kernel, dtype), found in ordered]
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|---|---|" + "---:|" * (len(_HEADINGS) - 2)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def tables(codes: Sequence[Code]) -> str:
    """A table a target."""
    import triton

    wrong = [text for code in codes for text in violations(code)]
    verdict = "Every rule holds." if not wrong else "Broken:\n\n" + "\n".join(f"* {text}" for text in wrong)
    parts = [f"Triton {triton.__version__}. {verdict}"]
    for name in TARGETS:
        found = [code for code in codes if code.target.name == name]
        if found:
            which = "all" if name == MAIN else "some that cover every kernel with every storage type and every value of every argument"
            parts.append(f"#### {name}: {len(found)} variants ({which})\n\n{_table(found)}")
    return "\n\n".join(parts) + "\n"
