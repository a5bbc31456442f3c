"""What a kernel asks for, read from Triton's intermediate representation (TTIR): which accesses a block has, and how addresses are made."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Access", "Loop", "address_violations", "loops", "uses_fma"]

_BITS = {"f32": 32, "bf16": 16, "f16": 16, "i64": 64, "i32": 32, "i16": 16, "i8": 8, "i1": 8, "f64": 64}
_ACCESS = re.compile(r"tt\.(load|store) ([^:]*) : tensor<(\d+(?:x\d+)*)x!tt\.ptr<(\w+)>>")
_NARROW_ARITHMETIC = re.compile(r"arith\.(muli|addi|subi|shli)\b.* : i32$")
_VALUE = re.compile(r"%[\w.$-]+")


@dataclass(frozen=True)
class Access:
    """A load or store of a block of elements."""

    kind: str  # "load" or "store"
    elements: int
    bits: int  # of an element
    masked: bool

    @property
    def bytes(self) -> int:
        return self.elements * self.bits // 8


@dataclass(frozen=True)
class Loop:
    """The accesses of one loop over blocks."""

    accesses: tuple[Access, ...]

    @property
    def masked(self) -> bool:
        return any(access.masked for access in self.accesses)

    def counts(self) -> Counter[tuple[str, int]]:
        """How often each kind of access and width of element occurs, whatever the size of the block."""
        return Counter((access.kind, access.bits) for access in self.accesses)


def _lines(ttir: str) -> Iterator[str]:
    """Operations, without where in the source they come from."""
    for line in ttir.splitlines():
        if not line.startswith("#loc"):
            yield re.sub(r"\s*loc\(.*$", "", line).rstrip()


def _is_of_sums(line: str) -> bool:
    """Whether it reads what other programs have stored: sums of chunks, which the last program adds up, and no operand."""
    return "cacheModifier = cg" in line


def _access(line: str) -> Access | None:
    found = _ACCESS.search(line)
    if found is None or _is_of_sums(line):
        return None
    kind, operands, elements, element = found.groups()
    given = len(_VALUE.findall(operands))
    return Access(kind, math.prod(map(int, elements.split("x"))), _BITS[element], given > (1 if kind == "load" else 2))


def loops(ttir: str) -> list[Loop]:
    """Every loop that loads or stores blocks of operands."""
    found: list[Loop] = []
    open_loops: list[tuple[int, list[Access]]] = []
    for line in _lines(ttir):
        indent = len(line) - len(line.lstrip())
        if re.search(r"\bscf\.for\b", line):
            open_loops.append((indent, []))
        elif open_loops and indent == open_loops[-1][0] and line.lstrip().startswith("}"):
            accesses = open_loops.pop()[1]
            if accesses:
                found.append(Loop(tuple(accesses)))
        elif open_loops and (access := _access(line)) is not None:
            open_loops[-1][1].append(access)
    return found


def uses_fma(ttir: str) -> bool:
    """Whether the kernel asks for fused multiply-adds: by name, or inside a function of the mathematical library."""
    return re.search(r"math\.(fma|cos|sin|log|log2|exp|exp2)\b|tt\.extern_elementwise", ttir) is not None


def address_violations(ttir: str) -> list[str]:
    """What would break addresses of tensors of 2^31 elements and more.

    The index of a chunk is the one 32-bit number that grows with the size of a tensor: no arithmetic in 32 bits may be done on it (or on
    what is made of it) before it is extended, and every block that is loaded or stored must lie at a 64-bit distance that comes from it.
    """
    table: set[str] = {"%work_chunks"}  # pointers to the indices of chunks
    index: set[str] = set()  # 32-bit values made of a chunk's index
    start: set[str] = set()  # 64-bit values made of one that was extended in time
    based: set[str] = set()  # pointers at such a distance, and pointers made of them
    found = []
    for line in _lines(ttir):
        names = _VALUE.findall(line.split(" : ")[0])
        if not names or "tt.func" in line:
            continue
        results, operands = (names[:1], names[1:]) if re.match(r"\s*%", line) else ([], names)
        if "tt.load" in line and table.intersection(operands[:1]):
            index.update(results)
        elif "arith.extsi" in line and index.intersection(operands):
            start.update(results)
        elif index.intersection(operands) and _NARROW_ARITHMETIC.search(line):
            found.append(f"32-bit arithmetic on the index of a chunk: {line.strip()}")
            index.update(results)
        elif "tt.addptr" in line and table.intersection(operands[:1]):
            table.update(results)
        elif "tt.addptr" in line:
            wide = line.endswith(", i64") and start.intersection(operands[1:])
            if wide or based.intersection(operands[:1]):
                based.update(results)
        elif "tt.splat" in line and based.intersection(operands):
            based.update(results)
        elif re.search(r"arith\.(muli|addi|subi|shli)\b.* : i64$", line) and start.intersection(operands):
            start.update(results)
        if _access(line) is not None and not based.intersection(operands[:1]):
            found.append(f"the address of a block does not come from a 64-bit distance: {line.strip()}")
    return found
