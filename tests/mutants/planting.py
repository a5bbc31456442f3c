"""Every fault that can be planted in a source: operators, constants, counts off by one, conditions turned around, calls left out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Mutant", "mutants_of"]


@dataclass(frozen=True)
class Mutant:
    """``old`` at byte ``start`` of a file becomes ``new``."""

    path: str  # from the root of the repository
    start: int
    line: int
    kind: str
    old: str
    new: str

    def plant(self, source: bytes) -> bytes:
        old = self.old.encode()
        if source[self.start : self.start + len(old)] != old:
            raise ValueError(f"{self.path}:{self.line} is no longer {self.old!r}")
        return source[: self.start] + self.new.encode() + source[self.start + len(old) :]


def mutants_of(path: str, source: bytes) -> list[Mutant]:
    """All mutants of a Python or C++ file, in the order of their places."""
    found = _of_python(path, source) if path.endswith(".py") else _of_cpp(path, source)
    return sorted(found, key=lambda mutant: (mutant.start, mutant.new))


OPERATORS: dict[type, tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "+"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
_PROSE = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)  # words of errors are not what is counted here


class _Places:
    """Where the nodes of a tree are in the bytes of its source."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in lines:
            self.starts.append(self.starts[-1] + len(line))

    def start(self, node: ast.AST) -> int:
        return self.starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]


def _of_python(path: str, source: bytes) -> Iterator[Mutant]:
    places = _Places(source)

    def mutant(kind: str, start: int, end: int, new: str) -> Mutant:
        return Mutant(path, start, source.count(b"\n", 0, start) + 1, kind, source[start:end].decode(), new)

    def between(left: ast.AST, operator: ast.AST, right: ast.AST, kind: str) -> Iterator[Mutant]:
        old, new = OPERATORS.get(type(operator), ("", ""))
        start, end = places.end(left), places.start(right)
        gap = re.sub(rb"#[^\n]*", lambda comment: b" " * len(comment[0]), source[start:end])
        if old and (place := re.search(rb"\s+".join(map(re.escape, old.encode().split())), gap)):
            yield mutant(kind, start + place.start(), start + place.end(), new)

    for node in _executed(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            yield from between(node.left, node.op, node.right, "operator")
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from between(left, node.op, right, "operator")
        elif isinstance(node, ast.Compare):
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                yield from between(left, operator, right, "comparison")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield mutant("condition", places.start(node), places.start(node) + len("not "), "")
        elif isinstance(node, ast.Constant) and (new := _other_constant(node.value)):
            yield mutant("off by one" if isinstance(node.value, int) else "constant", places.start(node), places.end(node), new)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield mutant("dropped call", places.start(node), places.end(node), "pass")


def _other_constant(value: object) -> str:
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int):
        return str(value + 1)
    if isinstance(value, float):
        return repr(2 * value if value else 1.0)
    return ""


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """What runs: neither words nor annotations."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, _PROSE):
                yield child
                yield from _executed(child)


_CPP = [  # what is found in a line, the kind, what becomes of it
    (r" \+ ", "operator", " - "),
    (r" - ", "operator", " + "),
    (r" \* ", "operator", " / "),
    (r" / ", "operator", " * "),
    (r" < ", "comparison", " <= "),
    (r" > ", "comparison", " >= "),
    (r" == ", "comparison", " != "),
    (r" != ", "comparison", " == "),
    (r" && ", "operator", " || "),
    (r" \|\| ", "operator", " && "),
    (r" \^ ", "operator", " | "),
    (r" >> ", "operator", " << "),
]
_CPP_NUMBER = re.compile(r"(?<![\w.\"'])(\d+)(?=u?l{0,2}\b)(?!\.)")


def _of_cpp(path: str, source: bytes) -> Iterator[Mutant]:
    start = 0
    for number, raw in enumerate(source.splitlines(keepends=True), 1):
        line = raw.decode()
        code = line.partition("//")[0]
        if not re.match(r"\s*(#|using|template|namespace|static_assert|$)", code):
            for pattern, kind, new in _CPP:
                for found in re.finditer(pattern, code):
                    yield Mutant(path, start + len(code[: found.start()].encode()), number, kind, found[0], new)
            for found in _CPP_NUMBER.finditer(code):
                yield Mutant(path, start + len(code[: found.start()].encode()), number, "off by one", found[0], str(int(found[0]) + 1))
        start += len(raw)
