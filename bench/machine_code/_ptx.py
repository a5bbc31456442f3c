"""What a kernel does on an NVIDIA processor: its PTX, and what ptxas made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

__all__ = ["accesses", "disassembled", "doubles", "loose_arithmetic", "machine_code", "resources", "spills_in_loops", "uses_fma"]

_GLOBAL = re.compile(r"^\s*(@\S+\s+)?(ld|st)\.global(?:\.(?![vbfsu]\d)[\w:]+)*\.(?:v(\d)\.)?[bfsu](\d+)\b", re.MULTILINE)
_SASS = re.compile(r"(@!?U?P\w+\s+)?\b(LDG|STG)\.E((?:\.\w+)*)")


def accesses(ptx: str) -> Counter[tuple[str, bool, int]]:
    """(load or store, whether under a predicate, bits a thread) of every access to global memory. An address or a size, read from a table
    by all threads, is one number: it counts as 32 bits, which no part of a block without a mask has."""
    found: Counter[tuple[str, bool, int]] = Counter()
    for predicate, kind, vector, bits in _GLOBAL.findall(ptx):
        found["load" if kind == "ld" else "store", bool(predicate), int(vector) * int(bits) if vector else min(int(bits), 32)] += 1
    return found


def doubles(ptx: str) -> int:
    return len(re.findall(r"\.f64\b", ptx))


def uses_fma(ptx: str) -> bool:
    return re.search(r"\bfma\.", ptx) is not None


def loose_arithmetic(ptx: str) -> list[str]:
    """Additions and multiplications that ptxas would be free to contract: those that do not say how they round."""
    return sorted(set(re.findall(r"\b(?:add|sub|mul)(?:\.ftz)?\.f32\b", ptx)))


@cache
def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _run(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_tool(name), option, file.name], check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the kernel. SHARED is what it asks for statically, driver's part included."""
    line = next(line for line in _run("cuobjdump", "--dump-resource-usage", cubin).splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}


def machine_code(cubin: bytes) -> str:
    return _run("cuobjdump", "-sass", cubin)


def spills_in_loops(sass: str) -> int:
    """Loads and stores of local memory that lie between a branch backwards and where it leads."""
    lines = [(int(address, 16), text) for address, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/(.*)$", sass, re.MULTILINE)]
    branches = [(address, int(to, 16)) for address, text in lines for to in re.findall(r"\bBRA\b.*\b0x([0-9a-f]+)", text)]
    bodies = [range(to, address) for address, to in branches if to < address]  # the branch at the end of the code leads to itself
    spills = [address for address, text in lines if re.search(r"\b(STL|LDL)\b", text)]
    return sum(any(address in body for body in bodies) for address in spills)


def disassembled(sass: str) -> Counter[tuple[str, bool, int]]:
    """:func:`accesses`, of the machine code. (ptxas unrolls loops: each may occur several times.)"""
    found: Counter[tuple[str, bool, int]] = Counter()
    for predicate, kind, suffixes in _SASS.findall(sass):
        bits = next((int(part) for part in re.findall(r"\d+", suffixes)), 32)
        found["load" if kind == "LDG" else "store", bool(predicate), bits] += 1
    return found
