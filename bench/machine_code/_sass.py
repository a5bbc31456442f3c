"""The machine code of NVIDIA's processors, as cuobjdump prints it: instructions, and the innermost loops they make."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Instruction", "Loop", "functions", "is_atomic", "is_double", "is_local", "loops"]

_FUNCTION = re.compile(r"^\s*Function : (\S+)\n", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_WIDTH = re.compile(r"\.[US]?(8|16|64|128)\b")
_DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|F2F(\.\w+)*\.F64|MUFU\.\w+64H?\b|I2F\.F64|F2I(\.\w+)*\.F64")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "" where it is always executed
    opcode: str  # with what is appended: "LDG.E.128"
    operands: str


@dataclass(frozen=True)
class Loop:
    """A loop that has no other inside: its accesses to global memory (bits -> how many), its instructions in float64, and all of them."""

    loads: Counter[int]
    stores: Counter[int]
    doubles: int
    instructions: int

    @property
    def is_wide(self) -> bool:
        return 128 in self.loads or 128 in self.stores


def functions(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    """(mangled name, code) of each function."""
    parts = _FUNCTION.split(text)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        yield name, [Instruction(int(at, 16), guard, op, rest.strip()) for at, guard, op, rest in _INSTRUCTION.findall(body)]


def is_local(opcode: str) -> bool:
    return opcode.startswith(("LDL", "STL"))


def is_atomic(opcode: str) -> bool:
    return opcode.split(".")[0] in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG")


def is_double(opcode: str) -> bool:
    return _DOUBLE.match(opcode) is not None


def _successors(code: Sequence[Instruction]) -> list[list[int]]:
    """Where control goes from each instruction. A subroutine (of a division, of a root) comes back and is no part of a loop."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    found = []
    for i, instruction in enumerate(code):
        kind, after = instruction.opcode.split(".")[0], [i + 1] if i + 1 < len(code) else []
        if kind in ("BRX", "JMP", "JMX", "BRXU"):
            raise NotImplementedError(f"{instruction.opcode}: where it goes is not known")
        target = re.search(r"0x([0-9a-f]+)$", instruction.operands) if kind == "BRA" else None
        if target is not None:
            always = not instruction.predicate and instruction.operands == target[0]
            found.append([index[int(target[1], 16)], *([] if always else after)])
        else:
            found.append([] if kind in ("EXIT", "RET") and not instruction.predicate else after)
    return found


def _bodies(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """First instruction of each loop -> all of its instructions: what leads to a jump back to the first without passing it."""
    state = [0] * len(successors)  # 1: on the path that is being followed, 2: done
    predecessors: dict[int, list[int]] = defaultdict(list)
    jumps_back: dict[int, list[int]] = defaultdict(list)
    path = [(0, iter(successors[0]))]
    state[0] = 1
    while path:
        here, remaining = path[-1]
        following = next(remaining, None)
        if following is None:
            state[here] = 2
            path.pop()
            continue
        predecessors[following].append(here)
        if state[following] == 1:
            jumps_back[following].append(here)
        elif state[following] == 0:
            state[following] = 1
            path.append((following, iter(successors[following])))
    bodies = {}
    for first, jumps in jumps_back.items():
        body, todo = {first}, jumps
        while todo:
            here = todo.pop()
            if here not in body:
                body.add(here)
                todo.extend(predecessors[here])
        bodies[first] = body
    return bodies


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """The innermost loops that load from or store to global memory."""
    bodies = _bodies(_successors(code))
    found = []
    for first, body in bodies.items():
        if any(other != first and other in body for other in bodies):
            continue
        opcodes = [code[i].opcode for i in body]
        loads, stores = (Counter(_bits(opcode) for opcode in opcodes if opcode.startswith(kind)) for kind in ("LDG", "STG"))
        if loads or stores:
            found.append(Loop(loads, stores, sum(map(is_double, opcodes)), len(opcodes)))
    return found


def _bits(opcode: str) -> int:
    width = _WIDTH.search(opcode)
    return int(width[1]) if width else 32
