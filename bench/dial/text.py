"""Text that is wherever Python is: docstrings of the standard library, for a small language model of bytes."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["PARTS", "digest", "docstrings", "windows"]

PARTS = ("train", "held_out", "test")
BYTES_OF_A_MODULE = 4096  # at most, so that no module is a large share of a part


def docstrings(source: str) -> str:
    """Return the docstrings of a module, of its classes and of its functions, in the order of ``ast.walk``, as ASCII."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return "\n\n".join(filter(None, found)).encode("ascii", "replace").decode()


@cache
def _part(name: str, size: int) -> bytes:
    """Every third module of ``Lib/*.py``, in the order of the hashes of their names: parts share no module."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda file: hashlib.sha256(file.name.encode()).digest())
    parts: list[bytes] = []
    for file in files[PARTS.index(name) :: len(PARTS)]:
        if found := docstrings(file.read_text(encoding="utf-8"))[:BYTES_OF_A_MODULE]:
            parts.append(found.encode())
        if len(text := b"\n\n".join(parts)) >= size:
            return text[:size]
    raise RuntimeError(f"text: the standard library has {len(text)} bytes of docstrings for {name!r}, fewer than {size}")


def digest(sizes: dict[str, int]) -> str:
    """Return a name of the text: docstrings are another version's where the version of Python is another."""
    return hashlib.sha256(b"".join(_part(name, sizes[name]) for name in PARTS)).hexdigest()[:12]


def windows(name: str, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Return bytes and the bytes that follow each, (count, length) int64 both: windows that lie beside each other."""
    text = torch.frombuffer(bytearray(_part(name, count * length + 1)), dtype=torch.uint8).long()
    return text[:-1].view(count, length), text[1:].view(count, length)
