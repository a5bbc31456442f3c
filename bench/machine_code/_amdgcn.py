"""What a kernel does on an AMD processor: its assembly text, whose notes give registers and memory."""

from __future__ import annotations

import re
from collections import Counter

__all__ = ["accesses", "doubles", "resources"]

_GLOBAL = re.compile(r"^\s*(?:global|buffer|flat)_(load|store)_(dwordx?\d?|[us]?short\w*|[us]?byte\w*|b\d+|[us]\d+)", re.MULTILINE)


def _bits(width: str) -> int:
    if width.startswith("dword"):
        return 32 * int(width.removeprefix("dwordx") if "x" in width else 1)
    if "short" in width:
        return 16
    return 8 if "byte" in width else int(re.sub(r"\D", "", width))


def accesses(text: str) -> Counter[tuple[str, bool, int]]:
    """(load or store, False, bits a thread) of every access to global memory. Masks are branches here: no access carries its own."""
    return Counter(("load" if kind == "load" else "store", False, _bits(width)) for kind, width in _GLOBAL.findall(text))


def doubles(text: str) -> int:
    return len(re.findall(r"\bv_\w*f64\w*", text))


def resources(text: str) -> dict[str, int]:
    """Vector registers, and bytes of private memory (scratch: the stack, and what was spilled)."""
    noted = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    scratch = noted["private_segment_fixed_size"] + noted["vgpr_spill_count"]
    return {"registers": noted["vgpr_count"], "scratch": scratch}
